"""`evaluate`, function and command: against every draw, against an enumerated truth, killed and gone on with."""

import gc
import inspect
import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import enumerable
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import assume, example, given, strategies as st
from peft import LoraConfig, get_peft_model
from scipy.special import rel_entr
from transformers import AutoModelForCausalLM

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import COMMANDS, main
from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate
from calibrated_rewards.evaluation.kl import Divergence
from calibrated_rewards.evaluation.policies import evaluate, measure_kl, read_responses
from calibrated_rewards.evaluation.results import Comparison, Evaluation, Precision
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.protocol import Decoding, Rollout
from calibrated_rewards.scorers import load_scorer
from calibrated_rewards.testing.suites import HashScorer, NumberSampler, NumberScorer
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

# peft asks the model by a name that transformers is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = ["2+2=", "Hello", "Hi", "Why?", "So"]
THREE = (Standard(), BestOf(2), WorstOf(3))


@dataclass(frozen=True)
class Shifted:
    """Numbers that are larger than those of NumberSampler by so much; counts what it draws, and may die of it."""

    by: float = 0.0
    dies_at: float = np.inf
    drawn: list[str] = field(default_factory=list, compare=False)

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """As many as there are seeds."""
        found = []
        for prompt, rollouts in zip(prompts, NumberSampler()(prompts, seeds), strict=True):
            if len(self.drawn) >= self.dies_at:
                raise KeyboardInterrupt
            self.drawn.extend(prompt for _ in rollouts)
            texts = [f"{float(str(r.completion)) + self.by:.4f}" for r in rollouts]
            found.append([Rollout(text, len(text), "stop") for text in texts])
        return found

    def fingerprint(self) -> dict[str, Any]:
        """By how much."""
        return {"kind": "shifted", "by": self.by}


@dataclass(frozen=True)
class Rounded:
    """NumberScorer's scores in steps of one, so that many are tied."""

    def __call__(self, prompts: Any, completions: Any, /) -> np.ndarray:
        """A score for each pair."""
        return np.round(NumberScorer()(prompts, completions))


@dataclass(frozen=True)
class Enumerated:
    """Draws from the law of an enumerable model, by numpy."""

    model: Any
    length: int

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """As many as there are seeds."""
        ids = enumerable.completions(self.length)
        found = []
        for prompt, own in zip(prompts, seeds, strict=True):
            law = enumerable.law(self.model, prompt, self.length)
            drawn = [ids[np.random.default_rng(seed).choice(len(ids), p=law / law.sum())] for seed in own]
            found.append([Rollout(enumerable.text(y), len(y), "stop" if y[-1] == 0 else "length") for y in drawn])
        return found

    def sampler(self) -> HfSampler:
        """The model as `Divergence` takes it."""
        return HfSampler(self.model, enumerable.tokenizer(), Decoding(self.length))


@dataclass(frozen=True)
class Counting:
    """A distance that is the length of the text; counts what it measures, and may die of it."""

    dies_at: float = np.inf
    measured: list[str] = field(default_factory=list, compare=False)

    def __call__(self, prompts: Any, rollouts: Any, /) -> list[list[tuple[float, bool]]]:
        """For each rollout."""
        if len(self.measured) >= self.dies_at:
            raise KeyboardInterrupt
        self.measured.extend(str(r.completion) for own in rollouts for r in own)
        return [[(float(len(str(r.completion))), len(str(r.completion)) > 6) for r in own] for own in rollouts]

    def fingerprint(self) -> dict[str, Any]:
        """What it is."""
        return {"kind": "counting"}


def rows_of(folder: Path, prompts: Any = PROMPTS) -> Iterator[list[dict[str, Any]]]:
    """The rows of each prompt, as anybody may read them."""
    rows = [row for file in sorted(folder.glob("rollouts/*.parquet")) for row in pq.read_table(file).to_pylist()]
    return ([row for row in rows if row["prompt"] == prompt] for prompt in prompts)


def selected(rows: list[dict[str, Any]], n: int, best: bool) -> list[list[dict[str, Any]]]:
    """Of each n of them, those that the reward puts first, which may be many."""
    sign = 1 if best else -1
    found = []
    for some in combinations(rows, n):
        top = max(sign * row["score:reward"] for row in some)
        found.append([row for row in some if sign * row["score:reward"] == top])
    return found


def wins(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], n: int, best: bool, judge: str) -> float:
    """How often what is selected of ours beats what is selected of theirs, for every draw of n on both sides."""
    found = [
        np.mean([np.sign(a[judge] - b[judge]) / 2 + 0.5 for a in one for b in other])
        for one in selected(ours, n, best)
        for other in selected(theirs, n, best)
    ]
    return float(np.mean(found))


def test_win_rates_are_those_of_every_draw(tmp_path):
    """Selected by one scorer, judged by each, ties half; errors by the spread of prompts; differences paired."""
    policies = {"up": Shifted(1.0), "down": Shifted(-0.4)}
    scorers = {"judge": HashScorer(3), "reward": Rounded()}
    found = evaluate(policies, Shifted(), PROMPTS, scorers, tmp_path, m=5, procedures=THREE, select="reward")
    per_prompt = {}
    for policy in found.policies:
        sides = list(zip(rows_of(tmp_path / policy.name), rows_of(tmp_path / "reference"), strict=True))
        for judge in scorers:
            for procedure, (n, best) in zip(THREE, [(1, True), (2, True), (3, False)], strict=True):
                expected = np.array([wins(*both, n, best, f"score:{judge}") for both in sides])
                per_prompt[policy.name, judge, repr(procedure)] = expected
                value = policy.win_rates[judge][repr(procedure)]
                assert value.value == pytest.approx(expected.mean(), abs=1e-9)
                assert value.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(5), abs=1e-9)
        scores = np.array([[row["score:judge"] for row in own] for own, _ in sides])
        assert policy.scores["judge"].value == pytest.approx(scores.mean(), abs=1e-6)
        assert policy.kl is None
    assert [(d.a, d.b) for d in found.differences] == [("up", "down")] * 6
    for each in found.differences:
        apart = np.subtract(*(per_prompt[name, each.judged_by, each.procedure] for name in ("up", "down")))
        assert each.value.value == pytest.approx(apart.mean(), abs=1e-9)
        assert each.value.standard_error == pytest.approx(apart.std(ddof=1) / np.sqrt(5), abs=1e-9)
    assert (found.prompts, found.completions, found.selected_by) == (5, 5, "reward")


def exact_wins(p: np.ndarray, q: np.ndarray, reward: np.ndarray, judge: np.ndarray, n: int, best: bool) -> float:
    """By the law of the one that comes out of n: of those with a score s, (F(s)^n - F(s-)^n) shared by probability."""
    laws = []
    for law in (p, q):
        key = reward if best else -reward
        below, upto = (np.array([law[rule(key, x)].sum() for x in key]) for rule in (np.less, np.less_equal))
        laws.append(law / (upto - below) * (upto**n - below**n))
    beats = (judge[:, None] > judge[None, :]) + (judge[:, None] == judge[None, :]) / 2
    return float(laws[0] @ beats @ laws[1])


def test_an_enumerated_truth_is_found(tmp_path):
    """Exact win rates, KL and mean score of a model with ties, within a few of what sampling errs by."""
    policy, reference = (Enumerated(enumerable.Tabular(2, seed), 2) for seed in (1, 0))
    scorers = {"reward": enumerable.TiedScorer(), "judge": HashScorer(5)}
    measure = {"policy": Divergence(policy.sampler(), reference.sampler())}
    found = evaluate(
        {"policy": policy}, reference, enumerable.PROMPTS, scorers, tmp_path, m=256, divergence=measure,
        show_progress=False,
    )  # fmt: skip
    (outcome,) = found.policies
    texts = [enumerable.text(ids) for ids in enumerable.completions(2)]
    exact: dict[Any, list[float]] = {}
    for prompt in enumerable.PROMPTS:
        p, q = (enumerable.law(each.model, prompt, 2) for each in (policy, reference))
        scores = {name: np.asarray(scorer([prompt] * len(texts), texts), float) for name, scorer in scorers.items()}
        for judge, own in scores.items():
            for how, n, best in (("Standard()", 1, True), ("BestOf(n=4)", 4, True), ("WorstOf(n=4)", 4, False)):
                exact.setdefault((judge, how), []).append(exact_wins(p, q, scores["reward"], own, n, best))
            exact.setdefault(judge, []).append(float(p @ own))
        exact.setdefault("kl", []).append(float(rel_entr(p, q).sum()))
        exact.setdefault("tokens", []).append(float(p @ [len(ids) for ids in enumerable.completions(2)]))
    assert outcome.kl
    assert outcome.tokens
    assert outcome.kl.value == pytest.approx(np.mean(exact["kl"]), rel=0.08)
    assert outcome.tokens.value == pytest.approx(np.mean(exact["tokens"]), abs=0.05)
    assert outcome.not_as_drawn == 0
    for judge, rates in outcome.win_rates.items():
        assert outcome.scores[judge].value == pytest.approx(np.mean(exact[judge]), abs=0.1)
        for how, value in rates.items():
            assert value.value == pytest.approx(np.mean(exact[judge, how]), abs=0.05)
            assert value.low is not None
            assert value.low < np.mean(exact[judge, how]) < (value.high or 0)


def test_seeds_are_apart_from_the_references_and_shared_by_policies(tmp_path):
    """The same sampler thrice: two policies have the same completions, the reference has others; nothing differs."""
    same = {"a": NumberSampler(), "b": NumberSampler()}
    found = evaluate(same, NumberSampler(), PROMPTS, {"reward": NumberScorer()}, tmp_path, m=4, divergence={})
    texts = {name: [[row["completion"] for row in own] for own in rows_of(tmp_path / name)] for name in "ab"}
    assert texts["a"] == texts["b"]
    theirs = [[row["completion"] for row in own] for own in rows_of(tmp_path / "reference")]
    assert not {text for own in theirs for text in own} & {text for own in texts["a"] for text in own}
    assert {d.value.value for d in found.differences} == {0.0}
    assert not any(d.significant for d in found.differences)
    calibrate(PROMPTS, NumberSampler(), NumberScorer(), tmp_path / "table", k=4)
    table = [[row["completion"] for row in own] for own in rows_of(tmp_path / "table")]
    assert not {text for own in theirs for text in own} & {text for own in table for text in own}


def test_goes_on_where_it_was_killed(tmp_path):
    """In drawing and in measuring: the same numbers as if it had not been, and nothing is done twice."""
    settings = {"m": 4, "prompts_per_shard": 2, "show_progress": False}
    scorers = {"reward": NumberScorer()}
    whole = evaluate({"p": Shifted(1)}, Shifted(), PROMPTS, scorers, divergence={"p": Counting()}, **settings)
    drawn, measured = list[str](), list[str]()
    out = tmp_path / "e"
    for draws, measures in ((9, 0), (np.inf, 9)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                {"p": Shifted(1, draws, drawn)}, Shifted(), PROMPTS, scorers, out,
                divergence={"p": Counting(measures, measured)}, **settings,
            )  # fmt: skip
        assert not (out / "evaluation.json").exists()
    again = {"divergence": {"p": Counting(measured=measured)}, **settings}
    found = evaluate({"p": Shifted(1, drawn=drawn)}, Shifted(), PROMPTS, scorers, out, **again)
    assert found == whole
    # A shard of two prompts is what a kill may cost.
    assert 20 <= len(drawn) <= 28
    assert 20 <= len(measured) <= 28
    done = len(drawn), len(measured)
    assert evaluate({"p": Shifted(1, drawn=drawn)}, Shifted(), PROMPTS, scorers, out, **again) == whole
    assert (len(drawn), len(measured)) == done
    more = {**again, "m": 6}
    larger = evaluate({"p": Shifted(1, drawn=drawn)}, Shifted(), [*PROMPTS, "new"], scorers, out, **more)
    assert (len(drawn) - done[0], len(measured) - done[1]) == (5 * 2 + 6, 5 * 2 + 6)
    assert larger == evaluate({"p": Shifted(1)}, Shifted(), [*PROMPTS, "new"], scorers, **more)
    assert evaluate({"p": Shifted(1)}, Shifted(), PROMPTS, scorers, out, **again) == whole
    # Fewer prompts, in another order, of those that are there: no others count.
    few = evaluate(
        {"p": Shifted(1)}, Shifted(), ["Hi", "Hello"], scorers, out, **settings, divergence=more["divergence"]
    )
    assert few.prompts == 2
    assert few == evaluate({"p": Shifted(1)}, Shifted(), ["Hi", "Hello"], scorers, **again)


def test_other_models_are_measured_anew(tmp_path):
    """What is kept of one divergence is not another's; one that is not as drawn is counted, and said."""
    one = evaluate(
        {"p": Shifted(1)}, Shifted(), PROMPTS, {"r": NumberScorer()}, tmp_path, m=4, divergence={"p": Counting()}
    )
    lengths = [[len(row["completion"]) for row in own] for own in rows_of(tmp_path / "p")]
    assert one.policies[0].kl
    assert one.policies[0].kl.value == pytest.approx(np.mean(lengths))
    assert one.policies[0].not_as_drawn == np.sum(np.array(lengths) <= 6) > 0
    assert f"p: {one.policies[0].not_as_drawn} of 20 completions make other tokens than were drawn" in str(one)

    def twice(prompts: Any, rollouts: Any) -> Any:
        return [[(2 * kl, True) for kl, _ in own] for own in Counting()(prompts, rollouts)]

    other = evaluate(
        {"p": Shifted(1)}, Shifted(), PROMPTS, {"r": NumberScorer()}, tmp_path, m=4, divergence={"p": twice}
    )
    assert other.policies[0].kl
    assert other.policies[0].kl.value == pytest.approx(2 * np.mean(lengths))


@pytest.fixture(scope="module")
def plain():
    """Some evaluation."""
    return evaluate({"a": Shifted(1)}, Shifted(), ["x"], {"r": NumberScorer()}, m=4)


@example(value=0.5, below=0.0, above=0.0)
@given(value=st.floats(-1, 1), below=st.floats(0, 1), above=st.floats(0, 1))
def test_a_difference_is_claimed_only_outside_its_interval(plain, value, below, above):
    """In words, the larger first; else that the prompts do not tell."""
    each = Comparison("a", "b", "judge", "Standard()", IntervalEstimate(value, value - below, value + above, 0.1, 30))
    known = below + above > 1e-6
    assume(known or below == above == 0)
    assert each.significant == (known and (value - below > 0 or value + above < 0))
    said = str(replace(plain, differences=(each,)))
    assert ("a wins more than b" in said) == (known and value - below > 0)
    assert ("b wins more than a" in said) == (known and value + above < 0)
    assert ("these prompts do not tell which" in said) == (not each.significant)


def test_few_prompts_are_said_before_any_claim():
    """The bootstrap within what a rate can be, rough below 20 prompts; the words come before the claims."""
    policies = {"up": Shifted(1), "down": Shifted(-3)}

    def uneven(prompts: Any, rollouts: Any) -> Any:
        return [[(9.0 * (p == PROMPTS[0]), True) for _ in own] for p, own in zip(prompts, rollouts, strict=True)]

    found = evaluate(
        policies, Shifted(), PROMPTS[:3], {"r": NumberScorer()},
        m=4, procedures=[Standard()], divergence={"up": uneven},
    )  # fmt: skip
    kl = found.policies[0].kl
    assert kl is not None
    assert (kl.value, kl.low) == (3.0, 0.0)
    said = str(found)
    assert said.startswith("3 prompts are few: below 20 even the intervals are rough")
    places = [said.index(each) for each in ("Judged by r, one draw: up wins", "KL, nats", "up wins more than down")]
    assert places == sorted(places)
    assert said.index("\n3 prompts, 4 completions of each") > places[-1]
    rate = found.policies[0].win_rates["r"]["Standard()"]
    assert rate.value < rate.high <= 1
    every = [*found.reference.scores.values(), *(each.tokens for each in found.policies)]
    assert all(each.low <= each.value <= each.high for each in every)
    more = evaluate(policies, Shifted(), [f"p{i}" for i in range(20)], {"r": NumberScorer()}, m=4)
    assert "are few" not in str(more)
    for prompts in (3, 20):
        rates = IntervalEstimate.of(Estimate(np.linspace(0, 1, prompts)))
        assert (rates.low, rates.high) == Estimate(np.linspace(0, 1, prompts)).interval()


def test_an_interval_without_width_claims_nothing():
    """One completion of a few prompts that all say the same: they say it of themselves."""
    far = {"up": Shifted(50), "down": Shifted(-50)}
    for n in (3, 25):
        prompts = [f"p{i}" for i in range(n)]
        found = evaluate(far, Shifted(), prompts, {"r": NumberScorer()}, m=1, procedures=[Standard()])
        assert found.differences[0].value.value == 1
        assert not found.differences[0].significant
        assert "wins more than" not in str(found)
    assert f"{n} prompts, 1 completion of each" in str(found)
    # A resampled mean of equal values is off by rounding.
    rounded = IntervalEstimate(0.1, 0.1, float(np.nextafter(0.1, 1)), 0.0, 25)
    assert not Comparison("a", "b", "judge", "Standard()", rounded).significant


def test_a_single_prompt_has_no_intervals(tmp_path):
    """None in the file, which is plain JSON, no words about intervals; and the file is read as it was written."""
    found = evaluate(
        {"p": Shifted(1), "q": Shifted(2)},
        Shifted(),
        ["x"],
        {"r": NumberScorer()},
        tmp_path,
        m=4,
        procedures=[Standard()],
    )
    said = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert said["policies"][0]["win_rates"]["r"]["Standard()"]["low"] is None
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    assert "do not tell" in str(found)
    assert "wins more than" not in str(found)
    assert str(found).startswith("1 prompt says nothing of others")
    assert str(found).endswith("1 prompt, 4 completions of each; best and worst of N selected by r")
    assert "of 1 difference of win rates, 0 have an interval" in str(found)
    assert "the others" not in str(found)
    whole = (tmp_path / "evaluation.json").read_text()
    broken = (re.sub('"value": [^,]+', f'"value": {value}', whole, count=1) for value in ("NaN", "null", '"5"', "true"))
    for text in ('{"reference": {}}', "", "[]", whole[:99], *broken):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=r"evaluation.json must be an evaluation that was saved"):
            Evaluation.load(tmp_path / "evaluation.json")


def test_refuses_what_cannot_be_evaluated(tmp_path):
    """Before anything is drawn: m below N, names that are no folders, no prompts; later, prompts that lack some."""
    reward, policy = {"r": NumberScorer()}, Shifted()
    for m in (1, 3):
        with pytest.raises(
            ValueError, match=rf"best of 4 needs 4 completions of each prompt or more, got {m}: draw more"
        ):
            evaluate({"p": policy}, policy, PROMPTS, reward, m=m)
    for name in ("reference", "Reference", "a/b", "..", "", "evaluation.json"):
        with pytest.raises(ValueError, match="the name of a policy is that of its folder"):
            evaluate({name: policy}, policy, PROMPTS, reward)
    with pytest.raises(ValueError, match="the scorers are r, and one of them selects; got select='judge'"):
        evaluate({"p": policy}, policy, PROMPTS, reward, select="judge")
    with pytest.raises(ValueError, match="needs prompts, got none"):
        evaluate({"p": policy}, policy, [], reward)
    with pytest.raises(ValueError, match="needs policies and scorers"):
        evaluate({}, policy, PROMPTS, reward)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"needs a folder to keep all in, got out='.*file', a file"):
        evaluate({"p": policy}, policy, PROMPTS, reward, tmp_path / "file")
    untyped: Any = inspect.unwrap(evaluate)
    for m in (4.0, True, "4", None):
        with pytest.raises(TypeError, match=f"evaluate needs a whole m, got m={m!r}"):
            untyped({"p": policy}, policy, PROMPTS, reward, m=m)
    with pytest.raises(TypeError, match=r"the name of a policy is a str, .* got 1"):
        untyped({1: policy}, policy, PROMPTS, reward)
    with pytest.raises(TypeError, match=r"procedures as BestOf\(4\) is one, got 'best-of:4'"):
        untyped({"p": policy}, policy, PROMPTS, reward, procedures=["best-of:4"])
    for wrong in ({"policies": [policy]}, {"procedures": BestOf(4)}, {"scorers": NumberScorer()}):
        with pytest.raises(ValueError, match="needs policies and scorers, each by its name, and procedures"):
            untyped(**{"policies": {"p": policy}, "reference": policy, "prompts": PROMPTS, "scorers": reward, **wrong})
    assert policy.drawn == []
    one = untyped({"p": policy}, policy, PROMPTS, reward, m=np.int64(1), procedures=[Standard()])
    assert (one.completions, type(one.completions)) == (1, int)
    calibrate(PROMPTS, policy, reward, tmp_path, k=3)
    asked = {prompt_key(prompt): prompt for prompt in [*PROMPTS, "new"]}
    with pytest.raises(ValueError, match=r"m=3 completions of each prompt, scored; .* has 0 for 'new'"):
        read_responses(tmp_path, asked, ["r"], 3)
    with pytest.raises(ValueError, match=r"m=4 completions .* has 3 for '2\+2='"):
        read_responses(tmp_path, {prompt_key("2+2="): "2+2="}, ["r"], 4)
    with pytest.raises(ValueError, match="has 0 for '2"):
        read_responses(tmp_path, {prompt_key("2+2="): "2+2="}, ["other"], 3)
    with pytest.raises(ValueError, match=r"the KL of .* has 3 for '2"):
        measure_kl(tmp_path, {prompt_key("2+2="): "2+2="}, Counting(), 4)


CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, a policy, an adapter of the reference's, a reward model, a judge, a reward, and prompts, on disk."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "policy")):
        model = tiny.causal(seed)
        model.lm_head.weight.data.mul_(5)
        tiny.saved(model, folder / name, tiny.tokenizer())
    for seed, name in enumerate(("rm", "judge")):
        tiny.saved(tiny.classifier(seed), folder / name, tiny.tokenizer())
    base = AutoModelForCausalLM.from_pretrained(folder / "reference")
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapter = get_peft_model(base, settings)
    adapter.save_pretrained(folder / "adapter")
    scorer = load_scorer(folder / "rm")
    calibrate(CHATS, load_sampler(folder / "reference", Decoding(5, 0.8)), scorer, folder / "table", k=4)
    CalibratedReward(scorer, ReferenceTable.load(folder / "table")).save_pretrained(folder / "reward")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in CHATS))
    return folder


@pytest.fixture
def call(models, tmp_path, capsys, monkeypatch):
    """Runs the command on the policies named, and gives its exit code, its output and its complaint."""
    monkeypatch.setitem(COMMANDS, "evaluate", "measure")

    def called(*words: str, policies: Any = ("policy",)) -> tuple[int, str, str]:
        said = [word for each in policies for word in ("--policy", each)]
        given = ["--reference", str(models / "reference"), "--prompts", str(models / "prompts.jsonl")]
        code = main(["evaluate", *said, *given, "--out", str(tmp_path / "e"), "--quiet", *words])
        return (code, *capsys.readouterr())

    return called


def test_a_policy_is_let_go_of_before_the_next(models):
    """With its weights, also when it was read again for its KL."""
    loaded: list[Any] = []

    class Fresh(dict[str, str]):
        """Loads a policy when it is asked for."""

        def __getitem__(self, name: str) -> Any:
            gc.collect()
            assert [each() for each in loaded] == [None] * len(loaded)
            sampler = load_sampler(models / "policy", Decoding(3))
            loaded.append(weakref.ref(sampler))
            return sampler

    reference = load_sampler(models / "reference", Decoding(3))
    found = evaluate(Fresh(a="", b=""), reference, CHATS[:1], {"r": HashScorer()}, m=4)  # type: ignore[arg-type]
    assert [each.kl is None for each in found.policies] == [False, False]
    assert len(loaded) >= 2


def test_the_command_does_what_the_function_does(models, tmp_path, call):
    """A model and an adapter, with the table's decoding and the reward's reward model; tables."""
    policies = [f"{name}={models / name}" for name in ("policy", "adapter")]
    words = ["--reward", str(models / "reward"), "--judge", str(models / "judge"), "-m", "4"]
    code, out, _ = call(*words, "--best-of", "2", "--best-of", "1-3", policies=policies)
    assert code == 0
    found = Evaluation.load(tmp_path / "e" / "evaluation.json")
    assert out == f"{found}\n"
    drawing = Decoding(5, 0.8)
    expected = evaluate(
        {name: load_sampler(models / name, drawing) for name in ("policy", "adapter")},
        load_sampler(models / "reference", drawing),
        CHATS,
        {"reward": load_scorer(models / "rm"), "judge": load_scorer(models / "judge")},
        m=4,
        procedures=(Standard(), BestOf(2), BestOfUpTo(3), WorstOf(4)),
    )
    assert found == expected
    assert all(each.kl is not None and each.kl.value > 0 for each in found.policies)


def test_a_policy_saved_in_another_dtype_is_not_away_from_itself(models, tmp_path, call):
    """The interval covers 0 and the output says why; a policy trained from 16 bits is where its weights put it."""
    reference = AutoModelForCausalLM.from_pretrained(models / "reference", dtype=torch.float32)
    narrow = AutoModelForCausalLM.from_pretrained(models / "reference", dtype=torch.bfloat16)
    tiny.saved(narrow, tmp_path / "narrow", tiny.tokenizer())
    tiny.saved(reference, tmp_path / "wide", tiny.tokenizer())
    words = ["--reward", str(models / "reward"), "-m", "4"]
    code, out, _ = call(*words, policies=[f"narrow={tmp_path / 'narrow'}", f"wide={tmp_path / 'wide'}"])
    found = {each.name: each for each in Evaluation.load(tmp_path / "e" / "evaluation.json").policies}
    assert code == 0
    assert (found["wide"].kl.value, found["wide"].kl_precision) == (0.0, Precision("float32"))
    assert found["narrow"].kl_precision == Precision("float32", "bfloat16")
    assert found["narrow"].kl.low == 0 < found["narrow"].kl.value < found["narrow"].kl.high
    assert "narrow: its weights are those of the reference, one of the two rounded to bfloat16" in out
    assert out.count("rounded") == 1


def test_the_command_says_its_decoding_and_its_reward_models(models, tmp_path, call):
    """All said, without a table: the names of the reward models, no KL, and the settings in the files."""
    rm = ["--reward-model", f"good={models / 'rm'}", "--max-tokens", "3", "--temperature", "0.9", "-m", "4", "--no-kl"]
    judge = ["--judge", str(models / "judge"), "--select", "judge", "--json"]
    code, out, _ = call(*rm, *judge, policies=[str(models / "policy")])
    found = Evaluation.load(tmp_path / "e" / "evaluation.json")
    assert (code, json.loads(out)) == (0, found.as_json())
    assert ([*found.reference.scores], found.selected_by) == (["good", "judge"], "judge")
    assert [(each.name, each.kl) for each in found.policies] == [("policy", None)]
    decoding = json.loads((tmp_path / "e" / "policy" / "run.json").read_text())["sampler"]["decoding"]
    assert (decoding["max_tokens"], decoding["temperature"]) == (3, 0.9)


def test_the_command_says_what_is_wrong(models, tmp_path, call):
    """Before anything is drawn."""
    one, reward = [str(models / "policy")], ["--reward", str(models / "reward")]
    rm = ["--reward-model", str(models / "rm")]
    wrong = {
        "--max-tokens": (rm, one),
        "leave --reward-model out": ([*rm, *reward], one),
        "all of it is said: --max-tokens N too": ([*reward, "--top-k", "5"], one),
        "each --policy needs a name of its own": (reward, one * 2),
        "needs --reward DIR or --reward-model": (["--max-tokens", "5"], one),
        "best of 4 needs 4 completions of each prompt or more, got 2": ([*reward, "-m", "2"], one),
        "the name of a policy is that of its folder": (reward, [f"reference={one[0]}"]),
        "nowhere": (reward, [str(tmp_path / "nowhere")]),
        "give the --reward-model of that name another one": (
            ["--max-tokens", "5", "--reward-model", f"judge={models / 'rm'}", "--judge", str(models / "judge")],
            one,
        ),
    }
    for said, (words, policies) in wrong.items():
        code, _, complaint = call(*words, policies=policies)
        assert code == 2
        assert said in complaint
    assert not (tmp_path / "e").exists()
    (tmp_path / "e").write_text("")
    code, _, complaint = call(*reward, policies=["nowhere"])
    assert code == 2
    assert f"--out needs a folder, new or of an evaluation before, got the file {tmp_path / 'e'}" in complaint


def test_text_for_a_chat_model_is_named(models, tmp_path, call, caplog):
    """Empty completions are counted and what to do is said before the numbers; of messages nothing is said."""
    reference = load_sampler(models / "reference", Decoding(3))
    short = Half(reference)
    found = evaluate({"short": short}, reference, ["a", "b"], {"r": HashScorer()}, m=4)
    assert "2 of 2 prompts are plain text, and the model has a chat template" in caplog.text
    assert (found.plain_prompts, found.policies[0].empty) == (2, 4)
    text = str(found)
    assert text.index("completions are empty: ") < text.index("50.0% of short") < text.index("mean r")
    assert text.index('give each prompt as messages: [{"role": "user", "content": "..."}]') < text.index("mean r")
    caplog.clear()
    found = evaluate({"short": short}, reference, CHATS, {"r": HashScorer()}, m=4)
    assert "plain text" not in caplog.text + str(found)
    assert "a policy that ends at once" in str(found)
    assert Evaluation.load(found.save(tmp_path / "e.json") or tmp_path / "e.json") == found
    (models / "texts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = ["--reward", str(models / "reward"), "-m", "4", "--prompts", str(models / "texts.jsonl")]
    code, out, _ = call(*words, policies=[str(models / "policy")])
    assert code == 0
    assert "2 of 2 prompts are plain text" in out
    model = AutoModelForCausalLM.from_pretrained(models / "reference")
    none = HfSampler(model, tiny.tokenizer(template=None), Decoding(3))
    assert evaluate({"p": none}, none, ["a"], {"r": HashScorer()}, m=4).plain_prompts == 0


@dataclass(frozen=True)
class Half:
    """Another sampler's completions, every second of them empty; the blank kinds in turn."""

    of: Any

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """As many as there are seeds."""
        blank = ["", " \n"]
        found = self.of(prompts, seeds)
        return [
            [Rollout(f"{r.completion}x" if i % 2 else blank[i // 2 % 2], 1, "stop") for i, r in enumerate(own)]
            for own in found
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Whose."""
        return {"kind": "half"}

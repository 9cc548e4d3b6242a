"""The plain loops: each piece against another route, and both loops against the optimum of an enumerable model."""

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import enumerable
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibrate import calibrate
from calibrated_rewards.reading.text import Text
from calibrated_rewards.recipes import grpo_plain, loop, ppo
from calibrated_rewards.rollouts.sources import Asked
from calibrated_rewards.samplers.decoding import Decoding
from calibrated_rewards.samplers.loading import load_sampler
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.scorers import load_scorer
from calibrated_rewards.testing import HashScorer

CHAT = [{"role": "user", "content": "Hi"}]
PROMPTS = ["a", "how are you", CHAT]
numbers = st.floats(-3, 3, width=32)


def tiny_policy(tokens: int = 6, temperature: float = 1.0, **model: Any) -> Policy:
    """A Llama that ends completions early now and then: the end token is as likely as a hundred others."""
    made = tiny.causal(**model)
    with torch.no_grad():
        made.lm_head.weight[tiny.EOS] = made.lm_head.weight.mean(0) + 0.1
        made.lm_head.weight.mul_(10)
    return Policy(made, tiny.tokenizer(), Decoding(tokens, temperature), Text())


def gpt2() -> Any:
    """A GPT-2 of one layer whose positions matter."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": tiny.VOCABULARY}
    made = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=tiny.EOS, bos_token_id=tiny.BOS)).eval()
    with torch.no_grad():
        made.transformer.wpe.weight.normal_()
        made.transformer.wte.weight[tiny.EOS] = made.transformer.wte.weight.mean(0)
    return made


def exact_policy(length: int) -> Policy:
    """The enumerable model."""
    return Policy(enumerable.Tabular(length), enumerable.tokenizer(), Decoding(length), Text())


def plain_reward(prompts: Any = PROMPTS) -> CalibratedReward:
    """A reward without a model, whose references are drawn by nobody."""
    rng = np.random.default_rng(0)
    return CalibratedReward(HashScorer(), ReferenceTable.build([(p, rng.normal(size=16)) for p in prompts]))


@st.composite
def paths(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers for tokens, twice, and a mask: each row has one token or more."""
    n, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ends = torch.tensor(draw(st.lists(st.integers(1, length), min_size=n, max_size=n)))
    mask = torch.arange(length) < ends[:, None]
    one, two = (
        torch.tensor(draw(st.lists(numbers, min_size=n * length, max_size=n * length)), dtype=torch.float32)
        for _ in range(2)
    )
    return one.view(n, length) * mask, two.view(n, length) * mask, mask


@given(paths(), st.floats(0, 1))
def test_gae_is_the_sum_of_all_discounted_surprises(path: Any, lam: float) -> None:
    """Against the double sum of the definition, each row by itself and without padding."""
    rewards, values, mask = path

    found = ppo.gae(rewards, values, mask, lam)

    for i, end in enumerate(mask.sum(1).tolist()):
        v = [*values[i, :end].tolist(), 0.0]
        surprise = [float(rewards[i, t]) + v[t + 1] - v[t] for t in range(end)]
        expected = [sum(lam ** (k - t) * surprise[k] for k in range(t, end)) for t in range(end)]
        np.testing.assert_allclose(found[i, :end], expected, atol=1e-4)
        assert not found[i, end:].any()


@given(paths(), st.floats(0, 2))
def test_tokens_earn_score_less_kl(path: Any, beta: float) -> None:
    """What a completion's tokens earn is its score less beta times its log-ratio, and the score comes last."""
    log_ratio, more, mask = path
    score = more[:, 0]

    paid = ppo.token_rewards(score, log_ratio, mask, beta)

    np.testing.assert_allclose(paid.sum(1), score - beta * log_ratio.sum(1), atol=1e-4)
    for row, ratio, own, end in zip(paid, log_ratio, score, mask.sum(1).tolist(), strict=True):
        np.testing.assert_allclose(row[: end - 1], -beta * ratio[: end - 1], atol=1e-5)
        np.testing.assert_allclose(row[end - 1], own - beta * ratio[end - 1], atol=1e-5)


@pytest.mark.parametrize(("how", "moments"), [("centre", (0, None)), ("scale", (0, 1))])
def test_whitening_counts_tokens_and_no_padding(how: str, moments: Any) -> None:
    """Mean 0, and deviation 1 where asked, over the tokens alone."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    given = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])

    found = ppo.whitened(given, mask, how)

    assert found[mask].mean() == pytest.approx(moments[0], abs=1e-6)
    assert found[mask].std(correction=0) == pytest.approx(moments[1] or given[mask].std(correction=0))
    assert not found[~mask].any()
    assert ppo.whitened(given, mask, "no") is given


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=3))
def test_the_baseline_leaves_itself_out(rewards: list[list[float]]) -> None:
    """Against a loop; the group's mean is (G-1)/G of it."""
    found = grpo_plain.advantages(torch.tensor(rewards))

    expected = [[own - np.mean(row[:i] + row[i + 1 :]) for i, own in enumerate(row)] for row in rewards]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(grpo_plain.advantages(torch.tensor(rewards), "group-mean"), found * 3 / 4, atol=1e-5)


@pytest.mark.parametrize(("family", "temperature"), [("llama", 1.0), ("gpt2", 0.7)])
def test_logprobs_are_those_of_a_plain_forward(family: str, temperature: float) -> None:
    """Prompts of many lengths in one batch; each completion read alone, without padding, gives the same.

    GPT-2 counts positions from the first column if nobody says where a prompt begins; a Llama would not notice.
    """
    policy = tiny_policy(temperature=temperature)
    if family == "gpt2":
        policy = replace(policy, model=gpt2())
    prompts = PROMPTS * 4
    torch.manual_seed(0)
    episodes = loop.write(policy, prompts)

    found = loop.logprobs_of(policy.model, episodes, temperature, most=5)

    lengths = episodes.mask.sum(1).tolist()
    assert max(lengths) == 6
    assert family == "gpt2" or min(lengths) < 6
    for i, (row, opening) in enumerate(zip(episodes.mask, policy.ids(prompts), strict=True)):
        own = episodes.ids[i, -len(row) :][row]
        logits = policy.model(torch.tensor([[*opening, *own.tolist()]])).logits[0, len(opening) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, own[:, None])[:, 0]
        np.testing.assert_allclose(found[i][row], expected.detach(), atol=1e-5)
        assert not found[i][~row].any()


def test_completions_end_with_the_first_end_token() -> None:
    """The mask goes to the end token and no further, and the text is what is left of the tokens before it."""
    policy = tiny_policy(tokens=12)
    torch.manual_seed(1)
    episodes = loop.write(policy, ["ab"], 40)

    own = [row[mask].tolist() for row, mask in zip(episodes.ids[:, -12:], episodes.mask, strict=True)]
    assert all(tiny.EOS not in row[:-1] for row in own)
    assert {row[-1] == tiny.EOS for row in own if len(row) < 12} == {True}
    assert any(len(row) == 12 and row[-1] != tiny.EOS for row in own)
    assert episodes.texts == policy.tokenizer.batch_decode(own, skip_special_tokens=True)
    assert (episodes.attention.sum(1) == episodes.mask.sum(1) + 3).all()  # BOS, a, b


def test_completions_are_drawn_from_the_whole_distribution() -> None:
    """In proportion to the enumerated law, whatever the checkpoint's generation config would have."""
    policy = exact_policy(2)
    policy.model.generation_config.update(top_k=2, temperature=0.1, repetition_penalty=3.0)
    torch.manual_seed(0)
    n = 8000
    written = loop.write(policy, ["bc"], n)
    own = [tuple(r[m].tolist()) for r, m in zip(written.ids[:, -2:], written.mask, strict=True)]

    law = enumerable.law(policy.model, "bc", 2)

    seen = np.array([own.count(each) for each in enumerable.completions(2)])
    assert seen.sum() == n
    kept = law * n > 5
    chi = ((seen - law * n) ** 2 / (law * n))[kept].sum()
    assert chi < kept.sum() + 5 * np.sqrt(2 * kept.sum())


@pytest.mark.parametrize("recipe", [ppo, grpo_plain])
def test_the_first_gradient_is_that_of_the_policy_gradient(recipe: Any) -> None:
    """Where nothing was updated yet all ratios are 1, and clipping is idle."""
    torch.manual_seed(0)
    old, mask = torch.randn(5, 3), torch.tensor([[1.0, 1.0, 0.0]])
    shape = (5, 3) if recipe is ppo else (5,)
    advantage, new = torch.randn(shape), (old * mask).clone().requires_grad_()

    losses = recipe.losses(new, old * mask, advantage, 0.2)
    losses.sum().backward()

    np.testing.assert_allclose(losses.detach(), -advantage, atol=1e-6)
    np.testing.assert_allclose(new.grad, -(advantage if recipe is ppo else advantage[:, None].expand(5, 3)), atol=1e-6)


@pytest.mark.parametrize("recipe", [ppo, grpo_plain])
def test_clipping_ends_the_gradient_beyond_the_bound_only(recipe: Any) -> None:
    """A ratio that went too far the right way has no gradient any more; one that went the wrong way has."""
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    recipe.losses(new, torch.zeros(4, 1), advantage[:, None] if recipe is ppo else advantage, 0.2).sum().backward()

    expected = [0.0, 0.0, np.exp(0.5), -np.exp(-0.5)]
    np.testing.assert_allclose(new.grad[:, 0], expected, atol=1e-6)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 3))
def test_each_prompt_comes_once_before_any_comes_again(many: int, n: int, seed: int) -> None:
    """Turns are of the size that was asked for, and passes over the prompts are whole."""
    turns = loop.turns([Asked(str(i)) for i in range(many)], n, seed)
    seen = [asked.prompt for _ in range(many) for asked in next(turns)]

    assert len(seen) == many * n
    passes = [sorted(seen[i : i + many]) for i in range(0, len(seen), many)]
    assert passes == [sorted(map(str, range(many)))] * n


@pytest.mark.parametrize("recipe", [ppo, grpo_plain])
def test_rows_at_once_change_nothing_and_seeds_everything(recipe: Any) -> None:
    """Two steps with any size of batches in memory give the same weights; another seed gives others."""

    def trained(rows: int, seed: int) -> torch.Tensor:
        policy = tiny_policy()
        size = {"completions": 6 if recipe is ppo else 2, "prompts_a_step": 3}
        settings = recipe.Settings(steps=2, lr=1e-2, rows=rows, seed=seed, **size)
        recipe.train(policy, plain_reward(), [Asked(p) for p in PROMPTS], settings)
        return policy.model.lm_head.weight.detach()

    whole = trained(100, 0)
    np.testing.assert_allclose(trained(4, 0), whole, atol=2e-4)  # 4 and 2: equal parts would hide a wrong mean
    assert (trained(100, 1) - whole).abs().max() > 1e-3


# 4 prompts x 64 completions a step: a few seconds. benchmarks/plain_loops.py has more cases, and what biases them.
@pytest.mark.parametrize(("recipe", "phi", "steps"), [(ppo, "exp:10", 150), (grpo_plain, "identity", 200)])
def test_it_converges_to_the_optimum(recipe: Any, phi: str, steps: int) -> None:
    """pi_ref(y) e^{Phi(C)/beta} / Z, by enumeration, for each prompt: total variation below 0.03, from above 0.5."""
    policy = exact_policy(2)
    problem = enumerable.Problem.of(policy.model, 2, phi)
    beta = problem.beta()
    assert problem.distances(policy.model, beta).max() > 0.5
    reward = CalibratedReward(enumerable.TiedScorer(), problem.table(), problem.transform)
    size = {"completions": 256, "epochs": 1, "value_lr": 3e-2} if recipe is ppo else {"completions": 64}
    settings = recipe.Settings(beta=beta, steps=steps, prompts_a_step=4, lr=0.1, rows=256, **size)

    recipe.train(policy, reward, [Asked(p) for p in enumerable.PROMPTS], settings)

    assert problem.distances(policy.model, beta).max() < 0.03


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    """A policy, a reward model, prompts with ids, and a calibrated reward, all saved."""
    root = tmp_path_factory.mktemp("recipes")
    tiny.saved(tiny.causal(), root / "policy", tiny.tokenizer())
    tiny.saved(tiny.classifier(), root / "rm", tiny.tokenizer())
    rows = [{"prompt": prompt, "prompt_id": i} for i, prompt in enumerate(tiny.texts(3))]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    draw = load_sampler(root / "policy", Decoding(5, temperature=0.9), dtype="float32")
    scorer = load_scorer(root / "rm", dtype="float32")
    table = calibrate(root / "prompts.jsonl", draw, scorer, k=4, out=root / "run")
    CalibratedReward(scorer, table, id_column="prompt_id").save_pretrained(root / "reward")
    return Path(root)


@pytest.mark.parametrize("recipe", [ppo, grpo_plain])
def test_the_command_trains_and_saves(recipe: Any, run: Path, tmp_path: Path) -> None:
    """Two steps from files to files: a model that loads and is another one, and a line of log for each step."""
    size = ["--completions", "2", "--prompts-a-step", "2", "--steps", "2", "--lr", "0.001", "--epochs", "2"]
    named = {"--policy": run / "policy", "--reward": run / "reward", "--prompts": run / "prompts.jsonl"}
    recipe.main([*(str(x) for pair in named.items() for x in pair), "--out", str(tmp_path / "out"), *size])

    before, after = (tiny.LlamaForCausalLM.from_pretrained(p) for p in (run / "policy", tmp_path / "out/model"))
    assert (before.lm_head.weight - after.lm_head.weight).abs().max() > 1e-4
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(0 <= row["reward"] <= 1 and 0 < row["tokens"] <= 5 for row in rows)
    assert all(row["objective"] == pytest.approx(row["reward"] - 0.1 * row["kl"], abs=1e-5) for row in rows)


@pytest.mark.parametrize("recipe", [ppo, grpo_plain])
def test_help_teaches(recipe: Any, capsys: Any) -> None:
    """It opens with what the file does, and says of each setting what it is for."""
    with pytest.raises(SystemExit):
        recipe.main(["--help"])

    shown = " ".join(capsys.readouterr().out.split())
    assert inspect.getdoc(recipe).splitlines()[0] in shown
    for each in fields(recipe.Settings):
        assert f"--{each.name.replace('_', '-')}" in shown
        assert " ".join(each.metadata["help"].split()) in shown


def test_decoding_is_the_tables() -> None:
    """Length and temperature come from the table unless they are said; what bends the distribution is refused."""
    meta = {"sampler": {"decoding": Decoding(7, temperature=0.5).fingerprint()}}

    assert loop.decoding_of(meta, None, None) == Decoding(7, temperature=0.5)
    assert loop.decoding_of(meta, 9, 1.0) == Decoding(9)
    with pytest.raises(ValueError, match=r"drawn with \{'top_p': 0.9\}"):
        loop.decoding_of({"sampler": {"decoding": Decoding(7, top_p=0.9).fingerprint()}}, None, None)
    with pytest.raises(ValueError, match="--max-tokens"):
        loop.decoding_of({}, None, None)


def test_ppo_refuses_a_reward_that_is_none() -> None:
    """A prompt without references, skipped: there is no number to learn from."""
    reward = CalibratedReward(HashScorer(), plain_reward().table, on_missing="skip")
    with pytest.raises(ValueError, match="'neutral'"):
        ppo.train(tiny_policy(), reward, [Asked("unknown")], ppo.Settings(steps=1, completions=1, prompts_a_step=1))


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        (ppo, {"whiten": "yes"}),
        (ppo, {"completions": 5}),
        (grpo_plain, {"completions": 1}),
        (grpo_plain, {"baseline": "x"}),
    ],
)
def test_settings_are_checked(recipe: Any, wrong: dict[str, Any]) -> None:
    """The error names the setting and what it got."""
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        recipe.Settings(**wrong)

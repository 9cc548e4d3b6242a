"""The proof ladder of benchmarks/proof: the tree of completions, exact win rates, training, shares, by other routes."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harmlessness
import held_out_prompts
import mixtures
import numpy as np
import predict
import pytest
import torch
from arms import Point, choose_best_other, compare, compute_targets, interpolate, measure, predict_optima, weigh
from experiment import run_all
from laws import Laws, Rollouts
from learn import Batch, Policy, Settings, compute_gradient, train
from same_prompts import make_policy
from shares import average, compare_as_trained, compute_shares
from small_language_model import Size, build_model
from tree import Tree

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.held_out import check_log_ratios
from calibrated_rewards.evaluation.held_out_results import compare_held_out
from calibrated_rewards.theory.procedures import WorstOf

JUDGES = ("reward", "judge")


def tiny(layers: int = 2, prompts: int = 2, width: int = 4, length: int = 2) -> tuple[Any, Tree]:
    """A random model and the tree of its completions."""
    torch.manual_seed(0)
    model = build_model(Size(hidden=16, layers=layers), 40).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
    tokens = torch.randint(1, 40, (prompts, 3))
    return model, Tree.grow(model.model, model.lm_head.weight, tokens, length, width, 0.7)


def make_laws(prompts: int = 2, size: int = 16, seed: int = 0) -> Laws:
    """Laws that are not uniform, with scores of which some tie."""
    rng = np.random.default_rng(seed)
    reward = np.round(rng.normal(size=(prompts, size)), 1)
    judge = np.round(reward + rng.normal(size=reward.shape), 1)
    return Laws(rng.dirichlet(np.full(size, 3.0), prompts), reward, judge)


def make_tiny_policy() -> Policy:
    """A policy in training: a tiny random model, and the law and scores of its completions."""
    model, tree = tiny()
    law = np.exp(tree.law(model.model, model.lm_head.weight))
    laws = make_laws()
    own = Laws(law / law.sum(1, keepdims=True), laws.reward, laws.judge)
    return Policy(model.model, model.lm_head.weight, list(model.parameters()), tree, own)


def test_a_tree_has_the_log_probabilities_of_whole_rows() -> None:
    """Prompt and completion read as one row, softmax over the choices at each place; also of some completions alone."""
    model, tree = tiny(length=3)
    law = tree.law(model.model, model.lm_head.weight)
    numbers = np.arange(tree.size)
    for prompt, tokens in enumerate(tree.tokens()):
        rows = torch.cat([tree.prompts[prompt].expand(tree.size, -1), torch.from_numpy(tokens)], 1)
        logits, total = model(rows).logits.detach() / 0.7, torch.zeros(tree.size)
        for place in range(3):
            node = prompt * tree.width**place + numbers // tree.width ** (3 - place)
            choices = tree.choices[place][torch.from_numpy(node)]
            known = logits[:, 2 + place].gather(1, choices).log_softmax(-1)
            total += known[choices == rows[:, 3 + place, None]]
        np.testing.assert_allclose(law[prompt], total, atol=1e-5)
    some = np.array([3, 17, 64, 100])
    found = tree.log_probs(model.model, model.lm_head.weight, tree.path(some)).detach()
    np.testing.assert_allclose(found, law.ravel()[some], atol=1e-5)


def test_cached_states_give_the_same_law() -> None:
    """The last layers behind states that were read once, and the whole model."""
    model, tree = tiny(layers=3)
    whole = tree.law(model.model, model.lm_head.weight)
    policy = make_policy(model, tree, 1, lambda _: (np.zeros((2, 16)), np.zeros((2, 16))))
    np.testing.assert_allclose(np.log(policy.laws.reference), whole, atol=1e-5)
    assert 0 < len(policy.weights) < len(list(model.parameters()))


@pytest.mark.parametrize(("name", "pick"), [("best of 4", max), ("worst of 4", min)])
def test_win_rates_are_those_of_all_draws(name: str, pick: Any) -> None:
    """Every four draws of four completions, the selected one by the reward with ties at random, every pair judged."""
    laws = make_laws(1, 4)
    d = np.array([[0.3, -0.5, 0.2, 0.1]])
    point = laws.point(1.0, d)
    law = laws.reference * np.exp(d) / (laws.reference * np.exp(d)).sum()
    selected = []
    for own in (law[0], laws.reference[0]):
        mass = np.zeros(4)
        for four in itertools.product(range(4), repeat=4):
            best = pick(laws.reward[0][list(four)])
            tied = [i for i in four if laws.reward[0][i] == best]
            for i in tied:
                mass[i] += np.prod(own[list(four)]) / len(tied)
        selected.append(mass)
    for judge, scores in zip(JUDGES, (laws.reward[0], laws.judge[0]), strict=True):
        wins = (scores[:, None] > scores) + (scores[:, None] == scores) / 2
        assert point.rates[judge][name][0] == pytest.approx(selected[0] @ wins @ selected[1], abs=1e-12)
    assert point.kl[0] == pytest.approx((law * np.log(law / laws.reference)).sum())


def test_targets_are_those_of_infinitely_many_rollouts() -> None:
    """The law's targets have mean 1 and the KL; those of many rollouts come near them; counts are weights."""
    laws = make_laws(size=32)
    exact = laws.targets("identity", 0.3).log_ratios
    np.testing.assert_allclose((laws.reference * np.exp(exact)).sum(1), 1.0)
    assert (laws.reference * np.exp(exact) * exact).sum(1).mean() == pytest.approx(0.3, abs=1e-6)
    rollouts = Rollouts.draw(laws, 20_000, seed=0)
    assert (rollouts.train.sum(1) == 16_000).all()
    assert (rollouts.check.sum(1) == 4_000).all()
    found = rollouts.targets(laws, "identity", 0.3)
    np.testing.assert_allclose(found, exact.ravel()[rollouts.drawn], atol=0.1)
    counts = rollouts.train + rollouts.check
    np.testing.assert_allclose(rollouts.weights(counts) @ np.exp(found), len(laws.reference))
    with pytest.raises(ValueError, match="whose reward changes with the policy"):
        compute_targets("iama:4", laws.reward, 0.3)


def test_training_on_the_law_ends_at_the_optimum() -> None:
    """The network's log-ratios go to the targets, and the gradient with them to 0."""
    policy = make_tiny_policy()
    batch = Batch.from_law(policy, "raw", 0.3)
    before = compute_gradient(policy, batch).norm()
    trained, about = train(policy, batch, Settings(steps=80, rate=0.03))
    policy.set_weights(trained)
    assert policy.laws.correlate(policy.log_ratios(), policy.laws.targets("raw", 0.3).log_ratios).mean() > 0.98
    assert compute_gradient(policy, batch).norm() < before / 10
    policy.set_weights(trained, 0.0)
    np.testing.assert_allclose(policy.log_ratios(), 0.0, atol=1e-5)
    assert about["losses"][-1][0] < about["losses"][0][0]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Lines that are there are not run again, one that was cut off is."""
    policy, lines = make_tiny_policy(), tmp_path / "arms.jsonl"
    cases = [{"arm": "raw", "k": 256, "seed": seed} for seed in range(2)]
    whole = list(run_all(policy, lines, cases, Settings(steps=3)))
    assert [len(rows) for rows in whole] == [2, 2]  # the same list, which has grown
    first, second = lines.read_text().splitlines()
    lines.write_text(first + "\n" + second[:40] + "\n")
    again = [rows[-1] for rows in run_all(policy, lines, cases, Settings(steps=3))]
    assert len(again) == 1
    before = json.loads(second)
    assert again[0]["own"]["kl"] == pytest.approx(before["own"]["kl"], abs=1e-6)
    assert (again[0]["seed"], again[0]["kept"]) == (1, before["kept"])


def make_point(rate: float, kl: float = 0.5) -> Point:
    """A point with one win rate everywhere."""
    names = ("best of 16", "best of 32", "worst of 4", "worst of 16")
    return Point(1.0, np.full(2, kl), {judge: {name: np.full(2, rate) for name in names} for judge in JUDGES})


def test_shares_are_gains_over_the_best_other_arm() -> None:
    """Two seeds whose best other arm is another one each time; the gap is that to the best of the others' optima."""
    optima = {"raw": make_point(0.70), "identity": make_point(0.74), "worst-of:16": make_point(0.84)}
    rates = {
        0: {"raw": 0.66, "identity": 0.64, "worst-of:16": 0.70},
        1: {"raw": 0.60, "identity": 0.68, "worst-of:16": 0.74},
    }
    rows = [
        {"arm": arm, "k": 8, "seed": seed, "at": {"0.5": make_point(rate).to_json()}}
        for seed, own in rates.items()
        for arm, rate in own.items()
    ]
    (share,) = (
        row
        for row in compute_shares(rows, optima, 0.5)
        if (row["procedure"], row["judge"], row["against"]) == ("worst of 16", "judge", "best other")
    )
    assert share["gap"] == pytest.approx(0.10)
    assert share["share"]["value"] == pytest.approx((0.4 + 0.6) / 2)
    low, high = share["share"]["interval"]
    assert (high - low) / 2 == pytest.approx(12.7062 * 0.1, rel=1e-4)  # Student's t with 1 degree of freedom
    assert average(np.array([0.3]))["interval"] is None


def test_long_runs_are_compared_as_trained() -> None:
    """With the best other arm of each seed, at KLs that are told; the gap is that of the optima."""
    optima = {"raw": make_point(0.70), "identity": make_point(0.74), "worst-of:16": make_point(0.84)}
    points = [
        {"raw": make_point(0.66, 0.49), "identity": make_point(0.64), "worst-of:16": make_point(0.70, 0.51)},
        {"raw": make_point(0.60), "identity": make_point(0.68, 0.51), "worst-of:16": make_point(0.74, 0.53)},
    ]
    rows = [
        {"arm": arm, "seed": seed, "own": point.to_json()}
        for seed, own in enumerate(points)
        for arm, point in own.items()
    ]
    found = {(row["procedure"], row["judge"]): row for row in compare_as_trained(rows, optima)}
    row = found["worst of 16", "judge"]
    assert (row["seeds"], row["kl"]) == (2, pytest.approx([0.52, 0.50]))
    assert (row["gain"]["value"], row["gap"]) == (pytest.approx((0.04 + 0.06) / 2), pytest.approx(0.10))
    assert {arm["arm"] for arm in found.values()} == {"worst-of:16"}


def test_lines_are_read_at_a_kl() -> None:
    """Half-way between two points, both numbers are; a line that does not reach so far is refused."""
    line = [make_point(0.5, 0.0), make_point(0.7, 0.4)]
    point = interpolate(line, 0.2)
    assert point.rates["judge"]["worst of 4"].tolist() == pytest.approx([0.6, 0.6])
    with pytest.raises(ValueError, match="below and above"):
        interpolate(line, 0.5)


def test_weights_on_rollouts_agree_with_draws_of_the_optimum() -> None:
    """An optimum by weights on reference rollouts, and by draws of them in proportion; compared, its share is 1."""
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(3, 600))
    references = Samples(reward, reward + rng.normal(size=reward.shape))
    optima = predict_optima(references, 0.3, ["raw", "identity", "exp:10"])
    targets = compute_targets("exp:10", reward, 0.3).log_ratios
    weighed = weigh(1.0, targets, references)
    drawn = [rng.choice(600, 20_000, p=np.exp(row) / np.exp(row).sum()) for row in targets]
    fresh = Samples(
        *([row[i] for row, i in zip(of, drawn, strict=True)] for of in (references.select, references.judge))
    )
    point = measure(1.0, fresh, references, weighed.kl)
    for judge, name in itertools.product(JUDGES, ("one draw", "best of 4", "worst of 16")):
        assert point.rates[judge][name].mean() == pytest.approx(weighed.rates[judge][name].mean(), abs=0.01)
        assert weighed.rates[judge][name].mean() == pytest.approx(optima["exp:10"].rates[judge][name].mean(), abs=1e-3)
    other = choose_best_other(optima, "best of 4", "reward")
    assert other == max(("raw", "identity"), key=lambda arm: optima[arm].rates["reward"]["best of 4"].mean())
    assert compare(optima, optima, "exp:10", other, "best of 4", "reward")["share"] == pytest.approx(1.0)


def test_world_4_averages_the_paired_gains_of_its_seeds(tmp_path: Path) -> None:
    """Gains are means over seeds of what `compare_held_out` says; that of the optima themselves has a share of 1."""
    rng = np.random.default_rng(5)
    references = Samples(rng.normal(size=(12, 32)), rng.normal(size=(12, 32)))
    names = ("worst-of:4", "raw")
    bench: Any = SimpleNamespace(
        references=references,
        world=held_out_prompts.World(kl=0.2),
        place=lambda arm, seed, ending: tmp_path / f"{arm}-{seed}.{ending}",
    )
    fresh = {"rates": {"judge": {name: rng.uniform(size=12).tolist() for name in held_out_prompts.NAMES}}}
    beside = {"factor": 1.0, "kl_dev": 0.2, "correlation": 0.5, "training_seconds": 1, "seconds": 1, "fresh": fresh}
    rows = [{"arm": name, "seed": seed, **beside} for name in names for seed in (0, 1)]
    optima = {name: compute_targets(name, np.stack(references.select), 0.2).log_ratios for name in names}
    for name in names:
        np.save(tmp_path / f"{name}-0.npy", optima[name])
        np.save(tmp_path / f"{name}-1.npy", 0.5 * optima[name])

    rows = held_out_prompts.summarise(bench, rows)["gains"]
    assert [row["procedure"] for row in rows] == [*held_out_prompts.NAMES]
    (row,) = (row for row in rows if row["procedure"] == "worst of 4")
    by_seed = [
        compare_held_out({"raw": scale * optima["raw"], "mine": scale * optima["worst-of:4"]}, references, [WorstOf(4)])
        .gain("mine", "raw", WorstOf(4))
        .value
        for scale in (1.0, 0.5)
    ]
    assert [each[0] for each in row["by_seed"]] == pytest.approx(by_seed)
    assert row["gain"]["value"] == pytest.approx(np.mean(by_seed))
    assert row["gap"] == pytest.approx(by_seed[0])
    assert row["fresh"]["value"] == 0


def test_a_mixture_is_a_policy_of_its_two_parts() -> None:
    """Its probabilities are those of the parts, p of the far one, and `find_share` finds the p of a KL."""
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(8, 64))
    far = compute_targets("raw", scores, 1.5).log_ratios
    mixed = mixtures.mix(far, 0.3)
    assert np.exp(mixed) == pytest.approx(0.7 + 0.3 * np.exp(far))
    line: Any = SimpleNamespace(measure_kl=lambda log_ratios: check_log_ratios(log_ratios, Samples(scores)).kl.value)
    p = mixtures.find_share(line, far, 0.25)
    weights = 1 - p + p * np.exp(far)
    assert 0 < p < 1
    assert (weights * np.log(weights) - weights + 1).mean() == pytest.approx(0.25)


def test_rated_tweets_are_read_without_names_and_links(tmp_path: Path) -> None:
    """A rating is the mean over people: -4 for hate speech, -2 for offensive, 0 for neither."""
    (tmp_path / "tweets.csv").write_text(
        ",count,hate_speech,offensive_language,neither,class,tweet\n"
        '0,3,0,0,3,2,"!!! RT @one: nice &amp; kind words, @two http://t.co/x"\n'
        "1,4,2,1,1,0,four people said so\n"
        "2,3,3,0,0,0,too short\n"
    )
    texts = {each.text: each.rating for each in harmlessness.read_tweets(tmp_path / "tweets.csv")}
    assert texts == {"nice & kind words,": 0.0, "four people said so": -(2 * 4 + 1 * 2) / 4}


def make_world_of_pilots() -> dict[str, Any]:
    """Two sizes of one comparison: levels and shares that follow the noise exactly, with no limit."""
    optima = {"raw": 0.7, "identity": 0.72, "best-of:16": 0.9}
    known = {128: {"raw": 0.4, "identity": 0.3, "best-of:16": 0.5}}
    # Correlations of signal and noise: K times the completions divide the noise's variance by K.
    known[1024] = {arm: 1 / np.sqrt(1 + (1 / s**2 - 1) / 8) for arm, s in known[128].items()}
    levels = {k: {arm: 0.5 + s * (optima[arm] - 0.5) for arm, s in own.items()} for k, own in known.items()}
    arms, shares = [], []
    for k, own in levels.items():
        arms += [{"arm": a, "k": k, "at 0.5": {"win_rates": {"judge": {"best of 16": w}}}} for a, w in own.items()]
        gain = own["best-of:16"] - max(own["raw"], own["identity"])
        row = {"arm": "best-of:16", "k": k, "kl": 0.5, "procedure": "best of 16", "judge": "judge", "seeds": 5}
        row |= {"against": "best other", "gap": 0.18, "share": {"value": gain / 0.18}}
        shares.append({**row, "gain": {"value": gain, "interval": [gain - 0.001, gain + 0.001]}})
    judged = {arm: {"judge": {"best of 16": rate}} for arm, rate in optima.items()}
    return {"optima": {"0.5": judged}, "arms": arms, "shares": shares}


def test_predictions_from_a_pilot() -> None:
    """Where only noise separates the sizes, one prediction is exact and the other one the pilot's gain."""
    world = make_world_of_pilots()
    (row,) = predict.compare_same_prompts(world)
    assert row["predicted"]["less noise"] == pytest.approx(row["trained"])
    assert row["predicted"]["same share"] == pytest.approx(world["shares"][0]["gain"]["value"])
    assert row["inside"] == {"same share": False, "less noise": True, "noise and a limit": None}
    for level in predict.predict_levels(world):
        assert level["predicted"]["less noise"] == pytest.approx(level["trained"])
    summary = predict.summarise([row])
    assert (summary["less noise"]["inside"], summary["same share"]["inside"]) == (1, 0)
    assert summary["same share"]["error"] == pytest.approx(100 * (row["predicted"]["same share"] - row["trained"]))


def test_a_second_pilot_tells_the_limit() -> None:
    """Levels whose noise falls to a limit of the arm's own: exact, where noise alone foretells too much."""
    world, limits = make_world_of_pilots(), {"raw": 1.2, "identity": 2.0, "best-of:16": 1.5}
    world["arms"] = [
        {"arm": arm, "k": k, "at 0.5": {"win_rates": {"judge": {"best of 16": 0.5 + share * (rate - 0.5)}}}}
        for k in (16, 128, 1024)
        for arm, by_judge in world["optima"]["0.5"].items()
        for rate in by_judge["judge"].values()
        for share in [(limits[arm] + 60 / k) ** -0.5]
    ]
    levels = [level for level in predict.predict_levels(world) if level["k"] == 1024]
    assert len(levels) == 3
    for level in levels:
        assert level["predicted"]["noise and a limit"] == pytest.approx(level["trained"])
        assert level["predicted"]["less noise"] > level["trained"] + 0.001
    (row,) = predict.compare_same_prompts(world)
    own, *others = (level["trained"] for level in sorted(levels, key=lambda level: level["arm"]))
    assert row["predicted"]["noise and a limit"] == pytest.approx(own - max(others))


def test_less_noise_is_what_simulated_noise_gives() -> None:
    """The part of the target in a log-ratio of fixed length, with noise and with an eighth of its variance."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=4000)
    target -= target.mean()

    def simulate(variance: float) -> float:
        learned = target + rng.normal(scale=np.sqrt(variance), size=(50, 4000))
        learned *= np.linalg.norm(target) / np.linalg.norm(learned, axis=1, keepdims=True)
        return float((learned @ target).mean() / (target @ target))

    assert predict.grow(simulate(4.0), 8) == pytest.approx(simulate(0.5), abs=0.01)


def test_held_out_pilots_are_compared_seed_by_seed() -> None:
    """Only seeds that both runs have; the share of the pilot's gap is that of the longer run's."""
    case = {"arm": "worst-of:16", "other": "raw", "procedure": "worst of 4"}
    before = {**case, "seeds": [0, 1], "gap": 0.1, "by_seed": [[0.02, 0, 0], [0.03, 0, 0]]}
    after = {**case, "seeds": [1, 2], "gap": 0.2, "by_seed": [[0.07, 0.05, 0.09], [0.0, 0, 0]]}
    runs = ({"gains": [{**each, "fresh_by_seed": each["by_seed"]}]} for each in (before, after))
    rows = list(predict.compare_held_out(*runs))
    assert [row["seed"] for row in rows] == [1, 1]
    assert rows[0]["predicted"]["same share"] == pytest.approx(0.06)
    assert rows[0]["inside"]["same share"]

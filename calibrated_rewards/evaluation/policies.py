"""Evaluation of trained policies: draw completions, score them, and compare win rates and KL with the reference.

Everything is stored in one directory, as in calibration, and a killed run continues where it stopped. A measured KL is
cached beside the rollouts, in `divergence/00000.parquet` for the shard of that name.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> evaluation = evaluate({"same": NumberSampler()}, NumberSampler(), ["2+2=", "Hi"], {"reward": NumberScorer()}, m=8)
>>> evaluation.policies[0].win_rates["reward"]["BestOf(n=4)"].prompts
2
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from tqdm import tqdm

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import read_table
from calibrated_rewards.calibration.sources import prompts_from
from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate, Samples, difference
from calibrated_rewards.evaluation.results import Comparison, Evaluation, PolicyResult, Precision
from calibrated_rewards.evaluation.win_rate import win_rate
from calibrated_rewards.evaluation.wording import format_procedure, plain_prompts_note
from calibrated_rewards.files import Message, check_folder_name, replace_file, setting
from calibrated_rewards.prompts import Completion, Prompt, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Rollout, Sampler
from calibrated_rewards.scorers.protocol import Scorer, fingerprint
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf

logger = logging.getLogger(__name__)
REFERENCE = "reference"
# Policies share their seeds, so that a difference of two is less noisy; the reference has others, or completions of a
# policy near it would be its own, and would not be independent.
SEED_OFFSET = 2**32
Measure = Callable[[Sequence[Prompt], Sequence[Sequence[Rollout]]], Sequence[Sequence[Any]]]
"""For each rollout of each prompt its KL, and whether its text makes as many tokens as were drawn."""
_MODELS = b"calibrated-rewards divergence"
_CACHE = pa.schema([("key", pa.binary(16)), ("number", pa.int32()), ("kl", pa.float64()), ("as_drawn", pa.bool_())])


@runtime_checkable
class KnowsPrecision(Protocol):
    """A measure of KL that reports its numerical precision."""

    def precision(self) -> Precision:
        """Return the dtype that its models are read in, and the rounding that they differ by if that is all."""


@dataclass(frozen=True)
class Responses:
    """Tokens and scores of m completions of each prompt."""

    tokens: Float[np.ndarray, "P m"]
    """nan where the sampler does not count them."""
    scores: Mapping[str, Float[np.ndarray, "P m"]]
    empty: int = 0
    """Completions without a text, or with nothing but white space."""


def evaluate(
    policies: Mapping[str, Sampler],
    reference: Sampler,
    prompts: Any,
    scorers: Mapping[str, Scorer],
    out: str | os.PathLike[str] | None = None,
    *,
    m: int = 32,
    seed: int = 1,
    select: str | None = None,
    procedures: Sequence[Procedure] = (Standard(), BestOf(4), WorstOf(4)),
    divergence: Mapping[str, Measure] | None = None,
    prompts_per_shard: int = 32,
    show_progress: bool = True,
    **source: Any,
) -> Evaluation:
    """Draw m completions of each prompt from each policy and from the reference, score them, and compare.

    Best-of-N and worst-of-N select by the scorer `select`, by default the first, and each scorer judges what was
    selected. Win rates are over the reference under the same procedure, by U-statistics; intervals are for all
    prompts like these, so they need prompts that the policies were not trained on. `prompts` is whatever `calibrate`
    takes, with its options.

    `divergence` has a measure of KL for each policy that gets one; by default all that are transformers models do, if
    the reference is one too. With `out` everything is stored there, a run of `calibrate` for each policy and
    `evaluation.json`: the same call continues where it stopped, a larger m or another scorer adds what is missing.

    The seed is another one than calibration's: a policy has been trained to beat the very references of its table, and
    has to be compared with new ones.
    """
    m = int(m) if isinstance(m, np.integer) else m
    _check(policies, scorers, select, procedures, m, out)
    rows = [*prompts_from(prompts, **source)]
    if not rows:
        raise ValueError("evaluate needs prompts, got none")
    by_key = {prompt_key(row.prompt): row.prompt for row in rows}
    plain = _count_plain_prompts(by_key, reference)
    if plain:
        logger.warning("%s", plain_prompts_note(plain, len(by_key)))
    settings = {"k": m, "prompts_per_shard": prompts_per_shard, "show_progress": show_progress}
    with TemporaryDirectory() as folder:
        path = Path(folder if out is None else out)
        calibrate(rows, reference, dict(scorers), path / REFERENCE, seed=seed, **settings)

        def measure(name: str, policy: Sampler) -> _MeasuredKL | None:
            calibrate(rows, policy, dict(scorers), path / name, seed=seed + SEED_OFFSET, **settings)
            kl = _find_measure(policy, reference) if divergence is None else divergence.get(name)
            if kl is None:
                return None
            values, not_as_drawn = measure_kl(path / name, by_key, kl, m, show_progress)
            return _MeasuredKL(values, not_as_drawn, kl.precision() if isinstance(kl, KnowsPrecision) else None)

        # A mapping may load a policy when it is read; no name here holds it while the next one is loaded.
        kls = {name: measure(name, policies[name]) for name in policies}
        responses = {name: read_responses(path / name, by_key, [*scorers], m) for name in (REFERENCE, *policies)}
    evaluation = replace(_compare(responses, kls, select or next(iter(scorers)), procedures), plain_prompts=plain)
    if out is not None:
        evaluation.save(Path(out) / "evaluation.json")
    return evaluation


def _check(policies: Any, scorers: Any, select: str | None, procedures: Any, m: Any, out: Any) -> None:
    procedures = procedures if isinstance(procedures, Sequence) else ()
    if not (isinstance(policies, Mapping) and isinstance(scorers, Mapping) and policies and scorers and procedures):
        raise ValueError("evaluate needs policies and scorers, each by its name, and procedures, got none of one")
    for name in policies:
        check_folder_name(name, "a policy", (REFERENCE, "evaluation.json"))
    if select is not None and select not in scorers:
        value = setting("select", repr(select))
        raise ValueError(Message(f"the scorers are {', '.join(scorers)}, and one of them selects; got {value}"))
    for each in procedures:
        if not isinstance(each, Procedure):
            raise TypeError(f"evaluate needs procedures as BestOf(4) is one, got {each!r:.60}")
    if not isinstance(m, int) or isinstance(m, bool):
        raise TypeError(f"evaluate needs a whole m, got m={m!r:.60}")
    largest = max(procedures, key=lambda each: each.draws)
    if m < max(1, largest.draws):
        rule = f"{format_procedure(largest)} needs {max(1, largest.draws)} completions of each prompt or more"
        raise ValueError(f"{rule}, got {m}: draw more (m), or take a smaller N")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"evaluate needs a folder to keep all in, got out={str(out)!r}, a file")


def _count_plain_prompts(prompts: Mapping[bytes, Prompt], reference: Sampler) -> int:
    """Count the prompts that are text although the reference has a chat template, which it does not use for text."""
    plain = sum(isinstance(prompt, str) for prompt in prompts.values())
    text = fingerprint(reference).get("text") if plain else None
    unused = isinstance(text, Mapping) and text.get("template") is not None and not text.get("chat")
    return plain if unused else 0


def _find_measure(policy: Sampler, reference: Sampler) -> Measure | None:
    # Without torch there is nothing that has log-probabilities, and no need to load it.
    if "torch" not in sys.modules:
        return None
    from calibrated_rewards.evaluation.kl import build_divergence

    return build_divergence(policy, reference)


@dataclass(frozen=True)
class _MeasuredKL:
    """The KL of each completion of a policy."""

    values: Float[np.ndarray, "P m"]
    not_as_drawn: int
    precision: Precision | None

    def mean(self) -> IntervalEstimate:
        """Average it; for one model saved in two dtypes the interval begins at 0, for the rest may be rounding."""
        mean = _mean(self.values).clip(0.0, np.inf)
        rounded = self.precision is not None and self.precision.rounding is not None
        return replace(mean, low=0.0) if rounded and mean.low is not None else mean


def _compare(
    responses: Mapping[str, Responses],
    kls: Mapping[str, _MeasuredKL | None],
    select: str,
    procedures: Sequence[Procedure],
) -> Evaluation:
    """Compute win rates over the reference by each judge, and the differences of each two policies."""
    samples = {
        name: {judge: Samples(each.scores[select], scores) for judge, scores in each.scores.items()}
        for name, each in responses.items()
    }
    wins = {
        name: {
            judge: {
                repr(procedure): win_rate(pool, samples[REFERENCE][judge], procedure, jackknife=False)
                for procedure in procedures
            }
            for judge, pool in samples[name].items()
        }
        for name in kls
    }
    differences = (
        Comparison(a, b, judge, how, IntervalEstimate.of(difference(rate, wins[b][judge][how])).clip(-1.0, 1.0))
        for a, b in combinations(wins, 2)
        for judge, rates in wins[a].items()
        for how, rate in rates.items()
    )
    return Evaluation(
        reference=_summarize(REFERENCE, responses[REFERENCE], {}, None),
        policies=tuple(_summarize(name, responses[name], wins[name], kl) for name, kl in kls.items()),
        differences=tuple(differences),
        selected_by=select,
        prompts=len(responses[REFERENCE].tokens),
        completions=responses[REFERENCE].tokens.shape[1],
    )


def _summarize(
    name: str, responses: Responses, wins: Mapping[str, Mapping[str, Estimate]], kl: _MeasuredKL | None
) -> PolicyResult:
    return PolicyResult(
        name,
        None if kl is None else kl.mean(),
        None if np.isnan(responses.tokens).any() else _mean(responses.tokens).clip(0.0, np.inf),
        {judge: _mean(scores) for judge, scores in responses.scores.items()},
        {
            judge: {how: IntervalEstimate.of(rate).clip(0.0, 1.0) for how, rate in rates.items()}
            for judge, rates in wins.items()
        },
        0 if kl is None else kl.not_as_drawn,
        None if kl is None else kl.precision,
        responses.empty,
    )


def _mean(values: Float[np.ndarray, "P m"]) -> IntervalEstimate:
    """Average over prompts the means of their completions."""
    return IntervalEstimate.of(Estimate(values.mean(axis=1)))


def read_responses(path: Path, prompts: Mapping[bytes, Prompt], scorers: Sequence[str], m: int) -> Responses:
    """Read the first m completions of these prompts, in this order; ValueError if a run has fewer."""
    tokens: dict[bytes, list[float]] = {}
    scores: dict[str, dict[bytes, npt.NDArray[np.float32]]] = {name: {} for name in scorers}
    directory, empty = RunDirectory(path), 0
    for name in directory.names():
        shard = directory.load(name)
        for i, planned in enumerate(shard.prompts):
            rollouts = shard.rollouts[i][:m]
            if planned.key in prompts:
                empty += sum(_is_empty(rollout.completion) for rollout in rollouts)
            tokens[planned.key] = [np.nan if r.tokens is None else float(r.tokens) for r in rollouts]
            for scorer in shard.scores.keys() & {*scorers}:
                scores[scorer][planned.key] = shard.scores[scorer][i][:m]
    arrays = {scorer: _stack(f"{path}, {scorer}", rows, prompts, m) for scorer, rows in scores.items()}
    return Responses(_stack(str(path), tokens, prompts, m), arrays, empty)


def _is_empty(completion: Completion) -> bool:
    messages: Any = [{"content": completion}] if isinstance(completion, str) else completion
    return not any(str(each.get("content") or "").strip() for each in messages)


def measure_kl(
    path: Path, prompts: Mapping[bytes, Prompt], measure: Measure, m: int, show_progress: bool = True
) -> tuple[Float[np.ndarray, "P m"], int]:
    """Measure the KL of the first m completions, and count those of which other tokens were read than drawn."""
    rows: dict[bytes, list[tuple[float, bool]]] = {}
    directory, models = RunDirectory(path), json.dumps(fingerprint(measure), sort_keys=True)
    hidden = None if show_progress else True
    with tqdm(total=len(prompts), desc="KL", unit=" prompts", delay=3, leave=False, disable=hidden) as bar:
        for name in directory.names():
            keys = [key for key in directory.keys_of(name) if key in prompts]
            file = path / "divergence" / f"{name}.parquet"
            cache = _read_cache(file, models)
            if any(len(cache.get(key, [])) < m for key in keys):
                shard = directory.load(name)
                pairs = [pair for pair in zip(shard.prompts, shard.rollouts, strict=True) if pair[0].key in prompts]
                cached = [cache.setdefault(planned.key, []) for planned, _ in pairs]
                # Of the whole shard in one call, for which the models change their precision once.
                missing = [rollouts[len(row) : m] for row, (_, rollouts) in zip(cached, pairs, strict=True)]
                measured = measure([planned.prompt for planned, _ in pairs], missing)
                for row, more in zip(cached, measured, strict=True):
                    row += [(float(kl), bool(same)) for kl, same in more]
                _write_cache(file, models, cache)
            bar.update(len(keys))
            rows |= {key: cache[key][:m] for key in keys}
    kl = _stack(f"the KL of {path}", {key: [kl for kl, _ in row] for key, row in rows.items()}, prompts, m)
    return kl, sum(not same for key in prompts for _, same in rows[key])


def _stack(name: str, rows: Mapping[bytes, Any], prompts: Mapping[bytes, Prompt], m: int) -> Float[np.ndarray, "P m"]:
    for key, prompt in prompts.items():
        if len(rows.get(key, [])) != m:
            raise ValueError(
                f"an evaluation needs m={m} completions of each prompt, scored; {name} has {len(rows.get(key, []))} "
                f"for {start_of(prompt)}: make the same call again, or give another directory"
            )
    return np.array([rows[key] for key in prompts], np.float64)


def _read_cache(file: Path, models: str) -> dict[bytes, list[tuple[float, bool]]]:
    """Read the KLs that were measured with the same two models."""
    cache: dict[bytes, list[tuple[float, bool]]] = {}
    table = read_table(file) if file.exists() else None
    if table is not None and (table.schema.metadata or {}).get(_MODELS) == models.encode():
        for row in table.to_pylist():
            cache.setdefault(row["key"], []).append((row["kl"], row["as_drawn"]))
    return cache


def _write_cache(file: Path, models: str, cache: Mapping[bytes, Sequence[tuple[float, bool]]]) -> None:
    rows = [
        {"key": key, "number": number, "kl": kl, "as_drawn": same}
        for key, row in cache.items()
        for number, (kl, same) in enumerate(row)
    ]
    with replace_file(file) as handle:
        table = pa.Table.from_pylist(rows, _CACHE.with_metadata({_MODELS: models}))
        pq.write_table(table, handle, compression="zstd")

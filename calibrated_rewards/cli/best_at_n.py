"""`calibrated-rewards best-at-n`: read validation completions, print unbiased best@N, worst@N and pass@N by step."""

import argparse
import json
import sys
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli.options import Whole

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.estimates import IntervalEstimate
    from calibrated_rewards.evaluation.validation_dumps import DumpedStep

EPILOG = """examples:
  calibrated-rewards best-at-n validation/ --n 1 4 16            # verl: trainer.validation_data_dir=validation
  calibrated-rewards best-at-n validation/40.jsonl --score acc
  calibrated-rewards best-at-n run/completions/ --threshold 0.5 --json   # TRL: log_completions=True

best@N and worst@N are the expected highest and lowest score of N completions, pass@N the chance that one or more of N
reach the threshold: averages over all choices of N of a prompt's completions, without replacement, so unbiased. Of
scores 0 and 1, best@N is pass@N. The intervals (95 %) resample prompts. `bootstrap` is best@N with replacement, which
verl logs as val-core/.../best@N/mean up to its own noise: it is too low, for a resample of n completions holds only
some of them. Exit code: 0 printed, 2 the dump cannot be read."""


def parse_threshold(text: str) -> float:
    """Parse a finite number, or raise argparse's error."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not isfinite(number):
        raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `best-at-n`."""
    parser.add_argument("dump", help="a file, or the folder with the files of all steps")
    text = "N to report (1, 2, 4 ... and the smallest number of completions that a prompt has)"
    parser.add_argument("--n", type=Whole(1), nargs="+", metavar="N", help=text)
    text = "a completion passes from this score on (1 where all scores are 0 or 1; else no pass@N)"
    parser.add_argument("--threshold", type=parse_threshold, metavar="SCORE", help=text)
    parser.add_argument("--score", metavar="FIELD", help="the field to read (verl: score; TRL: the only reward)")
    parser.add_argument("--format", choices=["verl", "trl"], help="who wrote the dump (by the files' ending)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")


def run(options: argparse.Namespace) -> int:
    """Print a verdict, a table of all steps, and what the numbers are."""
    from calibrated_rewards.evaluation.validation_dumps import read_dump

    steps = read_dump(options.dump, options.format, score=options.score)
    rows = [row for step in steps.values() for row in estimate_step(step, options.n, options.threshold)]
    if options.json:
        plain = [{name: asdict(x) if hasattr(x, "prompts") else x for name, x in row.items()} for row in rows]
        sys.stdout.write(json.dumps({"rows": plain}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join([write_verdict(rows), "", *write_table(rows)]) + "\n")
    return 0


def estimate_step(step: "DumpedStep", ns: list[int] | None, threshold: float | None) -> list[dict[str, Any]]:
    """Estimate a step's numbers for each N; ValueError if a prompt has fewer completions."""
    from calibrated_rewards.evaluation.estimates import IntervalEstimate
    from calibrated_rewards.evaluation.pass_at_k import best_at_k, pass_at_k, worst_at_k

    ns = sorted({*(ns or [*(2**i for i in range(step.fewest.bit_length())), step.fewest])})
    if max(ns) > step.fewest:
        fewest = int(step.scores.sizes.argmin())
        raise ValueError(
            f"--n {max(ns)} needs as many completions of each prompt, got {step.fewest} at step {step.step} of "
            f"{str(step.prompts[fewest])[:60]!r}"
        )
    passes = 1.0 if threshold is None and step.binary else threshold
    rows = []
    for n in ns:
        estimates = {"best": best_at_k(step.scores, n), "worst": worst_at_k(step.scores, n)}
        if passes is not None:
            estimates["pass"] = pass_at_k(step.scores, n, threshold=passes)
        intervals = {name: IntervalEstimate.of(estimate) for name, estimate in estimates.items()}
        bounded = {"pass", *(estimates if step.binary else ())}
        intervals = {name: each.clip(0.0, 1.0) if name in bounded else each for name, each in intervals.items()}
        if step.binary and passes is not None and 0 < passes <= 1:
            intervals["pass"] = intervals["best"]  # the same number, but for rounding
        biased = best_at_k(step.scores, n, replacement=True).value
        counts = {"prompts": len(step.prompts), "completions": step.fewest}
        rows.append({"step": step.step, "n": n, **counts, **intervals, "threshold": passes, "bootstrap_best": biased})
    return rows


def write_verdict(rows: list[dict[str, Any]]) -> str:
    """Write the last step's best of the largest N in a sentence, with what a bootstrap makes of it."""
    from calibrated_rewards.evaluation.wording import format_count

    last = rows[-1]
    n, best, biased = last["n"], last["best"], last["bootstrap_best"]
    short = best.value - biased
    bias = f"; a bootstrap with replacement says {biased:.3f}, {short:.3f} too low" if short >= 0.0005 else ""
    many = f"{format_count(last['prompts'], 'prompt')} with {format_count(last['completions'], 'completion')} or more"
    name = f"best@{n} = pass@{n}" if last.get("pass") == best else f"best@{n}"
    return f"Step {last['step']}: {name} is {best}, from {many}{bias}."


def write_table(rows: list[dict[str, Any]]) -> list[str]:
    """Write a line for each step and N; best@N and pass@N, where they are the same, in one column."""
    is_same = all(row.get("pass") == row["best"] for row in rows)
    with_pass = not is_same and any("pass" in row for row in rows)
    best = "best@N = pass@N" if is_same else "best@N"
    head = ["step", "N", best, "worst@N", *(["pass@N"] if with_pass else []), "bootstrap best@N"]
    cells = [head]
    for row in rows:
        intervals: list[IntervalEstimate | str] = [row["best"], row["worst"]]
        intervals += [row.get("pass", "")] if with_pass else []
        cells.append([str(row["step"]), str(row["n"]), *map(str, intervals), f"{row['bootstrap_best']:.3f}"])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]

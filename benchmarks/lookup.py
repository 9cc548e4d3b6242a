"""How fast a reference table is built, opened and searched, beside the other ways to search it.

    python benchmarks/lookup.py                      # 1,000,000 prompts of 100 references, some minutes
    python benchmarks/lookup.py --prompts 20000      # a quick look
    python benchmarks/lookup.py --large              # 10,000,000 prompts: 4.4 GB of table and as much of temporary file

Times are medians; all routes are timed in one run, on the same queries. "warm" repeats one batch, "cold" takes other
rows every time. Building and opening are measured in processes of their own, so that their memory is theirs.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from environment import save

from calibrated_rewards.table.reference_table import ReferenceTable

FILLER = ("The quick brown fox jumps over the lazy dog while it rains. " * 9)[:492]
BATCHES = (64, 4096, 1_000_000)


def text(i: int) -> str:
    """A prompt of 500 characters."""
    return f"{i:08d}{FILLER}"


def prompt(i: int) -> Any:
    """Every other prompt is a text, every other a chat of one message."""
    return [{"role": "user", "content": text(i)}] if i % 2 else text(i)


def rows(prompts: int, k: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Rows in an order that is not that of the keys, made as they are asked for."""
    rng = np.random.default_rng(0)
    for first in range(0, prompts, 10_000):
        scores = rng.standard_normal((min(10_000, prompts - first), k), dtype=np.float32)
        yield from ((prompt(first + i), row) for i, row in enumerate(scores))


def peak_mib() -> float:
    """The most memory that this program has held so far; ru_maxrss would count the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def resident_mib() -> float:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_build(path: str, prompts: int, k: int) -> dict[str, float]:
    """Build a table on disk."""
    before, start, cpu = peak_mib(), time.perf_counter(), time.process_time()
    ReferenceTable.build(rows(prompts, k), path=path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib(), "imports_mib": before}


def measure_open(path: str, prompts: int, _k: int) -> dict[str, float]:
    """Open a table, and then check all of it."""
    ReferenceTable.build([("", [0.0])])  # what is imported and compiled once is not part of opening
    before, start = resident_mib(), time.perf_counter()
    table = ReferenceTable.load(path)
    milliseconds, added = (time.perf_counter() - start) * 1e3, resident_mib() - before
    start = time.perf_counter()
    ReferenceTable.load(path, verify=True)
    verified = time.perf_counter() - start
    assert len(table) == prompts
    return {"milliseconds": milliseconds, "added_mib": added, "verify_seconds": verified}


def searchsorted_loop(matrix: np.ndarray) -> Callable[..., Any]:
    """One np.searchsorted a query, and side."""

    def count(rows: np.ndarray, scores: np.ndarray) -> Any:
        sides = [
            (matrix[r].searchsorted(s), matrix[r].searchsorted(s, "right")) for r, s in zip(rows, scores, strict=True)
        ]
        left, right = np.array(sides).T
        return left, right - left

    return count


def flat_key(matrix: np.ndarray) -> Callable[..., Any]:
    """One global search in keys made of row number and score."""
    keys = (np.arange(len(matrix), dtype=np.uint64)[:, None] << np.uint64(32)) | ordered(matrix)
    flat, k = keys.ravel(), matrix.shape[1]

    def count(rows: np.ndarray, scores: np.ndarray) -> Any:
        wanted = (rows.astype(np.uint64) << np.uint64(32)) | ordered(scores)
        left = flat.searchsorted(wanted)
        return left - rows * k, flat.searchsorted(wanted, "right") - left

    return count


def ordered(scores: np.ndarray) -> np.ndarray:
    """Floats as integers of the same order."""
    bits = scores.view(np.int32)
    return np.where(bits < 0, ~bits, bits ^ np.int32(-(2**31))).view(np.uint32).astype(np.uint64)


def compare_and_count(matrix: np.ndarray) -> Callable[..., Any]:
    """Gather the rows, compare, add up; in chunks, or the gathered rows would not fit the cache."""

    def count(rows: np.ndarray, scores: np.ndarray) -> Any:
        parts = []
        for at in range(0, len(rows), 1024):
            gathered, wanted = matrix[rows[at : at + 1024]], scores[at : at + 1024, None]
            parts.append(((gathered < wanted).sum(1), (gathered == wanted).sum(1)))
        below, equal = zip(*parts, strict=True)
        return np.concatenate(below), np.concatenate(equal)

    return count


def binary_search(matrix: np.ndarray) -> Callable[..., Any]:
    """The vectorised binary search on the whole batch at once, and twice."""
    flat, k = matrix.ravel(), matrix.shape[1]

    def side(rows: np.ndarray, scores: np.ndarray, before: np.ufunc) -> np.ndarray:
        base, window = rows * k, k
        while window > 1:
            half = window >> 1
            base = base + before(flat[base + half - 1], scores) * half
            window -= half
        return base - rows * k + before(flat[base], scores)

    def count(rows: np.ndarray, scores: np.ndarray) -> Any:
        below = side(rows, scores, np.less)
        return below, side(rows, scores, np.less_equal) - below

    return count


def numba_binary(matrix: np.ndarray, parallel: bool) -> Callable[..., Any]:
    """The same search compiled, one query after the other or on all cores."""
    import numba

    @numba.njit(parallel=parallel, boundscheck=False)
    def search(
        flat: np.ndarray, k: int, rows: np.ndarray, scores: np.ndarray, below: np.ndarray, equal: np.ndarray
    ) -> None:
        for i in numba.prange(len(rows)):
            start, wanted = rows[i] * k, scores[i]
            base, upto, window = start, start, k
            while window > 1:
                half = window >> 1
                base += half if flat[base + half - 1] < wanted else 0
                upto += half if flat[upto + half - 1] <= wanted else 0
                window -= half
            below[i] = base - start + (flat[base] < wanted)
            equal[i] = upto - start + (flat[upto] <= wanted) - below[i]

    flat, k = matrix.ravel(), matrix.shape[1]

    def count(rows: np.ndarray, scores: np.ndarray) -> Any:
        below, equal = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        search(flat, k, rows, scores, below, equal)
        return below, equal

    return count


def median_ns(route: Callable[..., Any], batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The median time a query."""
    times = []
    for rows, scores in batches:
        start = time.perf_counter()
        route(rows, scores)
        times.append((time.perf_counter() - start) / len(rows) * 1e9)
    return statistics.median(times)


def measure_ranks(table: ReferenceTable) -> dict[str, dict[str, float]]:
    """Nanoseconds a query of our route alone, where a copy of the table for the others would not fit in memory."""
    rng, times = np.random.default_rng(1), {}
    for size in BATCHES:
        batches = [(rng.integers(0, len(table), size), rng.normal(size=size).astype(np.float32)) for _ in range(6)]
        table.ranks(*batches[0])
        times[f"cold {size}"] = median_ns(table.ranks, batches[1:])
        times[f"warm {size}"] = median_ns(table.ranks, [batches[1]] * 5)
    return {"ReferenceTable.ranks": times}


def measure_routes(table: ReferenceTable, k: int) -> dict[str, dict[str, float]]:
    """Nanoseconds a query of every route, after checking that all of them count the same."""
    rng = np.random.default_rng(1)
    matrix = np.concatenate([block for _, block in table.blocks(np.arange(len(table)))])
    routes = {
        "ReferenceTable.ranks": table.ranks,
        "searchsorted loop": searchsorted_loop(matrix),
        "flat key": flat_key(matrix),
        "compare and count": compare_and_count(matrix),
        "binary search, not chunked": binary_search(matrix),
        "numba, one core": numba_binary(matrix, parallel=False),
        "numba, all cores": numba_binary(matrix, parallel=True),
    }
    results: dict[str, dict[str, float]] = {name: {} for name in routes}
    for size in BATCHES:
        batches = [(rng.integers(0, len(table), size), rng.normal(size=size).astype(np.float32)) for _ in range(31)]
        batches = batches[: 31 if size < 10**5 else 5]
        batches[0][1][::2] = matrix[batches[0][0][::2], k // 2]  # ties
        wanted = table.ranks(*batches[0])
        for name, route in routes.items():
            if name == "searchsorted loop" and size > 10**5:
                continue
            got = route(*batches[0])  # compiles, too
            assert np.array_equal(np.stack(got), np.stack(wanted)), name
            results[name][f"cold {size}"] = median_ns(route, batches[1:])
            results[name][f"warm {size}"] = median_ns(route, [batches[1]] * len(batches))
    return results


def measure_keys(table: ReferenceTable) -> dict[str, float]:
    """Microseconds from a prompt of 500 characters to its row, 4096 at a time, by the clock and of the processor."""
    rng, out = np.random.default_rng(2), {}
    for name, odd in (("text", 0), ("chat", 1)):
        times = []
        for _ in range(31):
            prompts = [prompt(int(i) * 2 + odd) for i in rng.integers(0, len(table) // 2, 4096)]
            start, cpu = time.perf_counter(), time.process_time()
            table.rows(prompts)
            times.append((time.perf_counter() - start, time.process_time() - cpu))
        by_clock, of_processor = np.median(times, axis=0) / 4096 * 1e6
        out |= {name: float(by_clock), f"{name}, cpu": float(of_processor)}
    return out


def in_subprocess(stage: str, path: str, prompts: int, k: int) -> dict[str, float]:
    """Run one of the measurements in a new process."""
    command = [sys.executable, __file__, "--stage", stage, "--dir", path, "--prompts", str(prompts), "--k", str(k)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def run(directory: str | None, prompts: int, k: int, routes: bool) -> dict[str, Any]:
    """All measurements of one size."""
    wanted = 2.3 * 4 * prompts * k + 100 * prompts
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        if shutil.disk_usage(folder).free < wanted:
            raise SystemExit(f"{folder} needs {wanted / 1e9:.1f} GB free")
        path = str(Path(folder) / "table")
        result: dict[str, Any] = {"prompts": prompts, "k": k}
        result["build"] = in_subprocess("build", path, prompts, k)
        result["open"] = in_subprocess("open", path, prompts, k)
        table = ReferenceTable.load(path)
        some = np.random.default_rng(3).integers(0, prompts, 64)
        start = time.perf_counter()
        table.ranks(some, np.zeros(64))
        result["first_batch_of_64_ms"] = (time.perf_counter() - start) * 1e3
        table.rows([prompt(0)])
        result["prompt_to_row_us"] = measure_keys(table)
        checked = ReferenceTable.load(path, verify=True)
        result["ns_per_query"] = measure_routes(checked, k) if routes else measure_ranks(checked)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a result as tables."""
    build, opened = result["build"], result["open"]
    print(f"{result['prompts']:,} prompts of {result['k']} references")
    print(
        f"  build  {build['seconds']:.1f} s ({build['cpu_seconds']:.1f} s cpu), "
        f"peak {build['peak_mib']:.0f} MiB, {build['imports_mib']:.0f} of it imports"
    )
    print(f"  open   {opened['milliseconds']:.2f} ms, +{opened['added_mib']:.2f} MiB")
    print(f"  verify {opened['verify_seconds']:.2f} s")
    print(f"  first 64 queries, with the checks of their blocks: {result['first_batch_of_64_ms']:.1f} ms")
    print("  500 characters to row: " + ", ".join(f"{n} {us:.2f} us" for n, us in result["prompt_to_row_us"].items()))
    columns = [f"{kind} {size}" for size in BATCHES for kind in ("warm", "cold")]
    print(f"\n  {'ns/query':28}" + "".join(f"{column:>14}" for column in columns))
    for name, times in result["ns_per_query"].items():
        print(f"  {name:28}" + "".join(f"{times.get(column, float('nan')):14.0f}" for column in columns))


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--large", action="store_true", help="also build, open and look up 10,000,000 prompts")
    parser.add_argument("--dir", help="where the tables go; a temporary directory by default; cleaned up")
    parser.add_argument("--stage", choices=("build", "open"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        measure = {"build": measure_build, "open": measure_open}[options.stage]
        print(json.dumps(measure(options.dir, options.prompts, options.k)))
        return
    results = [run(options.dir, options.prompts, options.k, routes=True)]
    show(results[0])
    if options.large:
        results.append(run(options.dir, 10_000_000, options.k, routes=False))
        show(results[1])
    print(save("lookup", results))


if __name__ == "__main__":
    main()

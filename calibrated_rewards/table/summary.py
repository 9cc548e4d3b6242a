"""Ten numbers about a table: its size, the resolution of its scores, and the distance between prompts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Float64, Int64

from calibrated_rewards.table.search import Content, blocks, sizes

_CHUNK_SCORES = 1 << 20
_POOLED_SCORES = 1 << 20
_COMPARED_PROMPTS = 4096


def describe(content: Content) -> dict[str, float]:
    """Describe a table in ten numbers, in memory that does not grow with the scores.

    - `prompts`; `references` in all, and `references_min`, `_median`, `_max` per prompt
    - `tied_share`: of the references that equal another one of their prompt
    - `prompts_without_resolution`: those whose references are all equal
    - `within_prompt_sd`: the mean standard deviation within a prompt; `between_prompts_sd`: that of the prompts' means
    - `kolmogorov_distance`: the mean over prompts of the largest gap between the prompt's distribution and that of all
      references pooled, which is what a raw score is miscalibrated by. With K references of one and the same
      distribution it is about 0.87 / sqrt(K). From 4,096 prompts or a million references on it is of a sample.
    """
    size = np.broadcast_to(sizes(content, np.arange(content.prompts)), content.prompts)
    columns = zip(*(_statistics(begins, scores) for begins, scores in _chunks(content, size)), strict=True)
    means, variances, tied, constant = map(np.concatenate, columns)
    return {
        "prompts": content.prompts,
        "references": content.total,
        "references_min": int(size.min()),
        "references_median": float(np.median(size)),
        "references_max": int(size.max()),
        "tied_share": int(tied.sum()) / content.total,
        "prompts_without_resolution": int(constant.sum()),
        "within_prompt_sd": float(np.sqrt(variances).mean()) if len(variances) else 0.0,
        "between_prompts_sd": float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        "kolmogorov_distance": _mean_distance(content),
    }


def _chunks(
    content: Content, size: Int64[np.ndarray, " P"]
) -> Iterator[tuple[Int64[np.ndarray, " edges"], Float32[np.ndarray, " _"]]]:
    """Yield runs of rows: the begins of each row with the end of the last, and their scores."""
    step = max(1, _CHUNK_SCORES * content.prompts // content.total)
    for first in range(0, content.prompts, step):
        ends = np.cumsum(size[first : first + step])
        yield np.append(0, ends), content.read(first, first + len(ends))


def _statistics(begins: Int64[np.ndarray, " edges"], scores: Float32[np.ndarray, " _"]) -> tuple[np.ndarray, ...]:
    """Return the mean of each row, the unbiased variance of each with K >= 2, and which scores tie, which rows do."""
    size = np.diff(begins)
    means = np.add.reduceat(scores, begins[:-1], dtype=np.float64) / size
    squares = np.add.reduceat((scores - np.repeat(means, size)) ** 2, begins[:-1])
    like_next = np.append(scores[1:] == scores[:-1], False)
    like_next[begins[1:] - 1] = False  # the next row's first score is no neighbour
    like_previous = np.append(False, like_next[:-1])
    constant = scores[begins[:-1]] == scores[begins[1:] - 1]
    several = size > 1
    variances = squares[several] / (size[several] - 1)
    return means, variances, like_next | like_previous, constant


def _mean_distance(content: Content) -> float:
    """Return the mean of sup |F_prompt - F_pooled|; keys are hashes, so every n-th prompt is a fair sample."""
    pooled_rows = _spread(content.prompts, max(1, _POOLED_SCORES * content.prompts // content.total))
    pooled = np.sort(np.concatenate([matrix.ravel() for _, matrix in blocks(content, pooled_rows)]))
    distances = [
        _distances(matrix, pooled) for _, matrix in blocks(content, _spread(content.prompts, _COMPARED_PROMPTS))
    ]
    return float(np.concatenate(distances).mean())


def _spread(prompts: int, most: int) -> Int64[np.ndarray, " _"]:
    return np.arange(prompts) if prompts <= most else np.linspace(0, prompts - 1, most).astype(np.int64)


def _distances(matrix: Float32[np.ndarray, "b K"], pooled: Float32[np.ndarray, " _"]) -> Float64[np.ndarray, " b"]:
    """Return Kolmogorov distances, which are largest at one of the row's scores or just before it."""
    k = matrix.shape[1]
    last = np.ones(matrix.shape, dtype=bool)
    last[:, :-1] = matrix[:, 1:] != matrix[:, :-1]
    first = np.ones(matrix.shape, dtype=bool)
    first[:, 1:] = last[:, :-1]
    at = np.searchsorted(pooled, matrix, side="right") / len(pooled)
    before = np.searchsorted(pooled, matrix, side="left") / len(pooled)
    place = np.arange(k)
    above = np.where(last, np.abs(at - (place + 1) / k), 0.0)
    below = np.where(first, np.abs(before - place / k), 0.0)
    return np.asarray(np.maximum(above, below).max(axis=1))

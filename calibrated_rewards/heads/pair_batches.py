"""Pairs as tokens, and batches of them: padded, or packed into rows of a window, each text attending to itself alone.

Packed rows hold several texts, whose positions begin anew: attention is kept inside each by transformers, which finds
the texts by their positions. `check_packing` makes sure of that on the model itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.data import Pair
from calibrated_rewards.heads.headed_model import HeadedModel
from calibrated_rewards.heads.turn_end import encode_turns
from calibrated_rewards.models.shared_prefix import cut, find_completion_starts

# Pairs that are tokenised in one call.
AT_ONCE = 512
# How near a packed text comes to the same text alone, as a part of the scores' spread.
NEAR = {torch.float32: 1e-3}
NEAR_16_BIT = 0.1


class EncodedPair(NamedTuple):
    """A pair as tokens that end in the end-of-turn token, and where its completions begin."""

    chosen: list[int]
    rejected: list[int]
    chosen_start: int = 0
    rejected_start: int = 0
    head: int = 0
    """The number of the head's score that learns from it."""
    task: str = ""
    reference: tuple[float, float] = (0.0, 0.0)
    """Log-probabilities of both completions under the reference, where the loss needs them."""
    states: tuple[Tensor, Tensor] | None = None
    """The hidden states at both ends, where they were computed once."""

    @property
    def tokens(self) -> int:
        """The number of tokens of both texts together."""
        return len(self.chosen) + len(self.rejected)


def encode_pairs(headed: HeadedModel, pairs: Sequence[Pair]) -> list[EncodedPair]:
    """Turn pairs into tokens, truncated to what the model reads; a prompt's beginning goes first."""
    names = {name: i for i, name in enumerate(headed.head.names)}
    if unknown := sorted({pair.head for pair in pairs} - {*names, ""}):
        named = sorted({pair.head or headed.head.names[0] for pair in pairs})
        more = setting("names", repr(tuple(named)), option=f"--heads {','.join(named)}")
        raise ValueError(
            Message(f"the head has the scores {', '.join(names)}, and pairs name {', '.join(unknown)}: say {more}")
        )
    return [each for at in range(0, len(pairs), AT_ONCE) for each in _encode(headed, pairs[at : at + AT_ONCE], names)]


def _encode(headed: HeadedModel, pairs: Sequence[Pair], names: dict[str, int]) -> Iterator[EncodedPair]:
    prompts = [pair.prompt for pair in pairs] * 2
    completions = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    text, tokenizer = headed.settings.text, headed.tokenizer
    whole = encode_turns(tokenizer, text, headed.turn_end, prompts, completions)
    starts = find_completion_starts(text, tokenizer, prompts, whole)
    text.report([len(row) for row in whole], headed.limit)
    rows, out = zip(*(cut(row, headed.limit, tokenizer) for row in whole), strict=True)
    for i, pair in enumerate(pairs):
        j = i + len(pairs)
        first, second = max(0, starts[i] - out[i]), max(0, starts[j] - out[j])
        yield EncodedPair(rows[i], rows[j], first, second, names.get(pair.head, 0), pair.task)


@dataclass(frozen=True)
class PairCollator:
    """Batches of pairs as tensors: the chosen texts are numbered first, then the rejected ones."""

    window: int = 0
    """Tokens of a packed row; 0: one padded row for each text."""
    targets: bool = False
    """Also say which tokens are completions, for the losses that read log-probabilities."""
    pad_id: int = 0
    tasks: tuple[str, ...] = ("",)
    """The tasks that are numbered in a batch."""

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
        """Make the tensors of a batch; `ends` has the row and the position at which each text is read."""
        heads = torch.tensor([pair.head for pair in pairs])
        numbers = {task: i for i, task in enumerate(self.tasks)}
        task_ids = torch.tensor([numbers.get(pair.task, 0) for pair in pairs])
        if pairs[0].states is not None:
            chosen, rejected = zip(*(pair.states for pair in pairs if pair.states is not None), strict=True)
            return {"states": torch.stack([*chosen, *rejected]), "heads": heads, "task_ids": task_ids}
        texts = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
        rows = pack(list(map(len, texts)), self.window) if self.window else [[i] for i in range(len(texts))]
        width = max(sum(len(texts[i]) for i in row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        # Padding of a packed row is many texts of one token, whose positions are all 0.
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        places: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(rows):
            start = 0
            for i in row:
                length = len(texts[i])
                ids[number, start : start + length] = torch.tensor(texts[i])
                positions[number, start : start + length] = torch.arange(length)
                mask[number, start : start + length] = 1
                places[i] = (number, start)
                start += length
        ends = torch.tensor([(places[i][0], places[i][1] + len(text) - 1) for i, text in enumerate(texts)])
        batch = {"input_ids": ids, "ends": ends, "heads": heads, "task_ids": task_ids}
        batch |= {"tokens": torch.tensor(sum(map(len, texts)))}
        batch |= {"position_ids": positions} if self.window else {"attention_mask": mask}
        if self.targets:
            starts = [*(pair.chosen_start for pair in pairs), *(pair.rejected_start for pair in pairs)]
            batch["targets"] = torch.tensor(
                [
                    (i, places[i][0], places[i][1] + position)
                    for i, (text, start) in enumerate(zip(texts, starts, strict=True))
                    for position in range(max(start, 1), len(text))
                ]
            )
            batch["references"] = torch.tensor([pair.reference for pair in pairs], dtype=torch.float32)
        return batch


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Pack texts into few rows of at most `window` tokens, and fill those evenly, for a batch is as wide as its widest.

    >>> pack([3, 5, 2, 4], 7), pack([3, 5, 2, 4], 20)
    ([[1, 2], [3, 0]], [[1, 3, 0, 2]])
    """
    if max(lengths, default=0) > window:
        number = setting("window", str(window))
        raise ValueError(Message(f"a packed row holds the longest text, of {max(lengths)} tokens, got {number}"))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    filled: list[int] = []
    for i in order:  # the longest first, each into the first row with room
        at = next((row for row, tokens in enumerate(filled) if tokens + lengths[i] <= window), len(rows))
        if at == len(rows):
            rows.append([])
            filled.append(0)
        rows[at].append(i)
        filled[at] += lengths[i]
    even: list[list[int]] = [[] for _ in rows]
    tokens = [0] * len(rows)
    for i in order:  # into as many rows, each text into the emptiest
        at = min(range(len(rows)), key=lambda row: tokens[row])
        even[at].append(i)
        tokens[at] += lengths[i]
    return even if max(tokens, default=0) <= max(filled, default=0) else rows


def check_packing(headed: HeadedModel, pairs: Sequence[EncodedPair], window: int) -> None:
    """Refuse to pack for a model that reads a text in a packed row otherwise than alone."""
    some = [*pairs[:3]]
    packed, padded = (move(PairCollator(size)(some), headed) for size in (window, 0))
    training = headed.training
    headed.eval()
    try:
        with torch.no_grad():
            scores, expected = (headed(**batch).float() for batch in (packed, padded))
    except TypeError as error:
        scores, expected, reason = torch.zeros(1), torch.ones(1), f" ({error})"
    else:
        reason = ""
    finally:
        headed.train(training)
    kind = next(p.dtype for p in headed.model.parameters() if p.is_floating_point())
    apart, spread = float((scores - expected).abs().max()), float(expected.std(0).max().nan_to_num(0.0))
    if apart > NEAR.get(kind, NEAR_16_BIT) * max(spread, 1e-3):
        raise ValueError(
            Message(
                f"{type(headed.model).__name__} gives a text in a packed row another score than alone, {apart:.1e} "
                f"apart{reason}: train with {setting('window', '0')}, which pads"
            )
        )


def move(batch: dict[str, Tensor], headed: HeadedModel) -> dict[str, Tensor]:
    """Move what the model reads of a batch to its device."""
    device = headed.head.score.weight.device
    beside = ("heads", "tokens", "references", "task_ids")
    return {name: each.to(device) for name, each in batch.items() if name not in beside}

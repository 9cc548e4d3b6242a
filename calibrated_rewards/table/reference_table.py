"""ReferenceTable: each prompt's sorted reference scores, and the ranks of new scores among them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64, Shaped

from calibrated_rewards.prompts import Prompt, UnknownPromptError, as_key, id_key, longest_prefix, start_of
from calibrated_rewards.table import search
from calibrated_rewards.table.build import Row, as_row, build, lengths_of, rows_of
from calibrated_rewards.table.search import Content
from calibrated_rewards.table.storage import COLUMNS, DATA_FILE, SUMMARY_FILE, open_table, write_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calibrated_rewards.table.torch_search import DeviceTable

__all__ = ["ReferenceTable", "Row"]

Duplicates = Literal["error", "pool"]
"""What a table does with two rows of one prompt: refuse them, or pool their scores."""
Directory = str | os.PathLike[str]


class ReferenceTable:
    """The calibration data of a reward model: each prompt's K >= 1 reference scores, K may differ between prompts.

    Immutable; rows are ordered by key, so that equal content is equal bytes in whatever order it arrived. On disk it is
    memory-mapped: opening takes a millisecond, and every byte is checked against a checksum when first touched.

    >>> table = ReferenceTable.build([("2+2=", [0.1, 0.5, 0.5, 0.9]), ("Hello", [-3.0])])
    >>> rows = table.rows(["2+2=", "2+2=", "Hello"])
    >>> table.cdf(rows, [0.5, 2.0, -4.0])
    array([0.5, 1. , 0. ])
    >>> table
    ReferenceTable(2 prompts, 5 references, in memory)

    Look-ups take rows of shape (P,) with scores of shape (P,), or (P, G) for G responses a prompt. Scores are compared
    as float32. Given arrays they return arrays; given torch tensors, tensors on the same device. The edges:

    ====================  =================  =========================================
    score or quantile     cdf                icdf
    ====================  =================  =========================================
    below all             0
    above all             1
    ties with m of them   (below + m/2) / K
    nan, inf              ValueError
    u = 0                                    the smallest reference
    u = 1                                    the largest
    u = j / K             (float64, j >= 1)  the j-th smallest, exactly
    u outside, nan                           ValueError
    unknown row           IndexError         IndexError; -1 is unknown, not the last row
    ====================  =================  =========================================
    """

    def __init__(self, content: Content) -> None:
        self._content = content

    @classmethod
    def build(
        cls,
        rows: Iterable[Sequence[Any]],
        *,
        path: Directory | None = None,
        meta: Mapping[str, Any] | None = None,
        duplicates: Duplicates = "error",
    ) -> ReferenceTable:
        """Build a table of `Row`s, or of (prompt, scores) or (prompt, scores, aliases), in any order.

        Aliases are other keys that lead to the prompt's row: a rendered template, messages, or an id as `id_key(7)`.

        With `path` the rows stream through a temporary file there, so that memory does not grow with K, and the table
        that comes back is the mapped one. `meta` is anything JSON can say (tuples come back as lists).
        A prompt that comes twice is an error unless `duplicates="pool"`.
        """
        return cls(build(rows, path, meta or {}, duplicates))

    @classmethod
    def load(cls, path: Directory, *, verify: bool | None = None) -> ReferenceTable:
        """Open the table in a directory.

        Altered bytes raise ValueError when they are first touched; with `verify=True` all are checked now, with
        `verify=False` never.
        """
        return cls(open_table(path, verify))

    def save(self, path: Directory) -> None:
        """Write the table to a directory, in one step: a reader finds the old one or this one, whatever happens."""
        columns = {name: self._content.column(name) for name in COLUMNS if name != "checksums"}
        write_table(path, columns, self._content.total, self._content.meta, self._content.read)

    @property
    def path(self) -> str | None:
        """The directory that the table is mapped from; None for one in memory."""
        return self._content.path

    @property
    def meta(self) -> dict[str, Any]:
        """The caller's meta, as a copy."""
        return dict(json.loads(self._content.meta))

    def __len__(self) -> int:
        return self._content.prompts

    def __repr__(self) -> str:
        return f"ReferenceTable({len(self)} prompts, {self._content.total} references, {self.path or 'in memory'})"

    def find(
        self, prompts: Sequence[Prompt | bytes] | np.ndarray, ids: Sequence[Any] | np.ndarray | None = None
    ) -> Int64[np.ndarray, " G"]:
        """Find the row of each prompt by its id, if that is known, or by its own key; -1 where it is unknown."""
        if isinstance(prompts, str | bytes | Mapping) or isinstance(ids, str | bytes | Mapping):
            raise TypeError(f"prompts and ids are lists, got prompts={start_of(prompts)}, ids={ids!r:.60}")
        prompts, ids = list(prompts), None if ids is None else list(ids)  # a Series would be asked by its labels
        rows = np.full(len(prompts), -1)
        if ids is not None:
            if len(ids) != len(prompts):
                raise ValueError(f"ids must be one for each prompt, got {len(ids)} for {len(prompts)} prompts")
            keys = {position: id_key(identifier) for position, identifier in enumerate(ids) if identifier is not None}
            rows[list(keys)] = self._find_keys(list(keys.values()))
        others = np.flatnonzero(rows < 0).tolist()
        rows[others] = self._find_keys([as_key(prompts[position]) for position in others])
        return rows

    def rows(
        self, prompts: Sequence[Prompt | bytes] | np.ndarray, ids: Sequence[Any] | np.ndarray | None = None
    ) -> Int64[np.ndarray, " G"]:
        """Find the row of each prompt; UnknownPromptError if one has none."""
        rows = self.find(prompts, ids)
        if len(rows) and rows.min() < 0:
            self._refuse(prompts, np.flatnonzero(rows < 0))
        return rows

    def rows_by_prefix(
        self, texts: Sequence[str] | np.ndarray
    ) -> tuple[Int64[np.ndarray, " G"], Int64[np.ndarray, " G"]]:
        """Find the row of the longest known text prompt that each text starts with, and its length in the text."""
        if isinstance(texts, str):
            raise TypeError(f"texts are a list of texts, got the one {start_of(texts)}")
        lengths = self._content.column("lengths").tolist()
        prefixes = [longest_prefix(text, lengths, self._knows) for text in texts]
        if None in prefixes:
            self._refuse(texts, np.array([position for position, hit in enumerate(prefixes) if hit is None]))
        hits = [hit for hit in prefixes if hit is not None]
        return self._find_keys([key for key, _ in hits]), np.array([split for _, split in hits], dtype=np.int64)

    @overload
    def ranks(self, rows: Any, scores: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def ranks(self, rows: Any, scores: Any) -> tuple[Int64[np.ndarray, "*P"], Int64[np.ndarray, "*P"]]: ...
    def ranks(self, rows: Any, scores: Any) -> Any:
        """Count the references of its row that each score is above, and those that it equals."""
        return self._search("ranks", rows, scores)

    @overload
    def cdf(self, rows: Any, scores: Tensor) -> Tensor: ...
    @overload
    def cdf(self, rows: Any, scores: Any) -> Float64[np.ndarray, "*P"]: ...
    def cdf(self, rows: Any, scores: Any) -> Any:
        """Return the empirical quantile of Eq. 12, (below + equal / 2) / K, in float64."""
        return self._search("cdf", rows, scores)

    @overload
    def icdf(self, rows: Any, u: Tensor) -> Tensor: ...
    @overload
    def icdf(self, rows: Any, u: Any) -> Float32[np.ndarray, "*P"]: ...
    def icdf(self, rows: Any, u: Any) -> Any:
        """Return the generalised inverse of `cdf`: the smallest reference with a share of at least u at or below it."""
        return self._search("icdf", rows, u)

    @overload
    def counts(self, rows: Tensor) -> Tensor: ...
    @overload
    def counts(self, rows: Any) -> Int64[np.ndarray, " P"]: ...
    def counts(self, rows: Any) -> Any:
        """Return the number of references, K, of each row."""
        return self._search("counts", rows)

    def keys(self, rows: Any) -> list[bytes]:
        """Return the key of each row: `prompt_key` of its prompt, or `id_key` where that is all the table knows."""
        rows = search.check_rows(rows, len(self))
        high, low = self._content.column("keys_high")[rows], self._content.column("keys_low")[rows]
        data = np.stack([high, low], axis=1).astype(">u8").tobytes()
        return [data[at : at + 16] for at in range(0, len(data), 16)]

    def on(self, device: torch.device) -> DeviceTable:
        """Copy the scores to a torch device, once, for a search that waits for nothing."""
        from calibrated_rewards.table import torch_search

        return torch_search.on_device(self._content, device)

    def scores(self, row: int) -> Float32[np.ndarray, " K"]:
        """Return the sorted references of one row, as a view that cannot be written to."""
        rows = search.check_rows([row], len(self))
        self._content.touch(rows)
        begin = int(search.starts(self._content, rows)[0])
        view = self._content.scores[begin : begin + int(search.counts(self._content, rows)[0])]
        view.flags.writeable = False
        return view

    def blocks(
        self, rows: Int[np.ndarray, " P"]
    ) -> Iterator[tuple[Int64[np.ndarray, " b"], Float32[np.ndarray, "b K"]]]:
        """Yield the references of many rows in chunks of equal K: (positions in `rows`, one row of scores for each)."""
        return search.blocks(self._content, rows)

    def items(self) -> Iterator[tuple[bytes, Float32[np.ndarray, " K"]]]:
        """Yield (key, sorted scores) of every row, by ascending key."""
        return ((as_key(row.prompt), row.scores) for row in rows_of(self._content))

    def merge(
        self,
        *others: ReferenceTable,
        path: Directory | None = None,
        meta: Mapping[str, Any] | None = None,
        duplicates: Duplicates = "error",
    ) -> ReferenceTable:
        """Build a table of all rows of these tables, with their aliases; their meta must agree unless one is given."""
        if meta is None and any(table.meta != self.meta for table in others):
            raise ValueError("merge needs tables of one meta, or the meta of the result: they may be of other scorers")
        contents = [table._content for table in (self, *others)]
        rows = (row for content in contents for row in rows_of(content))
        meta = self.meta if meta is None else meta
        return ReferenceTable(build(rows, path, meta, duplicates, lengths_of(*contents)))

    def extend(
        self,
        rows: Iterable[Sequence[Any]],
        *,
        path: Directory | None = None,
        meta: Mapping[str, Any] | None = None,
        allow_new: bool = False,
    ) -> ReferenceTable:
        """Build a table with more references for this one's prompts, found by key or alias; new prompts if allowed."""
        both = (row for part in (rows_of(self._content), self._under_known_keys(rows, allow_new)) for row in part)
        meta = self.meta if meta is None else meta
        return ReferenceTable(build(both, path, meta, "pool", lengths_of(self._content)))

    def describe(self) -> dict[str, float]:
        """Describe the table in ten numbers, which `search.describe` explains."""
        return search.describe(self._content)

    def save_pretrained(self, save_directory: Directory) -> None:
        """Write the table, as `save` does, under the name that the Hugging Face world uses."""
        self.save(save_directory)

    @classmethod
    def from_pretrained(
        cls, name: Directory, *, repo_type: str = "dataset", verify: bool | None = None, **hub: Any
    ) -> ReferenceTable:
        """Open a table from a directory, or from the Hugging Face Hub with `revision`, `token` and `cache_dir`."""
        if os.path.isdir(name):
            return cls.load(name, verify=verify)
        from huggingface_hub import snapshot_download

        files = [DATA_FILE, SUMMARY_FILE]
        try:
            directory = snapshot_download(str(name), repo_type=repo_type, allow_patterns=files, **hub)
        except (OSError, ValueError) as error:  # the Hub's own errors do not always name what was asked for
            reason = type(error).__name__
            raise FileNotFoundError(f"{str(name)!r} is no folder, and the Hub does not give it ({reason})") from error
        return cls.load(directory, verify=verify)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        repo_type: str = "dataset",
        revision: str | None = None,
        commit_message: str = "Upload reference table",
        **card: Any,
    ) -> str:
        """Upload the table to the Hub, to a new repository if there is none, and return the URL of the commit.

        With `rollouts=True`, those of the run that the table lies in too, as data that the Hub's viewer shows. A card
        takes the place of README.md: `licence=` and `base_model=` (names on the Hub) are for it, `card=False` is none.
        What looks like a secret in the metadata is refused, but with `force=True`.
        """
        from calibrated_rewards.table import hub

        with tempfile.TemporaryDirectory() as directory:
            hub.write_repository(self, Path(directory), repo_id, **card)
            return hub.upload(
                directory, repo_id, repo_type, commit_message, private=private, token=token, revision=revision
            )

    def _search(self, name: str, *arguments: Any) -> Any:
        """Call a function of `search`, or that of `torch_search` for tensors; torch is not imported to find out."""
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(arguments[-1], torch.Tensor):
            return getattr(search, name)(self._content, *arguments)
        from calibrated_rewards.table import torch_search

        return torch_search.call(name, self._content, *arguments)

    def _find_keys(self, keys: Sequence[bytes]) -> Int64[np.ndarray, " G"]:
        column, (high, low) = self._content.column, search.halves(keys)
        rows = search.locate(column("keys_high"), column("keys_low"), high, low)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown) and len(column("alias_rows")):
            alias = search.locate(column("alias_high"), column("alias_low"), high[unknown], low[unknown])
            rows[unknown] = np.where(alias < 0, -1, column("alias_rows")[alias])
        return rows

    def _knows(self, keys: Sequence[bytes]) -> Shaped[np.ndarray, " G"]:
        return self._find_keys(keys) >= 0

    def _refuse(self, prompts: Sequence[Any] | np.ndarray, unknown: Int[np.ndarray, " _"]) -> None:
        prompt = list(prompts)[int(unknown[0])]
        raise UnknownPromptError(
            format_unknown(self, start_of(prompt), as_key(prompt), unknown=len(unknown), of=len(prompts))
        )

    def _under_known_keys(self, rows: Iterable[Any], allow_new: bool) -> Iterator[Row]:
        """Yield rows under the key that the table has for their prompt."""
        high, low = self._content.column("keys_high"), self._content.column("keys_low")
        for position, item in enumerate(rows):
            row = as_row(item, position)
            number = int(self._find_keys([as_key(row.prompt)])[0])
            if number < 0 and not allow_new:
                raise UnknownPromptError(
                    f"row {position}: the table has no prompt {start_of(row.prompt)}; allow_new=True would add it"
                )
            # The text stays as an alias, so that prefix look-up knows its length.
            key = bytes.fromhex(f"{high[number]:016x}{low[number]:016x}")
            yield row if number < 0 else Row(key, row.scores, [*row.aliases, row.prompt])


def format_unknown(table: ReferenceTable, name: str, key: bytes, *, unknown: int, of: int) -> str:
    """Write the error for an unknown prompt: the table, the prompt, its key, and how many more are unknown."""
    number = f"; {unknown} of {of} are unknown" if of > 1 else ""
    place = f"{table.path or 'in memory'}, {len(table)} prompts"
    return f"the table ({place}) has no references for {name}, key {key.hex()}{number}"

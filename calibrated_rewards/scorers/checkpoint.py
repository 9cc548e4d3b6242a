"""What a checkpoint holds, found without loading it: its config, its adapter, the names and shapes of its weights."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# In the order in which transformers and peft look for them; sharded ones have an index beside them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Where LLaMA-Factory keeps a value head, beside the model or the adapter that it belongs to.
HEAD_WEIGHTS = ("value_head.safetensors", "value_head.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or a repository of the Hub of which small files are in the local cache and weights come when needed."""

    name: str
    """As `from_pretrained` takes it."""
    folder: Path
    revision: str | None = None
    """The commit, of a repository."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it is, or nothing."""
        return self._json("config.json")

    @property
    def adapter(self) -> dict[str, Any]:
        """adapter_config.json of a PEFT adapter, or nothing."""
        return self._json("adapter_config.json")

    @cached_property
    def weights(self) -> dict[str, str]:
        """The file that each weight is in, an adapter's under the names that they have in its base."""
        stored = ADAPTER_WEIGHTS if self.adapter else WEIGHTS
        return {_in_base(name): file for name, file in [*self._named(stored), *self._named(HEAD_WEIGHTS)]}

    @cached_property
    def value_heads(self) -> dict[str, list[str]]:
        """Heads beside the body that give one number: name, and the names of their weights from first layer to last.

        A head is known by its shape: linear layers, each as wide as the one before, the last with one output.
        """
        groups = self._beside_body()
        return {head: names for head, names in groups.items() if _gives_one({name: self.shape(name) for name in names})}

    @cached_property
    def labels(self) -> int | None:
        """How many outputs the head has that is stored beside the body; None without one."""
        shapes = [self.shape(name) for names in self._beside_body().values() for name in names]
        # The other layers of a head (a pooler, a dense layer) are as wide as the body.
        return min((shape[0] for shape in shapes if len(shape) == 2), default=None)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, from the header of its file."""
        path = self._path(self.weights[name])
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return tuple(file.get_slice(self._stored(file.keys(), name)).get_shape())
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """One weight, on the CPU."""
        path = self._path(self.weights[name])
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return file.get_tensor(self._stored(file.keys(), name))  # type: ignore[no-any-return]
        held = _unpickled(path)
        return held[self._stored(held.keys(), name)]

    def _stored(self, names: Iterable[str], name: str) -> str:
        return next(stored for stored in names if _in_base(stored) == name)

    def _beside_body(self) -> dict[str, list[str]]:
        """The weights by the first part of their names, but for the largest part, which is the body."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.weights, key=_natural):
            groups.setdefault(name.partition(".")[0], []).append(name)
        body = max(groups, key=lambda part: len(groups[part]), default=None)
        return {part: names for part, names in groups.items() if part != body}

    def _named(self, files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Names of weights and the files they are in, by the first of these files that is there."""
        for file in files:
            index = self._json(f"{file}.index.json")
            if index:
                yield from index["weight_map"].items()
                return
            path = self._found(file)
            if path is not None:
                yield from ((name, file) for name in _names_in(path))
                return

    def _json(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        held: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return held

    def _found(self, file: str) -> Path | None:
        if self.revision is None:
            return path if (path := self.folder / file).exists() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except EntryNotFoundError:
            return None

    def _path(self, file: str) -> Path:
        path = self._found(file)
        if path is None:
            raise FileNotFoundError(f"{self.name} has no {file}, which its index names")
        return path


def checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """The folder of that name, or else the repository on the Hub (offline: in the local cache)."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return Checkpoint(str(folder.absolute()), folder)
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"no folder {name_or_path!r}: a model is a folder, or a repository 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(name_or_path, revision=revision, allow_patterns=["*.json"])
    except (OSError, ValueError) as error:  # the Hub's own errors do not always name what was asked for
        reason = type(error).__name__
        raise FileNotFoundError(
            f"{name_or_path!r} is no folder, and the Hub does not give it ({reason}){_function_hint(name_or_path)}"
        ) from error
    return Checkpoint(name_or_path, Path(snapshot), revision=Path(snapshot).name)


def _function_hint(name: str) -> str:
    """Where a function goes, if a name looks as one does: module:function, or a file of Python."""
    if not re.fullmatch(r"[\w./]+(:\w+|\.py)", name):
        return ""
    return ". A function of yours takes the place of a model from Python: calibrate(prompts, sampler, function)"


def _gives_one(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether these weights, in order, are linear layers one after another that end in one output."""
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    fits = all(after[1] == before[0] for before, after in pairwise(matrices))
    others = {name: shape for name, shape in shapes.items() if len(shape) != 2}
    biases = all(name.endswith("bias") and len(shape) == 1 for name, shape in others.items())
    return bool(matrices) and matrices[-1][0] == 1 and fits and biases


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders layer 10 after layer 2, and, within a layer, bias before weight."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"\.", name)]


def _names_in(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_unpickled(path))
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _unpickled(path: Path) -> dict[str, Tensor]:
    """A .bin file, whose weights stay on the disk until they are used; what is not a weight is refused."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]

"""Inspect a checkpoint without loading it: config, adapter, names and shapes of weights, kind of reward model.

`detect_kind` goes by the config, the heads and the labels, never by the checkpoint's name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from calibrated_rewards.files import Message, setting

# In the order in which transformers and peft look for them; sharded ones have an index beside them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Where LLaMA-Factory keeps a value head, beside the model or the adapter that it belongs to.
HEAD_WEIGHTS = ("value_head.safetensors", "value_head.bin")
# The settings of a preference head, which lies alone, beside an adapter of its own, or beside its model.
PREFERENCE_HEAD = "preference_head.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or a repository of the Hub of which small files are in the local cache and weights come when needed."""

    name: str
    """The folder or repository, as `from_pretrained` takes it."""
    folder: Path
    revision: str | None = None
    """The commit of a repository."""

    @property
    def config(self) -> dict[str, Any]:
        """The members of config.json, or none."""
        return self._json("config.json")

    @property
    def adapter(self) -> dict[str, Any]:
        """The members of a PEFT adapter's adapter_config.json, or none."""
        return self._json("adapter_config.json")

    @property
    def preference_head(self) -> dict[str, Any]:
        """The settings of a preference head, or none."""
        return self._json(PREFERENCE_HEAD)

    @cached_property
    def weights(self) -> dict[str, str]:
        """The file of each weight; an adapter's weights have the names that they have in its base."""
        stored = ADAPTER_WEIGHTS if self.adapter else WEIGHTS
        return {_in_base(name): file for name, file in [*self._list_weights(stored), *self._list_weights(HEAD_WEIGHTS)]}

    @cached_property
    def value_heads(self) -> dict[str, list[str]]:
        """Heads beside the body that give one number, with the names of their weights from first layer to last.

        A head is known by its shape: linear layers, each as wide as the one before, the last with one output.
        """
        groups = self._beside_body()
        return {head: names for head, names in groups.items() if _gives_one({name: self.shape(name) for name in names})}

    @cached_property
    def labels(self) -> int | None:
        """The number of outputs of the head that is stored beside the body; None without one."""
        shapes = [self.shape(name) for names in self._beside_body().values() for name in names]
        # The other layers of a head (a pooler, a dense layer) are as wide as the body.
        return min((shape[0] for shape in shapes if len(shape) == 2), default=None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read the shape of a weight from the header of its file."""
        path = self._path(self.weights[name])
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return tuple(file.get_slice(_stored_name(file.keys(), name)).get_shape())
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """Read one weight, on the CPU."""
        path = self._path(self.weights[name])
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return file.get_tensor(_stored_name(file.keys(), name))  # type: ignore[no-any-return]
        tensors = _load_bin(path)
        return tensors[_stored_name(tensors.keys(), name)]

    def _beside_body(self) -> dict[str, list[str]]:
        """Group weights by the first part of their names, and leave out the largest group, which is the body."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.weights, key=_natural):
            groups.setdefault(name.partition(".")[0], []).append(name)
        body = max(groups, key=lambda part: len(groups[part]), default=None)
        return {part: names for part, names in groups.items() if part != body}

    def _list_weights(self, files: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Yield names of weights with the files they are in, by the first of these files that is there."""
        for file in files:
            index = self._json(f"{file}.index.json")
            if index:
                yield from index["weight_map"].items()
                return
            path = self._find_file(file)
            if path is not None:
                yield from ((name, file) for name in _names_in(path))
                return

    def _json(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        members: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return members

    def _find_file(self, file: str) -> Path | None:
        if self.revision is None:
            return path if (path := self.folder / file).exists() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except EntryNotFoundError:
            return None

    def _path(self, file: str) -> Path:
        path = self._find_file(file)
        if path is None:
            raise FileNotFoundError(f"{self.name} has no {file}, which its index names")
        return path


def find_checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """Find the folder of that name, or else the repository on the Hub (offline: in the local cache)."""
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
    """Advise where a function goes, if a name looks as one does: module:function, or a file of Python."""
    if not re.fullmatch(r"[\w./]+(:\w+|\.py)", name):
        return ""
    return ". A function of yours takes the place of a model from Python: calibrate(prompts, sampler, function)"


def _gives_one(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Tell if these weights, in order, are linear layers one after another that end in one output."""
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    fits = all(after[1] == before[0] for before, after in pairwise(matrices))
    others = {name: shape for name, shape in shapes.items() if len(shape) != 2}
    biases = all(name.endswith("bias") and len(shape) == 1 for name, shape in others.items())
    return bool(matrices) and matrices[-1][0] == 1 and fits and biases


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _stored_name(names: Iterable[str], name: str) -> str:
    return next(stored for stored in names if _in_base(stored) == name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: layer 10 after layer 2, and, within a layer, bias before weight."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"\.", name)]


def _names_in(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_load_bin(path))
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _load_bin(path: Path) -> dict[str, Tensor]:
    """Load a .bin file, whose weights stay on the disk until they are used; what is not a weight is refused."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]


Kind: TypeAlias = Literal[
    "sequence-classifier",
    "cross-encoder",
    "multi-attribute",
    "value-head",
    "process",
    "judge",
    "expected-rating",
    "rated-judge",
    "token-logit",
    "implicit",
    "preference-head",
]

KINDS_WITHOUT_HEAD = (
    f"a judge that answers in words is {setting('kind', 'judge')}, a policy trained with DPO "
    f"{setting('kind', 'implicit')} with {setting('reference')}, "
    f"a model whose score is the logit of its next token (Nemotron) {setting('kind', 'token-logit')}, "
    f"a process reward model {setting('kind', 'process')} with {setting('mark')}; "
    "of a reward adapter, name the adapter's folder"
)


def detect_kind(checkpoint: Checkpoint, base: Checkpoint, trust_remote_code: bool = False) -> Kind:
    """Detect the only kind that a checkpoint can be, or raise a ValueError with the choices; `base` for adapters."""
    if checkpoint.preference_head:
        return "preference-head"
    what = architecture(base)
    task = checkpoint.adapter.get("task_type")
    if task == "TOKEN_CLS" or what.endswith("ForTokenClassification"):
        raise ValueError(
            Message(
                f"{checkpoint.name} ({what}) gives a score to each step of a completion: say "
                f"{setting('kind', 'process')}, and with {setting('mark')} the token that ends a step"
            )
        )
    if needs_code(base) and not trust_remote_code:
        heads = ", ".join(checkpoint.value_heads)
        without = (
            f"; or, without its code, read its head ({heads}) with {setting('kind', 'value-head')}" if heads else ""
        )
        raise ValueError(
            Message(
                f"{base.name} is a {what}, which transformers does not know and which brings its own code: read it, "
                f"then allow it with {setting('trust_remote_code', 'True')} (and say which of its outputs is the "
                f"score, {setting('output', 'score')}, unless it is called logits){without}"
            )
        )
    if task == "SEQ_CLS" or (what.endswith("ForSequenceClassification") and is_known(what)):
        return "cross-encoder" if is_encoder(base) and _labels(checkpoint, base) == 1 else "sequence-classifier"
    if needs_code(base):
        return "sequence-classifier" if classifies(base) else "multi-attribute"
    if checkpoint.value_heads:
        return "value-head"
    encoder = "of an embedding model train a classification head first; of a reward adapter, name the adapter's folder"
    raise ValueError(
        Message(
            f"{checkpoint.name} ({what}) has no head that gives a score, and would get a random one: "
            f"{encoder if is_encoder(base) else KINDS_WITHOUT_HEAD}"
        )
    )


def check_writes(checkpoint: Checkpoint, base: Checkpoint, kind: str) -> None:
    """Refuse a reward model as a language model: with tied embeddings it would load, and write at random."""
    what = architecture(base)
    classifies = what.endswith(("ForSequenceClassification", "ForTokenClassification"))
    scores = classifies or (not is_known(what) and bool(base.value_heads))
    if checkpoint.adapter.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") or (
        scores and not any("lm_head" in name for name in base.weights)
    ):
        raise ValueError(
            Message(
                f"the kind {kind} reads the words that a model writes, and {checkpoint.name} ({what}) was trained to "
                f"give scores: its weights for words are gone or no longer used. Leave out {setting('kind', kind)}"
            )
        )


def architecture(checkpoint: Checkpoint) -> str:
    """Return the name of the class of model that was saved."""
    unknown = f"{checkpoint.config.get('model_type', 'model')} of no known class"
    return str((checkpoint.config.get("architectures") or [unknown])[0])


def is_known(architecture: str) -> bool:
    """Tell if an architecture is one of transformers' own classes."""
    return getattr(transformers, architecture, None) is not None


def needs_code(checkpoint: Checkpoint) -> bool:
    """Tell if a checkpoint brings the code of its class."""
    return bool(checkpoint.config.get("auto_map")) and not is_known(architecture(checkpoint))


def classifies(checkpoint: Checkpoint) -> bool:
    """Tell if a custom model promises the outputs of a sequence classifier: logits."""
    return "AutoModelForSequenceClassification" in checkpoint.config.get("auto_map", {})


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Tell if an encoder reads and a decoder of its own writes: T5, BART."""
    if checkpoint.config.get("model_type") not in transformers.CONFIG_MAPPING:
        return False
    return bool(parse_config(checkpoint).is_encoder_decoder)


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Tell if a model reads in both directions: trained to fill in words, and no encoder-decoder."""
    if checkpoint.config.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    config = parse_config(checkpoint)
    return not (config.is_encoder_decoder or getattr(config, "is_decoder", False))


def _labels(checkpoint: Checkpoint, base: Checkpoint) -> int:
    """Count the labels: an adapter's own head says how many, or the config."""
    return (checkpoint.labels if checkpoint.adapter else None) or int(parse_config(base).num_labels or 2)


def parse_config(checkpoint: Checkpoint) -> transformers.PretrainedConfig:
    """Parse config.json, with the defaults that it leaves out."""
    kind = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    return kind.from_dict(checkpoint.config)

"""A reward head on a language model's own hidden states, the one of Direct Preference Heads (arXiv 2405.20053).

    head = PreferenceHead(HeadSettings(hidden_size=576, pooler="tanh", end_token="<|im_end|>"))
    outputs = model(**batch, output_hidden_states=True)
    scores = head(head.select(outputs.hidden_states, ends))     # (rows, names of the head)
    head.save_pretrained("head/")                               # preference_head.safetensors and .json

A score is r = w . f(h). h is the hidden state at the last end-of-turn token of prompt and completion, of one layer or
a learned mix of layers; f is the pooler; each name of the head has its own w, without a bias. Weights and arithmetic
are float32, also in a model of 16 bits and under autocast: 16 bits turn close scores into ties.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from calibrated_rewards.files import Message, setting, write_file
from calibrated_rewards.models.text import Text

WEIGHTS_FILE, SETTINGS_FILE = "preference_head.safetensors", "preference_head.json"
FORMAT = "preference-head-1"
POOLERS = ("identity", "tanh", "swiglu")
BACKBONES = ("frozen", "lora", "full")
# The standard deviation of a fresh w, that of transformers' classification heads: first scores are near 0.
INITIAL_STD = 0.02


@dataclass(frozen=True)
class HeadSettings:
    """The shape of a head, the token at which it reads, and the model that it was trained on."""

    hidden_size: int
    names: tuple[str, ...] = ("reward",)
    """One score for each name."""
    pooler: str = "identity"
    """f in r = w . f(h): h itself, tanh(W h), or tanh(W2 (silu(a) * b)) with (a, b) = W1 h."""
    layers: tuple[int, ...] = (-1,)
    """Indices into transformers' `hidden_states`: -1 is the last layer behind the final norm, 0 the embeddings.
    Several layers are mixed by a softmax of learned weights."""
    pooler_size: int | None = None
    """The width of a and b of the pooler swiglu; None: the hidden size."""
    dropout: float = 0.0
    """Of the hidden state and of the pooler's output, in training."""
    end_token: str | None = None
    """The end-of-turn token at which the head reads; None: the tokenizer's EOS."""
    text: Text = field(default_factory=Text)
    """The settings by which prompts and completions become tokens."""
    backbone: str = "frozen"
    """How the model was trained under the head: not at all, by an adapter saved beside the head, or all weights."""
    base: str | None = None
    """The folder or repository of the model that the head was trained on."""
    base_weights: str | None = None
    """A digest of that model's weights, by which another model is noticed."""
    base_sample: Mapping[str, str] | None = field(default=None, hash=False, repr=False)
    """A few values of each of that model's weights, by which another one is noticed in float16 too."""

    def __post_init__(self) -> None:
        for name, choices in (("pooler", POOLERS), ("backbone", BACKBONES)):
            value = getattr(self, name)
            if value not in choices:
                chosen = setting(name, str(value))
                raise ValueError(Message(f"a head needs {name} to be one of {', '.join(choices)}, got {chosen}"))
        for name in ("names", "layers"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise TypeError(Message(f"a head needs {name} to be a tuple with one entry or more, got {values!r}"))
            object.__setattr__(self, name, tuple(values))
            if len({*values}) < len(values) or "" in values:
                raise ValueError(Message(f"a head needs different {name}, got {setting(name, str(values))}"))
        if not 0 <= self.dropout < 1:
            raise ValueError(Message(f"a head needs 0 <= dropout < 1, got {setting('dropout', str(self.dropout))}"))

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "HeadSettings":
        """Read what `to_json` wrote; ValueError for the settings of something else."""
        rest = dict(content)
        if (found := rest.pop("format", None)) != FORMAT:
            raise ValueError(
                f"{SETTINGS_FILE} needs format {FORMAT!r}, got {found!r}: a newer release may have written it"
            )
        known = [each.name for each in fields(cls)]
        missing = [name for name in ("hidden_size", "names", "layers") if name not in rest]
        if missing or (unknown := [name for name in rest if name not in known]):
            problem = f"has no {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which no head has"
            raise ValueError(f"{SETTINGS_FILE} {problem}: a newer release, or another program, may have written it")
        text = rest.pop("text", {})
        text = Text(**{**text, "strip": tuple(text.get("strip", ()))})
        return cls(**{**rest, "names": tuple(rest["names"]), "layers": tuple(rest["layers"]), "text": text})


class PreferenceHead(nn.Module):
    """A reward head: pooler and linear layers from hidden states to one float32 score for each of its names."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        size, wide = settings.hidden_size, settings.pooler_size or settings.hidden_size
        self.mix = nn.Parameter(torch.zeros(len(settings.layers))) if len(settings.layers) > 1 else None
        self.dropout = nn.Dropout(settings.dropout)
        self.pooler_in = nn.Linear(size, 2 * wide, bias=False) if settings.pooler == "swiglu" else None
        inner = {"identity": None, "tanh": size, "swiglu": wide}[settings.pooler]
        self.pooler_out = None if inner is None else nn.Linear(inner, size, bias=False)
        self.score = nn.Linear(size, len(settings.names), bias=False)
        for part in (self.pooler_in, self.pooler_out):
            if part is not None:
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
        nn.init.normal_(self.score.weight, std=INITIAL_STD)
        self.float()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores, in the order of the last dimension."""
        return self.settings.names

    def forward(self, states: Float[Tensor, "*rows features"]) -> Float32[Tensor, "*rows names"]:
        """Score hidden states at the end-of-turn token, `select`'s: the head's layers side by side, one for most."""
        with torch.autocast(states.device.type, enabled=False):
            hidden = self.dropout(self._mix_layers(states.to(self.score.weight)))
            if self.pooler_in is not None:
                gate, value = self.pooler_in(hidden).chunk(2, -1)
                hidden = nn.functional.silu(gate) * value
            if self.pooler_out is not None:
                hidden = self.dropout(torch.tanh(self.pooler_out(hidden)))
            return self.score(hidden)  # type: ignore[no-any-return]

    def select(
        self, hidden_states: Tensor | Sequence[Tensor], ends: Int64[Tensor, " rows"]
    ) -> Float[Tensor, "rows features"]:
        """Take the states of the head's layers at one position of each row, layers side by side.

        `hidden_states` is a model's output of that name, (rows, tokens, hidden size) for each layer, or the last
        layer's alone for a head that reads no other.
        """
        rows = torch.arange(len(ends), device=ends.device)
        return torch.cat(
            [layer[rows.to(layer.device), ends.to(layer.device)] for layer in self.pick(hidden_states)], -1
        )

    def pick(self, hidden_states: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Pick the head's layers out of a model's `hidden_states`; the last layer's states alone are taken as such."""
        layers = self.settings.layers
        if isinstance(hidden_states, Tensor):
            if layers != (-1,):
                raise ValueError(f"a head of layers {layers} needs the hidden states of all layers, got those of one")
            return [hidden_states]
        count = len(hidden_states)
        if not all(-count <= layer < count for layer in layers):
            raise ValueError(
                f"a model with {count} hidden states needs layers from {-count} to {count - 1}, got {layers}"
            )
        return [hidden_states[layer] for layer in layers]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preference_head.safetensors and preference_head.json into a folder, that of the model if you like."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()}
        write_file(folder / WEIGHTS_FILE, save(weights, {"format": "pt"}))
        write_file(folder / SETTINGS_FILE, json.dumps(self.settings.to_json(), indent=2))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> "PreferenceHead":
        """Load a head from a folder or a repository of the Hub, ready to score: in evaluation mode, on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        settings_file, weights_file = (
            find_file(name_or_path, name, revision=revision, token=token) for name in (SETTINGS_FILE, WEIGHTS_FILE)
        )
        head = cls(read_settings(settings_file))
        try:
            head.load_state_dict(load_file(weights_file))
        except SafetensorError as error:
            raise ValueError(f"{weights_file} cannot be read, copy it again: {error}") from error
        except RuntimeError as error:
            reason = " ".join(str(error).split()[6:])
            raise ValueError(f"{weights_file} holds other weights than its {SETTINGS_FILE} says: {reason}") from error
        return head.eval()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
    ) -> str:
        """Upload the head's two files to a repository, a new one if there is none, and return the commit's URL."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, private=private, token=token, revision=revision)

    def _mix_layers(self, states: Tensor) -> Tensor:
        """Average the layers, which are side by side, by the softmax of their weights."""
        features = len(self.settings.layers) * self.settings.hidden_size
        if states.shape[-1] != features:
            raise ValueError(
                f"a head of layers {self.settings.layers} of {self.settings.hidden_size} numbers reads {features} "
                f"features, got {states.shape[-1]}"
            )
        if self.mix is None:
            return states
        parts = states.reshape(*states.shape[:-1], len(self.settings.layers), self.settings.hidden_size)
        mixed: Tensor = (self.mix.softmax(0)[:, None] * parts).sum(-2)
        return mixed

    def _apply(self, fn: Any, recurse: bool = True) -> "PreferenceHead":
        """Move weights to another device, but leave them in float32 where a model around the head goes to 16 bits."""
        super()._apply(_Wide(fn), recurse)  # type: ignore[no-untyped-call]
        return self


@dataclass(frozen=True)
class _Wide:
    """A conversion of weights, of which those to fewer than 32 bits only move."""

    convert: Any

    def __call__(self, weight: Tensor) -> Tensor:
        converted: Tensor = self.convert(weight)
        if converted.is_floating_point() and converted.element_size() < 4:
            return weight.float().to(converted.device)
        return converted


def read_settings(file: Path) -> HeadSettings:
    """Read the settings of a saved head from their file; ValueError names it."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON, copy it again: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a JSON object, got {type(content).__name__}")
    return HeadSettings.from_json(content)


def find_file(
    name_or_path: str | Path, file: str, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Find a file of a folder or of a repository of the Hub; FileNotFoundError if there is none."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{name_or_path} has no {file}: it holds no preference head")
        return folder / file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision, token=token))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is no folder, and the Hub does not give its {file} ({type(error).__name__})"
        ) from error


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder to a model repository of the Hub, a new one if there is none; return the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        revision=revision,
        commit_message="Upload preference head",
        ignore_patterns=[".*"],
    )
    return str(commit.commit_url)

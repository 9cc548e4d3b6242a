"""A causal language model and the preference head on it, as one module: built, read, saved and loaded together.

    headed = HeadedModel.build(policy, tokenizer, backbone="lora", pooler="tanh")   # to train
    headed.save_pretrained("head/")
    headed = HeadedModel.from_pretrained("head/")                # with the model that the head was trained on
    headed = HeadedModel.attach("head/", policy, tokenizer)      # on a policy in memory: no second copy of it
    scores = headed.score_rows(headed.encode(prompts, completions))

The backbone is frozen, has a LoRA adapter of the head's own, or is trained whole. While the head reads, its adapter is
the only active one: those that the policy carries are off, and a frozen backbone is read without any.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.base_weights import digest_base, find_other_weight, sample_base
from calibrated_rewards.heads.preference_head import (
    SETTINGS_FILE,
    HeadSettings,
    PreferenceHead,
    find_file,
    read_settings,
    upload,
)
from calibrated_rewards.heads.turn_end import TurnEnd, encode_turns, find_turn_end
from calibrated_rewards.models.adapters import activate, build_lora_config, ignore_peft_warning
from calibrated_rewards.models.checkpoints import Checkpoint, find_checkpoint
from calibrated_rewards.models.loading import Placement, Source, load_complete
from calibrated_rewards.models.parts import body_of, device_of, for_scoring, lock_of, pad_right, positions_of, unwrap
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.vocabulary_head import Logits, logits_of, output_layer
from calibrated_rewards.prompts import Completion, Prompt

# The name of the head's own adapter among those of a policy; a second head's has a number behind it.
ADAPTER = "preference_head"


class HeadedModel(nn.Module):
    """A causal language model with a preference head; `model` may carry PEFT adapters, one of them the head's."""

    def __init__(self, model: Any, tokenizer: Any, head: PreferenceHead, adapter_name: str = ADAPTER) -> None:
        super().__init__()
        self.model, self.tokenizer = unwrap(model), tokenizer
        self.head = head.to(device_of(self.model))
        self.adapter_name = adapter_name

    @classmethod
    def build(
        cls, model: Any, tokenizer: Any, *, backbone: str = "frozen", lora: Any = None, rank: int = 16, **settings: Any
    ) -> "HeadedModel":
        """Put a new head on a model and set what is trained: `settings` are those of `HeadSettings`.

        `lora` is PEFT's LoraConfig, in place of adapters of this rank on all linear layers but the output.
        """
        model = unwrap(model)
        text = settings.pop("text", None) or Text()
        end = find_turn_end(tokenizer, text, settings.pop("end_token", None))
        config = model.config.get_text_config()
        most = config.num_hidden_layers
        if not all(-most - 1 <= layer <= most for layer in settings.get("layers", ())):
            layers = setting("layers", ",".join(map(str, settings["layers"])))
            raise ValueError(Message(f"the model has hidden states from {-most - 1} to {most}, got {layers}"))
        size, name = size_of_states(model, settings.get("layers", (-1,))), name_adapter(model)
        head = PreferenceHead(HeadSettings(size, end_token=end.token, text=text, backbone=backbone, **settings))
        model.requires_grad_(False)
        if backbone == "lora":
            model = add_lora(model, lora or build_lora_config(model, rank), name)
        if backbone == "full":
            if hasattr(model, "peft_config"):
                raise ValueError("all weights of a model are trained without adapters: merge_and_unload() them first")
            body_of(model).requires_grad_(True)
        else:
            base = getattr(model.config, "_name_or_path", None) or None
            digest, sample = digest_base(model), sample_base(model)
            head.settings = replace(head.settings, base=base, base_weights=digest, base_sample=sample)
        return cls(model, tokenizer, head, name)

    @property
    def settings(self) -> HeadSettings:
        """What the head reads and how: its layers, pooler, names and end of the turn."""
        return self.head.settings

    @property
    def config(self) -> Any:
        """The config of the language model that carries the head."""
        return self.model.config

    @property
    def adapter(self) -> str | None:
        """The name of the head's own adapter; None for a head that reads the base, or a model trained whole."""
        return self.adapter_name if self.settings.backbone == "lora" else None

    @property
    def turn_end(self) -> TurnEnd:
        """The token at which the head reads."""
        return find_turn_end(self.tokenizer, self.settings.text, self.settings.end_token)

    @property
    def limit(self) -> int:
        """The number of tokens above which an input is truncated."""
        return self.settings.text.limit(self.tokenizer, positions_of(self.model))

    def activate(self) -> AbstractContextManager[None]:
        """Make the head's adapter, or none, the active one meanwhile."""
        return activate(self.model, self.adapter)

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode pairs as rows that end in the end-of-turn token, where the head reads."""
        with lock_of(self.model):  # fast tokenizers do not bear two threads
            return encode_turns(self.tokenizer, self.settings.text, self.turn_end, prompts, completions, self.limit)

    def read(
        self, input_ids: Int64[Tensor, "rows tokens"], **masks: Int64[Tensor, "rows tokens"] | None
    ) -> tuple[list[Tensor], Tensor]:
        """Run the body on rows, right-padded or packed; return the states of the head's layers, and of the last one."""
        layers = self.settings.layers
        given = {name: mask for name, mask in masks.items() if mask is not None}
        with self.activate():
            answer = body_of(self.model)(
                input_ids=input_ids, output_hidden_states=layers != (-1,), use_cache=False, **given
            )
        last: Tensor = answer.last_hidden_state
        return self.head.pick(answer.hidden_states) if layers != (-1,) else [last], last

    def forward(
        self,
        input_ids: Int64[Tensor, "rows tokens"] | None = None,
        ends: Int64[Tensor, "texts 2"] | None = None,
        targets: Int64[Tensor, "targets 3"] | None = None,
        states: Float[Tensor, "texts features"] | None = None,
        **masks: Int64[Tensor, "rows tokens"] | None,
    ) -> Any:
        """Score texts at their ends, (texts, names), with gradients into what is trained; masks are the model's own.

        `ends` has the row and the position of each text's last token. With `targets`, each the number of a text, a row
        and a position, also return the sum of a text's log-probabilities of the tokens there. With `states`, those at
        the ends, the head alone is run.
        """
        if states is not None:
            return self.head(states)
        if input_ids is None or ends is None:
            raise TypeError("a headed model reads input_ids at ends, or states, got neither")
        layers, last = self.read(input_ids, **masks)
        scores = self.head(torch.cat([layer[ends[:, 0], ends[:, 1]] for layer in layers], -1))
        if targets is None:
            return scores
        logits = self.vocabulary.of(output_layer(self.model), last[targets[:, 1], targets[:, 2] - 1]).float()
        following = input_ids[targets[:, 1], targets[:, 2]]
        logprobs = logits.gather(1, following[:, None])[:, 0] - logits.logsumexp(1)
        return scores, logprobs.new_zeros(len(ends)).index_add(0, targets[:, 0], logprobs)

    @cached_property
    def vocabulary(self) -> Logits:
        """The rule from the output layer to logits, with the model's own scale and bound."""
        return logits_of(self.model, lock_of(self.model))

    def states_at_end(self, rows: list[list[int]]) -> Float32[Tensor, "rows features"]:
        """Read the hidden states at the last token of each row, in one batch without gradients: the head's input."""
        with for_scoring(self.model, lock_of(self.model)):
            ids, mask = pad_right(rows, 0, device_of(self.model))
            states, _ = self.read(ids, attention_mask=mask)
            at = torch.arange(len(rows), device=ids.device)
            return torch.cat([layer[at, mask.sum(1) - 1] for layer in states], -1).float()

    def score_rows(self, rows: list[list[int]]) -> Float32[Tensor, "rows names"]:
        """Score encoded rows in one batch without gradients or dropout."""
        states = self.states_at_end(rows)
        training = self.head.training
        try:
            with torch.inference_mode():
                return self.head.eval()(states)  # type: ignore[no-any-return]
        finally:
            self.head.train(training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head's two files, and beside them its adapter, or the whole model that was trained with it."""
        folder = Path(folder)
        if self.settings.backbone == "full":
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.adapter is not None:
            save_adapter(self.model, self.adapter, folder)
        self.head.save_pretrained(folder)

    def load_weights(self, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote into the weights of this model, in place: a checkpoint of training."""
        saved = PreferenceHead.from_pretrained(folder)
        self.head.load_state_dict(saved.state_dict())
        if self.adapter is not None:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            weights = load_file(Path(folder) / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model, weights, adapter_name=self.adapter)
        if self.settings.backbone == "full":
            fresh = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(fresh.state_dict())

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations again in the backward pass: the model's own."""
        self.model.activation_checkpointing_enable(**options)
        if self.settings.backbone != "full":
            self.model.enable_input_require_grads()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        base: str | None = None,
        revision: str | None = None,
        placement: Placement | None = None,
        any_base: bool = False,
    ) -> "HeadedModel":
        """Load a head with its model: the one beside it, else `base`, else the one that it was trained on.

        A model with other weights than those is refused, but with `any_base`.
        """
        placement = placement or Placement()
        settings = read_settings(find_file(name_or_path, SETTINGS_FILE, revision=revision))
        at = find_checkpoint(str(name_or_path), revision)
        if not at.config:
            place = base or settings.base
            if place is None:
                unknown = f"{name_or_path} does not say on which model its head is: say {setting('base')}"
                raise ValueError(Message(unknown))
            at = find_base(place, None if base else str(name_or_path))
        from transformers import AutoModelForCausalLM

        model = load_complete(AutoModelForCausalLM, at, **placement.options())
        tokenizer = Source(at, at, placement).tokenizer(model)
        model = model.requires_grad_(False).eval()
        return cls.attach(name_or_path, model, tokenizer, revision=revision, any_base=any_base)

    @classmethod
    def attach(
        cls,
        name_or_path: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        revision: str | None = None,
        any_base: bool = False,
    ) -> "HeadedModel":
        """Put a saved head, with an adapter of its own, on a model in memory, whose others stay as they are."""
        model = unwrap(model)
        head, name = PreferenceHead.from_pretrained(name_or_path, revision=revision), name_adapter(model)
        check_base(model, head.settings, any_base)
        if head.settings.backbone == "lora":
            model = load_adapter(model, str(name_or_path), name, revision)
        return cls(model, tokenizer, head, name)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to a repository; return the commit's URL."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, private=private, token=token, revision=revision)


class SelectedLayers(nn.Module):
    """A body whose `last_hidden_state` is the states of a head's layers, side by side: for readers of bodies."""

    def __init__(self, body: nn.Module, head: PreferenceHead) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.takes_positions = "position_ids" in inspect.signature(body.forward).parameters

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None, **options: Any
    ) -> SimpleNamespace:
        """Run the body and join the layers."""
        if position_ids is not None and self.takes_positions:
            options["position_ids"] = position_ids
        if past_key_values is not None:
            options["past_key_values"] = past_key_values
        answer = self.body(input_ids=input_ids, output_hidden_states=True, **options)
        states = self.head.pick(answer.hidden_states)
        joined = states[0] if len(states) == 1 else torch.cat(states, -1)
        return SimpleNamespace(last_hidden_state=joined, past_key_values=getattr(answer, "past_key_values", None))


def find_base(place: str, head: str | None) -> Checkpoint:
    """Find the checkpoint of a base; the error about one that a head names says what to do."""
    try:
        return find_checkpoint(place)
    except FileNotFoundError as error:
        if head is None:
            raise
        gone = f"the head {head} was trained on {place}, which is not there: say where that model is, "
        raise FileNotFoundError(Message(gone + setting("base", "PATH"))) from error


def check_base(model: Any, settings: HeadSettings, any_base: bool = False) -> None:
    """Refuse a model of another hidden size, or with other weights than the head was trained on."""
    size = size_of_states(model, settings.layers)
    if size != settings.hidden_size:
        raise ValueError(f"the head reads {settings.hidden_size} numbers, the model has hidden states of {size}")
    if any_base:
        return
    if other := find_other_weight(model, settings.base_weights, settings.base_sample):
        raise ValueError(
            Message(
                f"the head was trained on other weights ({settings.base}) than the model's, which {other} shows, and "
                f"its scores would be others: load it on that model, or go on with "
                f"{setting('any_base', 'True', option='--option any_base=true')}"
            )
        )


def size_of_states(model: Any, layers: Sequence[int]) -> int:
    """Return the size of the hidden states of some layers; OPT-350M's last ones are narrower than the others."""
    config = model.config.get_text_config()
    narrow = getattr(config, "word_embed_proj_dim", config.hidden_size)
    return int(narrow if tuple(layers) == (-1,) else config.hidden_size)


def name_adapter(model: Any) -> str:
    """Choose a name for a head's adapter that none of the model's adapters has."""
    taken = getattr(model, "peft_config", {})
    return next(name for name in chain([ADAPTER], (f"{ADAPTER}_{i}" for i in count(1))) if name not in taken)


def add_lora(model: Any, config: Any, adapter: str) -> Any:
    """Add the head's adapter to a model, beside those that it carries; the head's alone is trained."""
    from peft import PeftModel, get_peft_model

    with ignore_peft_warning():
        if isinstance(model, PeftModel):
            model.add_adapter(adapter, config)
        else:
            model = get_peft_model(model, config, adapter_name=adapter)
    for name, weight in model.named_parameters():
        weight.requires_grad_(f".{adapter}." in name)
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def load_adapter(model: Any, place: str, adapter: str, revision: str | None = None) -> Any:
    """Load the head's adapter from beside a head onto a model; the adapters that were active stay so."""
    from peft import PeftModel
    from safetensors import SafetensorError

    folder, files = Path(place).expanduser(), ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in files if folder.is_dir() and not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{place} has no {missing[0]}, and its head reads with an adapter: copy it beside it")
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    training: list[Any] = []
    try:
        with ignore_peft_warning():
            if not isinstance(model, PeftModel):
                return PeftModel.from_pretrained(model, place, adapter_name=adapter, **options)
            training = [part for part in model.modules() if part.training]
            model.load_adapter(place, adapter, **options)  # leaves the model in evaluation mode
    except SafetensorError as error:
        raise ValueError(f"adapter_model.safetensors of {place} cannot be read, copy it again: {error}") from error
    for part in training:
        part.training = True
    return model


def save_adapter(model: Any, adapter: str, folder: Path) -> None:
    """Write an adapter as PEFT does, but into the folder itself, whatever the adapter's name."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file(
        {name: each.detach().cpu().contiguous() for name, each in weights.items()}, folder / "adapter_model.safetensors"
    )
    config = model.peft_config[adapter]
    trained, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = trained

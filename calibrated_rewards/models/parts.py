"""The parts of a transformer (body, heads, embeddings), facts about it, and the modes and errors of its forwards."""

import copy
import platform
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from calibrated_rewards.files import Message, setting

# Tokens in a batch, padding included, unless the user says otherwise.
ON_CPU, ON_GPU = 8_192, 65_536
# Of models without a table of embeddings, such as Canine, which hashes characters.
ANY_ID = 2**31
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_one_at_a_time = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """Return a model's lock: one for all scorers that use it, for its training mode and its hooks are the model's."""
    with _one_at_a_time:
        return _locks.setdefault(body_of(model), threading.RLock())


def unwrap(model: Any) -> Any:
    """Return the model inside torch.compile's or a data-parallel wrapper."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def body_of(model: Any) -> nn.Module:
    """Return the transformer without its head; under PEFT, with the adapter in it."""
    inner = without_peft(model)
    body: nn.Module = getattr(inner, inner.base_model_prefix, inner)
    if body is inner:
        body = getattr(inner, "get_decoder", lambda: None)() or inner
    if body is inner and hasattr(inner, "lm_head"):  # Llama 4 keeps its body under another name than the one it gives
        body = getattr(inner, "model", inner)
    return body


def without_peft(model: Any) -> Any:
    """Return the transformer inside wrappers and PEFT's model, which has put its adapters into it."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def heads_of(model: Any) -> dict[str, nn.Module]:
    """Return the parts beside the body that have weights, by name: score, classifier, pooler, ..."""
    body = body_of(model)
    beside = [(name, part) for name, part in without_peft(model).named_children() if part is not body]
    return {name: part for name, part in beside if any(True for _ in part.parameters())}


def vocabulary(model: Any) -> int:
    """Count the token ids that the model has an embedding for."""
    table = embeddings_of(model)
    return ANY_ID if table is None else int(table.shape[0])


def embeddings_of(model: Any) -> Tensor | None:
    """Return the table of the tokens' embeddings; None for a model that has none."""
    try:
        part = model.get_input_embeddings()
    except NotImplementedError:
        return None
    if isinstance(part, nn.Module):
        return part.weight  # type: ignore[return-value]
    # Perceiver names its latent vectors, and embeds tokens elsewhere.
    size = getattr(model.config, "vocab_size", None)
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size)
    return next(tables, None)


def device_of(model: Any) -> torch.device:
    """Return the device of a model's inputs: that of its embeddings, or of the first weight that is not offloaded."""
    table = embeddings_of(model)
    if table is not None and table.device.type != "meta":
        return table.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def default_budget(model: Any) -> int:
    """Return the tokens in a batch for the device that a model is on."""
    return ON_CPU if device_of(model).type == "cpu" else ON_GPU


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return a model's precision; of quantised weights, that of what is not quantised."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell if a device has instructions for bfloat16: without them a product takes 40 times as long as in float32."""
    if device.type != "cpu":
        return True
    known = (getattr(torch.cpu, f"_is_{each}_supported", lambda: False) for each in ("avx512_bf16", "amx_tile"))
    return any(each() for each in known) or platform.machine() in ("arm64", "aarch64")


def positions_of(model: Any) -> int | None:
    """Return how many tokens a model has positions for; None if it does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    named = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa counts positions from the padding id on: 514 of them are 512 tokens. I-BERT has a table of its own class.
    counted = [part for part in named if getattr(part, "padding_idx", None) is not None]
    usable = [part.weight.shape[0] - part.padding_idx - 1 for part in counted]
    return min(usable, default=most if isinstance(most, int) and most > 0 else None)


def rope_turn(model: Any) -> int | None:
    """Return the length above which LongRoPE has other angles for all of an input; None in most models."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    ropes = [rope for rope in (parameters, *parameters.values()) if isinstance(rope, Mapping)]
    turns = [int(rope["original_max_position_embeddings"]) for rope in ropes if rope.get("rope_type") == "longrope"]
    return min(turns, default=None)


def full_attention_up_to(model: Any) -> int | None:
    """Return the length above which BigBird's attention is sparse; None in all other models."""
    config = model.config.get_text_config()
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def in_float32(part: nn.Module) -> nn.Module:
    """Return a head that computes in float32 and without dropout: itself if it does, or a copy of its weights of now.

    16 bits turn close scores into ties. Quantised heads stay as they are.
    """
    weights = list(part.parameters())
    if not all(p.is_floating_point() for p in weights):
        return part
    if all(p.dtype == torch.float32 for p in weights) and not any(module.training for module in part.modules()):
        return part
    return copy.deepcopy(part).float().requires_grad_(False).eval()


@contextmanager
def for_scoring(model: nn.Module, lock: threading.RLock) -> Iterator[None]:
    """Hold a model's lock, without gradients, dropout or an autocast of a loop around it; then restore its modes."""
    with lock, ExitStack() as after:
        training = [part for part in model.modules() if part.training]
        if training:
            model.eval()
            after.callback(_set_training, training)
        after.enter_context(torch.inference_mode())
        after.enter_context(torch.autocast(device_of(model).type, enabled=False))
        yield


def _set_training(parts: list[nn.Module]) -> None:
    for part in parts:
        part.training = True


def pad_right(rows: list[list[int]], pad_id: int, device: torch.device, fewest: int = 1) -> tuple[Tensor, Tensor]:
    """Pad rows on the right, where positions count from the first token in every model: ids and attention mask."""
    longest = max(fewest, *map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def check_vocabulary(rows: list[list[int]], model: nn.Module) -> None:
    """Refuse ids that the model has no embedding for: on a GPU they would end the process."""
    largest, size = max((max(row) for row in rows), default=0), vocabulary(model)
    if largest >= size:
        raise ValueError(
            f"the tokenizer gives id {largest}, the reward model has {size} embeddings: it is another model's "
            "tokenizer, or tokens were added without resize_token_embeddings"
        )


class UnreadError(ValueError, RuntimeError):
    """A model's forward failed on token ids alone; also a RuntimeError, as torch would have raised it."""


# Errors of the forward of a model that needs something else, or more: a language, an image, a longer input.
RAISED = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def reading_errors(model: Any, tokens: int) -> Iterator[None]:
    """Turn an error of the model's forward into an UnreadError with advice; running out of memory stays what it is."""
    try:
        yield
    except RAISED as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if should_reduce_batch_size(error):
            raise
        name = type(getattr(model, "inner", model)).__name__
        raise UnreadError(
            Message(
                f"{name} does not read an input of {tokens} tokens: {type(error).__name__}: {error}. One that looks "
                "for the tokens of its chat template needs prompts that are lists of messages, or "
                f"{setting('chat', 'True', option='--option chat=true')} for prompts that are text, and a max_length "
                "that leaves these tokens in. A setting that its config lacks goes into config.json. What needs more "
                "than token ids is scored by a callable of yours that runs its forward"
            )
        ) from error

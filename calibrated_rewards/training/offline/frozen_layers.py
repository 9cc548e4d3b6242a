"""Hidden states below the trained layers, computed once: steps then read the trained layers alone.

`record_states` reads a group with the whole model, and keeps what enters the first trained layer; `cut_upper_layers`
makes a body of the trained layers, which shares their weights and reads such states in place of tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calibrated_rewards.models.parts import body_of


class GroupStates(NamedTuple):
    """The hidden states that enter the first trained layer, of a prompt and of its completions' tokens that are fed."""

    prompt: Tensor
    """(tokens, hidden size)"""
    completions: list[Tensor]


def find_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Find the list of a model's layers, the module that holds it, and its name there; None if there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for holder in body_of(model).modules():
        for name, child in holder.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return holder, name, child
    return None


def freeze_lower_layers(model: Any, layers: int) -> None:
    """Leave the last so many layers to train, with the norm behind them; 0, or all of them: every weight."""
    place = find_layers(model)
    if place is None or not 0 < layers < len(place[2]):
        return
    model.requires_grad_(False)
    holder, name, stack = place
    parts = list(holder.named_children())
    first = [each for each, _ in parts].index(name) + 1
    # OPT makes the norm behind its layers before them.
    behind = [part for at, (each, part) in enumerate(parts) if at >= first or each.startswith("final")]
    for part in (*list(stack)[-layers:], *behind):
        part.requires_grad_(True)


def count_frozen(layers: nn.ModuleList) -> int:
    """Count the layers below the first one that is trained."""
    trained = (i for i, layer in enumerate(layers) if any(weight.requires_grad for weight in layer.parameters()))
    return next(trained, len(layers))


@contextmanager
def record_inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the hidden states that enter a layer, of each forward."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        inputs.append((args[0] if args else options["hidden_states"]).detach())

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def cut_upper_layers(model: Any) -> Any:
    """Make a body without the frozen lower layers, that shares all weights; None where the body does not allow it.

    Layers number their own keys and values in a cache, so they are renumbered from 0. What else a body does with token
    embeddings (scale them, add positions to them) it would do with the states: compare before this is used.
    """
    place = find_layers(model)
    body: Any = body_of(model)
    if place is None or place[0] is not body:
        return None
    _, name, layers = place
    first = count_frozen(layers)
    if not 0 < first < len(layers):
        return None
    upper: Any = _copy(body)
    upper.config = copy.deepcopy(body.config)
    upper.config.num_hidden_layers = len(layers) - first
    if getattr(upper.config, "layer_types", None) is not None:
        upper.config.layer_types = upper.config.layer_types[first:]
    upper._modules[name] = nn.ModuleList([_renumber(layer, first) for layer in layers[first:]])
    return upper


def _copy(module: nn.Module) -> Any:
    """Copy a module but not its weights and parts."""
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own


def _renumber(module: nn.Module, first: int) -> nn.Module:
    """Copy a layer, whose number in the cache falls by `first`."""
    own = _copy(module)
    if isinstance(getattr(own, "layer_idx", None), int):
        own.layer_idx -= first
    own._modules = {name: part and _renumber(part, first) for name, part in own._modules.items()}
    return own  # type: ignore[no-any-return]


def stack_states(states: list[Tensor], device: torch.device) -> Tensor:
    """Pad states on the right with zeros, into one tensor: (rows, tokens, hidden size)."""
    return nn.utils.rnn.pad_sequence([each.to(device) for each in states], batch_first=True)

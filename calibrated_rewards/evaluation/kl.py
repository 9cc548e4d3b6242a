"""KL of a policy from the reference, of its completions as both models read them.

The KL of two laws of completions is the mean, over the policy's own completions, of a sum over their tokens. Here each
term is the KL of the two next-token distributions, of *all* tokens that might have come: it has the same mean as the
difference of two log-probabilities, varies less, and is never negative.

Both models are read in float32, whatever precision they are loaded in. In 16 bits each rounds in its own way, and that
alone is a KL: the same weights in float32 and in bfloat16 were measured 0.02 nats apart. 16-bit weights are exact in
float32, so this is the KL of the weights of the policy from those of the reference.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibrated_rewards.evaluation.results import Precision
from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.fingerprint import weights_of
from calibrated_rewards.models.parts import default_budget, device_of, dtype_of, for_scoring, lock_of, pad_right, unwrap
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.generation import contiguous_input
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.loading import LoadedSampler
from calibrated_rewards.samplers.policy import Policy, tokenize_completion
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Sampler
from calibrated_rewards.scorers.protocol import fingerprint

logger = logging.getLogger(__name__)

# Numbers that may be held in float32 at once, of each model: tokens times vocabulary.
CELLS_ON_CPU, CELLS_ON_GPU = 2**26, 2**29
# Weights that are compared in float64 at once.
CHUNK = 2**22
READABLE = (HfSampler, ContinuousSampler, LoadedSampler)


class Distance(NamedTuple):
    """KL between the two models along a completion."""

    kl: float
    """In nats, the sum over its tokens, the one that ended it included."""
    as_drawn: bool
    """True if its text makes as many tokens as were drawn; if not, the sum is over those that it makes."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(policy || reference) of each completion, for samplers that hold transformers models with the same tokens.

    Each model reads prompts as its own sampler does, at its own temperature. Rollouts are stored as text, which is
    tokenized again. The last token drawn is not read, since nothing follows it; one more than the text makes was
    drawn where the completion ended by itself.
    """

    policy: Sampler
    reference: Sampler
    cells: int | None = None
    """Logits held at once in float32; None for 2^26 on a CPU and 2^29 on a GPU."""

    def __post_init__(self) -> None:
        for name, sampler in (("policy", self.policy), ("reference", self.reference)):
            if not isinstance(sampler, READABLE):
                kind = type(sampler).__name__
                raise TypeError(f"Divergence needs samplers with a transformers model, the {name} is a {kind}")
            decoding = sampler.decoding
            # With top_p, top_k or min_p the reference gives some completions no probability, and a KL is infinite.
            if replace(decoding, max_tokens=1, temperature=1.0, stop=(), stop_token_ids=()) != Decoding(1):
                raise ValueError(f"Divergence needs decoding with nothing but a temperature, {name} has {decoding!r}")
        if self.cells is not None and self.cells < 1:
            raise ValueError(f"Divergence needs cells >= 1, got cells={self.cells}")

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]) -> list[list[Distance]]:
        """Measure each rollout of each prompt."""
        ours, theirs = _policy(self.policy), _policy(self.reference)
        if len(prompts) != len(rollouts):
            raise ValueError(f"each prompt needs its rollouts, got {len(prompts)} prompts, rollouts of {len(rollouts)}")
        with ExitStack() as after:
            _widen(after, ours.model, theirs.model)
            for each in (ours, theirs):
                after.enter_context(for_scoring(unwrap(each.model), lock_of(each.model)))
            return [self._measure(ours, theirs, *pair) for pair in zip(prompts, rollouts, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """Identify the two models, and the dtype that they are read in."""
        sides = {"policy": self.policy, "reference": self.reference}
        read_in = {"read_in": self.precision().read_in}
        return {"kind": "divergence", **read_in, **{name: fingerprint(sampler) for name, sampler in sides.items()}}

    def precision(self) -> Precision:
        """Find the dtype that the models are read in, and the rounding if they are one model saved in two dtypes."""
        ours, theirs = (unwrap(_policy(each).model) for each in (self.policy, self.reference))
        with ExitStack() as after:
            _widen(after, ours, theirs)
            read_in = {_name(dtype_of(each)) for each in (ours, theirs)}
        return Precision(" and ".join(sorted(read_in)), find_rounding(ours, theirs))

    def _measure(self, ours: Policy, theirs: Policy, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Distance]:
        pairs = [tokenize_completion(ours, rollout, prompt) for rollout in rollouts]
        if any(theirs.text_ids(str(r.completion)) != ours.text_ids(str(r.completion)) for r in rollouts):
            raise ValueError(
                "a KL needs models of the same tokens, policy and reference make other tokens of a completion of "
                f"{start_of(prompt)}"
            )
        openings = [each.ids([prompt])[0] for each in (ours, theirs)]
        fed = [ids[:-1] for ids, _ in pairs]  # nothing follows the last token
        costs = [max(map(len, openings)) + len(ids) + 1 for ids in fed]
        budget = Budget(self._most_tokens(ours.model))
        kls: dict[int, float] = {}
        for batch in budget.batches(costs):
            sums = budget.run(lambda at: self._sums(ours, theirs, openings, [fed[i] for i in at]), batch, costs)
            kls |= dict(zip(batch, sums, strict=True))
        return [Distance(kls[i], as_drawn) for i, (_, as_drawn) in enumerate(pairs)]

    def _sums(self, ours: Policy, theirs: Policy, openings: list[list[int]], fed: list[list[int]]) -> list[float]:
        """Sum the terms of some completions of a prompt, in float32 and a part of their tokens at a time."""
        p, q = (_logits(each.model, opening, fed) for each, opening in zip((ours, theirs), openings, strict=True))
        if p.shape != q.shape:
            raise ValueError(f"a KL needs models of the same tokens, got {p.shape[-1]} and {q.shape[-1]} of them")
        n, steps, size = p.shape
        width = max(1, self._cells(ours.model) // (n * size))
        read = torch.arange(steps) < torch.tensor([len(ids) + 1 for ids in fed])[:, None]
        total = torch.zeros(n, dtype=torch.float64)
        for first in range(0, steps, width):
            part = slice(first, first + width)
            terms = _terms(p[:, part], q[:, part], ours.decoding.temperature, theirs.decoding.temperature)
            total += (terms.cpu().double() * read[:, part]).sum(1)
        return [float(kl) for kl in total]

    def _cells(self, model: Any) -> int:
        return self.cells or (CELLS_ON_CPU if device_of(model).type == "cpu" else CELLS_ON_GPU)

    def _most_tokens(self, model: Any) -> int:
        """Limit a batch by the logits that are held at once."""
        size = int(unwrap(model).get_output_embeddings().weight.shape[0])
        return max(1, min(default_budget(model), self._cells(model) // size))


def _widen(after: ExitStack, ours: Any, theirs: Any) -> None:
    """Hold both models in float32 until `after` ends; where memory does not suffice, in the wider of their dtypes."""
    models = [unwrap(ours), unwrap(theirs)]
    for model in models:
        after.enter_context(lock_of(model))
    try:
        with ExitStack() as both:
            for model in models:
                both.enter_context(_in_dtype(model, torch.float32))
            after.push(both.pop_all())
    except torch.OutOfMemoryError:
        wider = torch.promote_types(*map(dtype_of, models))
        logger.warning("no memory for both models in float32: the KL is read in %s, which rounds", _name(wider))
        for model in models:
            after.enter_context(_in_dtype(model, wider))


@contextmanager
def _in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Hold the weights of a model in a dtype that has all of their values; afterwards they are as before."""
    changed: dict[torch.dtype, list[Tensor]] = {}
    # Quantised, partly offloaded, or with flash attention a model computes in its own dtype alone.
    flash = str(getattr(model.config, "_attn_implementation", "")).startswith("flash")
    fixed = flash or getattr(model, "is_quantized", False) or any(each.is_meta for each in model.parameters())
    if not fixed:
        for each in chain(model.parameters(), model.buffers()):
            if each.is_floating_point() and each.dtype != dtype and torch.promote_types(each.dtype, dtype) == dtype:
                changed.setdefault(each.dtype, []).append(each)
    try:
        for tensors in changed.values():
            _convert(tensors, dtype)
        yield
    finally:
        for before, tensors in changed.items():
            _convert(tensors, before)


def _convert(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Change the dtype in place, one tensor at a time; tensors that shared their memory still do."""
    converted: dict[tuple[Any, ...], Tensor] = {}
    for each in tensors:
        if each.dtype != dtype:
            memory = (each.device, each.data_ptr(), each.shape, each.stride())
            if memory not in converted:
                converted[memory] = each.data.to(dtype)
            each.data = converted[memory]


def find_rounding(ours: Any, theirs: Any) -> str | None:
    """Find the dtype in which one model would be the other: their weights differ by its rounding and nothing else.

    None where a weight differs by more, and where no weight differs. A model that was trained differs by more: weights
    near 0 have room for hardly any rounding.
    """
    a, b = weights_of(unwrap(ours)), weights_of(unwrap(theirs))
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return None
    rounding: str | None = None
    for name, one in a.items():
        if one.is_meta or b[name].is_meta:
            return None
        for at in range(0, one.numel(), CHUNK):
            part, other = (each.flatten()[at : at + CHUNK].to(one.device) for each in (one, b[name]))
            if not torch.equal(part.double(), other.double()):
                rounding = _explain_difference(part, other)
                if rounding is None:
                    return None
    return rounding


def _explain_difference(one: Tensor, other: Tensor) -> str | None:
    """Find the coarser of the dtypes that two weights were saved in, if its rounding explains their difference."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return None
    saved = [_narrowest_dtype(each) for each in (one, other)]
    if saved[0].dtype == saved[1].dtype:
        return None
    a, b = one.double(), other.double()
    half_steps = [(x.abs() + info.smallest_normal) * info.eps / 2 for x, info in zip((a, b), saved, strict=True)]
    explained = bool(((a - b).abs() <= half_steps[0] + half_steps[1]).all())
    return max(saved, key=lambda info: info.eps).dtype if explained else None


def _narrowest_dtype(weight: Tensor) -> torch.finfo:
    """Find the coarsest dtype that has all values of a weight, whatever it is loaded in."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    exact = (dtype for dtype in dtypes if torch.equal(weight.to(dtype).double(), weight.double()))
    return torch.finfo(next(exact, weight.dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_divergence(policy: Sampler, reference: Sampler) -> Divergence | None:
    """Build the divergence of two samplers; None, with the reason in the log, where it cannot be measured."""
    try:
        return Divergence(policy, reference)
    except (TypeError, ValueError) as error:
        logger.warning("no KL: %s", error)
        return None


def _policy(sampler: Any) -> Policy:
    """Return the model as the sampler uses it."""
    inner = sampler.sampler if isinstance(sampler, LoadedSampler) else sampler
    return Policy(inner.model, inner.tokenizer, inner.decoding, inner.text)


def _logits(model: Any, opening: list[int], fed: list[list[int]]) -> Tensor:
    """Compute the logits of each token of the completions, in the model's precision: [n, L, V]."""
    model = unwrap(model)
    rows, steps = [opening + ids for ids in fed], max(map(len, fed)) + 1
    ids, mask = pad_right(rows, opening[0], device_of(model))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {"logits_to_keep": steps} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
    with contiguous_input(model):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    return logits[:, -steps:]


def _terms(p: Tensor, q: Tensor, ours: float, theirs: float) -> Tensor:
    """Compute the KL of each pair of next-token distributions: [n, L]."""
    a, b = (p.float() / ours).log_softmax(-1), (q.to(p.device).float() / theirs).log_softmax(-1)
    # Of tokens that the policy never draws; what rounding takes below 0 is 0.
    return torch.where(a > -torch.inf, a.exp() * (a - b), 0.0).sum(-1).clamp(min=0.0)

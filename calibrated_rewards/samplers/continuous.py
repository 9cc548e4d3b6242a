"""Sample with transformers' continuous batching: a paged cache and no padding, for GPUs; one seed for a whole call."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, NoReturn

import torch

from calibrated_rewards.models.parts import for_scoring, lock_of, unwrap
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.policy import Draft, Policy
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Seeds


@dataclass(frozen=True, eq=False)
class ContinuousSampler:
    """Writes completions through `model.generate_batch`: requests join and leave a running batch, for GPUs.

    The engine draws all requests from one stream of random numbers, so a rollout depends on all prompts and seeds of
    its call: the same call on the same machine gives the same rollouts as far as the engine is deterministic, another
    grouping gives others. What was drawn is kept. In `HfSampler` each rollout depends on its own seed alone.
    """

    model: Any
    tokenizer: Any
    decoding: Decoding
    text: Text = field(default_factory=Text)
    batching: Mapping[str, Any] = field(default_factory=dict)
    """Settings of transformers' ContinuousBatchingConfig: max_memory_percent, max_batch_tokens, num_blocks, ..."""
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.decoding.repetition_penalty != 1 or self.decoding.stop:
            raise ValueError(
                f"continuous batching has no repetition penalty and no stop texts, HfSampler has; got {self.decoding!r}"
            )
        _ = self._policy  # refuses a model that cannot write

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Draw for each prompt a rollout for each of its seeds."""
        rows = self._policy.check(prompts)
        rollouts: list[list[Rollout]] = [[] for _ in prompts]
        # The engine works in a thread of its own, which cannot use tensors that are made in inference mode.
        with for_scoring(unwrap(self.model), lock_of(self.model)), torch.inference_mode(False):
            # The engine writes equally many completions of all prompts of a call.
            for number in sorted({len(each) for each in seeds} - {0}):
                at = [i for i, each in enumerate(seeds) if len(each) == number]
                outputs = self._generate([rows[i] for i in at], number, _join_seeds([seeds[i] for i in at]))
                for i, drafts in zip(at, self._check_outputs(outputs, [prompts[i] for i in at], number), strict=True):
                    rollouts[i] = self._policy.endings.rollouts(drafts)
        return rollouts

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without tokens, or too long for the model with its completion: ValueError."""
        self._policy.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the model reads."""
        return self._policy.rendered(prompt)

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that the completions depend on, but for the seeds."""
        return {"kind": "hf continuous sampler", **self._policy.fingerprint()}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "ContinuousSampler holds a model in memory and is not pickled with its weights; save the model and use "
            'load_sampler(name_or_path, ..., engine="continuous"), which pickles as how to load it'
        )

    def _generate(self, rows: list[list[int]], number: int, seed: int) -> list[Any]:
        """Run the engine, prompt by prompt; its failures are outputs that are missing or have an error."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        decoding, ends = self.decoding, sorted(self._policy.endings.ids)
        drawing = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True,
            max_new_tokens=decoding.max_tokens,
            num_return_sequences=number,
            temperature=float(decoding.temperature),
            top_k=decoding.top_k,
            top_p=float(decoding.top_p),
            min_p=decoding.min_p or None,
            eos_token_id=ends or -1,
        )
        batching = ContinuousBatchingConfig(**{**self.batching, "return_logprobs": True, "seed": seed})
        options = {"generation_config": drawing, "continuous_batching_config": batching}
        watched = self.show_progress and sys.stderr.isatty()
        return list(unwrap(self.model).generate_batch(rows, progress_bar=watched, **options).values())

    def _check_outputs(self, outputs: Sequence[Any], prompts: Sequence[Prompt], number: int) -> list[list[Draft]]:
        """Group the completions by prompt; raise if some are missing or failed, which the engine itself only logs."""
        wrong = [each.error or "no tokens" for each in outputs if each.error is not None or not each.generated_tokens]
        if wrong or len(outputs) != number * len(prompts):
            raise RuntimeError(
                f"continuous batching gives {number} completions for each of {len(prompts)} prompts, got "
                f"{len(outputs) - len(wrong)} for {start_of(prompts[0])}, ...: {wrong[0] if wrong else 'see its log'}. "
                "Where memory is short, batching={'max_memory_percent': 0.5} leaves some"
            )
        drafts = [Draft([*each.generated_tokens], float(sum(each.logprobs))) for each in outputs]
        for draft in drafts:
            draft.end = "token" if draft.ids[-1] in self._policy.endings.ids else None
        return [drafts[at : at + number] for at in range(0, len(drafts), number)]

    @cached_property
    def _policy(self) -> Policy:
        return Policy(self.model, self.tokenizer, self.decoding, self.text)


def _join_seeds(seeds: Seeds) -> int:
    """Digest all seeds of a call into one."""
    text = ",".join(str(seed) for each in seeds for seed in each)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

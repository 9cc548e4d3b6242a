"""Sample with vLLM: prompts as token ids, one request a rollout with its own seed, prompts prefilled once."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from calibrated_rewards.models.checkpoints import architecture, check_writes, find_checkpoint
from calibrated_rewards.models.fingerprint import tokenizer_digest
from calibrated_rewards.models.loading import SHORT
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.policy import Draft, Endings
from calibrated_rewards.samplers.protocol import (
    PATIENCE,
    Decoding,
    Rollout,
    Seeds,
    fingerprint_of_prompts,
    logprob_of_draw,
    tokenize_prompts,
)
from calibrated_rewards.samplers.vllm_engine import Engine, Running


@dataclass(frozen=True)
class VllmSampler:
    """Samples with vLLM: `VllmSampler.load("Qwen/Qwen3-8B", Decoding(max_tokens=512))`, or around a `vllm.LLM`.

    Each rollout is a request with a seed of its own, and prefix caching makes its prompt cheap. A seed fixes the noise
    of a rollout; what is drawn also depends on the last bits of the logits, and so, but for vLLM's batch-invariant mode
    (VLLM_BATCH_INVARIANT=1), on what else the engine is doing, its version and its hardware: what was drawn is kept.

    It stops at the end tokens of the tokenizer and of the generation config; nothing else of the latter is used.
    Completions are decoded by the tokenizer, without special tokens, as trainers do. A rollout's log-probability is of
    the distribution that it was drawn from; None if the engine returns another (an LLM of yours without
    `logprobs_mode="processed_logprobs"`, and a decoding that changes it). vLLM filters by min_p before top_k and top_p,
    transformers after: with both it is a slightly different policy.

    In a script, loaded samplers are called under `if __name__ == "__main__":`, since vLLM starts processes.
    """

    llm: Any
    """A `vllm.LLM`, or an `Engine`, which starts one and pickles."""
    decoding: Decoding
    text: Text = field(default_factory=Text)
    """The way from prompts to tokens."""
    show_progress: bool = True

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        decoding: Decoding,
        text: Text | None = None,
        *,
        revision: str | None = None,
        show_progress: bool = True,
        **engine_options: Any,
    ) -> "VllmSampler":
        """Return the sampler for a checkpoint: a folder, or a repository of the Hub, of a model or a LoRA adapter.

        The engine starts at the first call, once in each process. `engine_options` go to `vllm.LLM`: dtype,
        max_model_len, gpu_memory_utilization, tensor_parallel_size, quantization, trust_remote_code, tokenizer, ...
        """
        found = find_checkpoint(os.fspath(name_or_path), revision)
        if isinstance(dtype := engine_options.get("dtype"), str):
            engine_options["dtype"] = SHORT.get(dtype, dtype)
        base = found
        if found.adapter:
            base = find_checkpoint(found.adapter["base_model_name_or_path"], found.adapter.get("revision"))
        try:
            check_writes(found, base, "policy")  # before an engine is started for it
        except ValueError:
            raise ValueError(
                f"{found.name} ({architecture(base)}) gives scores and writes no words: it is no policy"
            ) from None
        adapter = None
        if found.adapter:
            adapter = str(found.folder)
            rank = {"max_lora_rank": max(8, 1 << (int(found.adapter["r"]) - 1).bit_length())}
            own = {"tokenizer": adapter} if (found.folder / "tokenizer_config.json").exists() else {}
            engine_options = {**rank, **own, **engine_options}
        engine = Engine(base.name, base.revision, adapter, engine_options)
        return cls(engine, decoding, text or Text(), show_progress)

    def __hash__(self) -> int:
        return hash((self.llm, self.decoding))

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self.llm, Engine):
            raise TypeError(
                "VllmSampler holds a running engine and is not pickled; VllmSampler.load(...) makes one that is"
            )
        return self.__dict__

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Draw a rollout for each seed of each prompt."""
        rows = self._tokens(prompts)
        self._check_lengths(prompts, rows, self._engine.limit)
        requests = [(i, seed) for i, each in enumerate(seeds) for seed in each]
        drawn = iter(self._rollouts(prompts, rows, requests))
        return [[next(drawn) for _ in each] for each in seeds]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without tokens, too long with its completion, or refused by the template: ValueError."""
        self._check_lengths(prompts, self._tokens(prompts), self._engine.limit)

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the policy reads."""
        return self.text.opening(self._engine.tokenizer, prompt)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Describe what the rollouts depend on, by the checkpoint's files: an engine does not show its weights."""
        tokenizer = self._engine.tokenizer
        text = fingerprint_of_prompts(self.text.fingerprint(tokenizer))
        reading = {"tokenizer": tokenizer_digest(tokenizer), "text": text}
        return {"kind": "vllm", **self._engine.fingerprint(), **reading, "decoding": self.decoding.fingerprint()}

    @property
    def _engine(self) -> Engine | Running:
        return self.llm if isinstance(self.llm, Engine) else Running(self.llm)

    def _tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return tokenize_prompts(self.text, self._engine.tokenizer, prompts)

    def _check_lengths(self, prompts: Sequence[Prompt], rows: list[list[int]], positions: int | None) -> None:
        """Refuse a prompt so long that its completions would be cut short of max_tokens."""
        limit = min([n for n in (self.text.max_length, positions) if n is not None], default=None)
        most = self.decoding.max_tokens
        for prompt, row in zip(prompts, rows, strict=True):
            if limit is not None and len(row) + most > limit:
                raise ValueError(
                    f"{start_of(prompt)} has {len(row)} tokens, which with max_tokens={most} are more than the {limit} "
                    "that the engine reads: leave it out, or ask for fewer, or start the engine with more max_model_len"
                )

    def _rollouts(
        self, prompts: Sequence[Prompt], rows: list[list[int]], requests: list[tuple[int, int]]
    ) -> list[Rollout]:
        """Draw a rollout for each request: the number of a prompt, and a seed."""
        if not requests:
            return []
        llm, engine = self._engine.llm, self._engine
        self._check_lengths(prompts, rows, Running(llm).limit)  # it may be less than in the checkpoint
        tokens = [{"prompt_token_ids": rows[i]} for i, _ in requests]
        # vLLM divides by the time that a bar shows, which is 0 in one that is off.
        watched = self.show_progress and sys.stderr.isatty()
        options: dict[str, Any] = {"use_tqdm": partial(tqdm, delay=PATIENCE) if watched else False}
        if engine.lora:
            options["lora_request"] = engine.lora
        outputs = llm.generate(tokens, [self._params(seed) for _, seed in requests], **options)
        if len(outputs) != len(requests):
            raise ValueError(f"vLLM answers each of {len(requests)} requests, got {len(outputs)} answers")
        drafts = [self._draft(out, prompts[i], rows[i]) for (i, _), out in zip(requests, outputs, strict=True)]
        rollouts = Endings(engine.tokenizer, frozenset(), self.decoding.stop).rollouts(drafts)
        logprobs = [out.outputs[0].cumulative_logprob for out in outputs]
        logprobs = [logprob_of_draw(logprob, self.decoding, engine.processed) for logprob in logprobs]
        return [rollout._replace(logprob=logprob) for rollout, logprob in zip(rollouts, logprobs, strict=True)]

    def _params(self, seed: int) -> Any:
        """Convert the decoding, with all settings: vLLM's own defaults may be those of a generation config."""
        from vllm import SamplingParams

        decoding = self.decoding
        return SamplingParams(
            n=1,
            seed=seed,
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or -1,  # off, in every version
            min_p=decoding.min_p,
            repetition_penalty=decoding.repetition_penalty,
            stop=list(decoding.stop),
            stop_token_ids=list(decoding.stop_token_ids),
            logprobs=0,
        )

    def _draft(self, output: Any, prompt: Prompt, row: list[int]) -> Draft:
        if list(output.prompt_token_ids) != row or len(output.outputs) != 1:
            raise ValueError(f"vLLM gives one completion of {start_of(prompt)}, got {start_of(output)}")
        drawn = output.outputs[0]
        if drawn.finish_reason not in ("stop", "length"):
            raise ValueError(
                f"vLLM ends a completion by 'stop' or 'length', one of {start_of(prompt)} by {drawn.finish_reason!r}: "
                "it is not whole, sample again"
            )
        if drawn.finish_reason == "length":
            return Draft(list(drawn.token_ids))
        return Draft(list(drawn.token_ids), end="text" if isinstance(drawn.stop_reason, str) else "token")

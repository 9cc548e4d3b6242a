"""A policy in vLLM: prompts as token ids, one request a rollout with its own seed, prompts prefilled once."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tqdm import tqdm

from calibrated_rewards.models.batches import PATIENCE
from calibrated_rewards.models.checkpoints import Checkpoint, architecture, check_writes, find_checkpoint
from calibrated_rewards.models.fingerprint import tokenizer_digest
from calibrated_rewards.models.loading import SHORT
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.logprob import of_the_draw
from calibrated_rewards.samplers.policy import Draft, Endings
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Seeds
from calibrated_rewards.samplers.vllm_engine import Engine, Running

# What of a `Text` becomes a prompt's tokens.
READ = ("chat", "template", "template_options", "special_tokens", "today")


@dataclass(frozen=True)
class VllmSampler:
    """Samples with vLLM: `VllmSampler.load("Qwen/Qwen3-8B", Decoding(max_tokens=512))`, or around a `vllm.LLM`.

    Each rollout is a request with a seed of its own, and prefix caching makes its prompt cheap. A seed fixes the noise
    of a rollout; what is drawn also depends on the last bits of the logits, and so, but for vLLM's batch-invariant mode
    (VLLM_BATCH_INVARIANT=1), on what else the engine is doing, its version and its hardware: what was drawn is kept.

    It stops at the end tokens of the tokenizer and of the generation config; nothing else of the latter is used.
    Completions are decoded by the tokenizer, without special tokens, as trainers do. A rollout's log-probability is of
    the distribution that it was drawn from; None if the engine tells another (an LLM of yours without
    `logprobs_mode="processed_logprobs"`, and a decoding that bends). vLLM filters by min_p before top_k and top_p,
    transformers after: together they are slightly another policy.

    In a script, loaded samplers are called under `if __name__ == "__main__":`, since vLLM starts processes.
    """

    llm: Any
    """A `vllm.LLM`, or how one is started: an `Engine`, which pickles."""
    decoding: Decoding
    text: Text = field(default_factory=Text)
    """How prompts become tokens."""
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
        """The sampler for a checkpoint: a folder, or a repository of the Hub; a LoRA adapter's folder, for its base.

        The engine starts at the first call, once in each process. `engine_options` go to `vllm.LLM`: dtype,
        max_model_len, gpu_memory_utilization, tensor_parallel_size, quantization, trust_remote_code, tokenizer, ...
        """
        found = find_checkpoint(os.fspath(name_or_path), revision)
        if isinstance(dtype := engine_options.get("dtype"), str):
            engine_options["dtype"] = SHORT.get(dtype, dtype)
        if not found.adapter:
            _check_writes(found, found)
            return cls(
                Engine(found.name, found.revision, None, engine_options), decoding, text or Text(), show_progress
            )
        base = find_checkpoint(found.adapter["base_model_name_or_path"], found.adapter.get("revision"))
        _check_writes(found, base)
        rank = {"max_lora_rank": max(8, 1 << (int(found.adapter["r"]) - 1).bit_length())}
        own = {"tokenizer": str(found.folder)} if (found.folder / "tokenizer_config.json").exists() else {}
        engine = Engine(base.name, base.revision, str(found.folder), {**rank, **own, **engine_options})
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
        """A rollout for each seed of each prompt."""
        rows = self._tokens(prompts)
        self._check_lengths(prompts, rows, self._engine.limit)
        asked = [(i, seed) for i, own in enumerate(seeds) for seed in own]
        drawn = iter(self._rollouts(prompts, rows, asked))
        return [[next(drawn) for _ in own] for own in seeds]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for a prompt without tokens, or too long with its completion, or refused by the template."""
        self._check_lengths(prompts, self._tokens(prompts), self._engine.limit)

    def rendered(self, prompt: Prompt) -> str:
        """What the policy reads."""
        return self.text.opening(self._engine.tokenizer, prompt)[0]

    def fingerprint(self) -> dict[str, Any]:
        """What the rollouts depend on, as far as files tell: an engine keeps its weights to itself."""
        tokenizer = self._engine.tokenizer
        text = {name: value for name, value in self.text.fingerprint(tokenizer).items() if name in READ}
        words = {"tokenizer": tokenizer_digest(tokenizer), "text": text}
        return {"kind": "vllm", **self._engine.fingerprint(), **words, "decoding": self.decoding.fingerprint()}

    @property
    def _engine(self) -> Engine | Running:
        return self.llm if isinstance(self.llm, Engine) else Running(self.llm)

    def _tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        tokenizer = self._engine.tokenizer
        # What ends an input of a scorer would end the answer before it begins.
        text = replace(self.text, append_eos=False)
        return text.tokens(tokenizer, [text.opening(tokenizer, prompt) for prompt in prompts])

    def _check_lengths(self, prompts: Sequence[Prompt], rows: list[list[int]], reads: int | None) -> None:
        """Too long a prompt would have its completions cut short of max_tokens."""
        limit = min([n for n in (self.text.max_length, reads) if n is not None], default=None)
        most = self.decoding.max_tokens
        for prompt, row in zip(prompts, rows, strict=True):
            if limit is not None and len(row) + most > limit:
                raise ValueError(
                    f"{start_of(prompt)} has {len(row)} tokens, which with max_tokens={most} are more than the {limit} "
                    "that the engine reads: leave it out, or ask for fewer, or start the engine with more max_model_len"
                )

    def _rollouts(
        self, prompts: Sequence[Prompt], rows: list[list[int]], asked: list[tuple[int, int]]
    ) -> list[Rollout]:
        """One for each prompt's number and seed."""
        if not asked:
            return []
        llm, engine = self._engine.llm, self._engine
        self._check_lengths(prompts, rows, Running(llm).limit)  # it may be less than the checkpoint says
        requests = [{"prompt_token_ids": rows[i]} for i, _ in asked]
        outputs = llm.generate(requests, [self._params(seed) for _, seed in asked], **self._options())
        if len(outputs) != len(asked):
            raise ValueError(f"vLLM answers each of {len(asked)} requests, got {len(outputs)} answers")
        drafts = [self._draft(out, prompts[i], rows[i]) for (i, _), out in zip(asked, outputs, strict=True)]
        found = Endings(engine.tokenizer, frozenset(), self.decoding.stop).rollouts(drafts)
        told = [out.outputs[0].cumulative_logprob for out in outputs]
        kept = [of_the_draw(logprob, self.decoding, engine.processed) for logprob in told]
        return [rollout._replace(logprob=logprob) for rollout, logprob in zip(found, kept, strict=True)]

    def _params(self, seed: int) -> Any:
        """All settings are said: vLLM's own defaults may be those of a generation config."""
        from vllm import SamplingParams

        drawing = self.decoding
        return SamplingParams(
            n=1,
            seed=seed,
            max_tokens=drawing.max_tokens,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k or -1,  # off, in every version
            min_p=drawing.min_p,
            repetition_penalty=drawing.repetition_penalty,
            stop=list(drawing.stop),
            stop_token_ids=list(drawing.stop_token_ids),
            logprobs=0,
        )

    def _options(self) -> dict[str, Any]:
        # vLLM divides by the time that a bar shows, which is 0 in one that is off.
        watched = self.show_progress and sys.stderr.isatty()
        lora = self._engine.lora
        return {"use_tqdm": partial(tqdm, delay=PATIENCE) if watched else False} | (
            {"lora_request": lora} if lora else {}
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


def _check_writes(found: Checkpoint, base: Checkpoint) -> None:
    """Before an engine is started for it."""
    try:
        check_writes(found, base, "policy")
    except ValueError:
        raise ValueError(
            f"{found.name} ({architecture(base)}) gives scores and writes no words: it is no policy"
        ) from None

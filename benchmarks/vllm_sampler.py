"""The vLLM and OpenAI samplers against the real thing: what they draw, what they tell of it, and how fast.

    PYTHONPATH=. python benchmarks/vllm_sampler.py --model ./SmolLM2-135M-Instruct        # in an environment with vLLM

Log-probabilities are compared with a plain forward of transformers on the drawn token ids, behind transformers' own
warpers; first tokens with that forward's probabilities, by a chi-square test; speed with HfSampler in the same run, in
turns. Then `vllm serve` is started on this machine and asked by OpenAISampler. On CPUs set VLLM_CPU_KVCACHE_SPACE=1.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import logits_process as warpers

from calibrated_rewards.prompts import Prompt, prompt_key
from calibrated_rewards.samplers import openai
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.openai import OpenAISampler
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Sampler, sample, seeds_of
from calibrated_rewards.samplers.vllm import VllmSampler
from calibrated_rewards.samplers.vllm_engine import Engine, installed

PROMPTS: list[Prompt] = [
    "The old man looked at the sea, where the boats came home one after another, and said:",
    "2 + 2 =",
    [{"role": "user", "content": "Name a colour, and say in one sentence why you like it."}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "What is a harbour?"}],
]
DECODINGS = {
    "plain": Decoding(max_tokens=24),
    "nucleus": Decoding(max_tokens=24, temperature=0.7, top_k=50, top_p=0.9),
    "penalised": Decoding(max_tokens=24, min_p=0.05, repetition_penalty=1.1),
    "stopped": Decoding(max_tokens=24, stop=(".", "\n")),
}
# Of a decoding, how many rollouts are compared with a plain forward.
COMPARED = 32


@dataclass
class Seen:
    """An engine whose answers are kept: rollouts have texts, and token ids are needed here."""

    llm: Any
    answers: list[Any] = field(default_factory=list)

    def get_tokenizer(self) -> Any:
        """The engine's."""
        return self.llm.get_tokenizer()

    @property
    def llm_engine(self) -> Any:
        """The engine's."""
        return self.llm.llm_engine

    def generate(self, *asked: Any, **options: Any) -> Any:
        """What the engine gives."""
        self.answers = self.llm.generate(*asked, **options)
        return self.answers


def seeds(prompts: Sequence[Prompt], k: int, seed: int = 0) -> list[list[int]]:
    """The seeds of K rollouts a prompt."""
    return [seeds_of(seed, prompt_key(prompt), 0, k) for prompt in prompts]


def warped(decoding: Decoding, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token as transformers' generate draws it."""
    chain: list[Any] = []
    if decoding.repetition_penalty != 1:
        chain.append(warpers.RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    chain.append(warpers.TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        chain.append(warpers.TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        chain.append(warpers.TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        chain.append(warpers.MinPLogitsWarper(decoding.min_p))
    for warp in chain:
        logits = warp(ids, logits)
    return logits.double().log_softmax(-1)


@torch.inference_mode()
def forward(model: Any, prompt: list[int], drawn: list[int], decoding: Decoding) -> float:
    """The log-probability of a completion's tokens, by one plain forward."""
    ids = torch.tensor([prompt + drawn])
    logits = model(ids).logits.float()
    steps = torch.arange(len(prompt), ids.shape[1])
    if decoding.repetition_penalty == 1:  # nothing looks at the tokens before: all steps at once
        return float(warped(decoding, ids, logits[0, steps - 1])[torch.arange(len(drawn)), ids[0, steps]].sum())
    return float(sum(warped(decoding, ids[:, :at], logits[:, at - 1])[0, ids[0, at]] for at in steps.tolist()))


def agreement(model: Any, llm: Any, decoding: Decoding, k: int) -> dict[str, Any]:
    """K rollouts a prompt: their counts, ends, and log-probabilities against a plain forward."""
    seen = Seen(llm)
    rollouts = [r for rs in sample(VllmSampler(seen, decoding), PROMPTS, seeds(PROMPTS, k)) for r in rs]
    drawn = [(list(a.prompt_token_ids), list(a.outputs[0].token_ids)) for a in seen.answers]
    compared = list(zip(drawn, rollouts, strict=True))[:: max(1, len(drawn) // COMPARED)]
    gaps = [abs(forward(model, p, d, decoding) - r.logprob) / len(d) for (p, d), r in compared]
    return {
        "rollouts": len(rollouts),
        "compared": len(gaps),
        "tokens": sum(r.tokens for r in rollouts),
        "tokens_are_the_engines": [r.tokens for r in rollouts] == [len(d) for _, d in drawn],
        "finish": dict(Counter(r.finish for r in rollouts)),
        "cut_at_stop": not any(stop in r.completion for r in rollouts for stop in decoding.stop),
        "within_max_tokens": all((r.tokens == decoding.max_tokens) or r.finish == "stop" for r in rollouts),
        "largest_logprob_gap_nats_a_token": max(gaps),
        "median_logprob_gap_nats_a_token": statistics.median(gaps),
    }


@torch.inference_mode()
def first_tokens(model: Any, llm: Any, draws: int) -> dict[str, Any]:
    """Whether first tokens are drawn as often as the model says: chi-square over those expected five times or more."""
    seen, prompt = Seen(llm), PROMPTS[0]
    VllmSampler(seen, Decoding(max_tokens=1))([prompt], seeds([prompt], draws, seed=1))
    counts = Counter(answer.outputs[0].token_ids[0] for answer in seen.answers)
    logits = model(torch.tensor([list(seen.answers[0].prompt_token_ids)])).logits[0, -1].double()
    expected = draws * logits.softmax(-1).numpy()
    often = np.flatnonzero(expected >= 5)
    observed = np.array([counts[int(i)] for i in often])
    observed, wanted = (
        np.append(observed, draws - observed.sum()),
        np.append(expected[often], draws - expected[often].sum()),
    )
    return {"draws": draws, "cells": len(wanted), "p_value": float(chisquare(observed, wanted).pvalue)}


def seeded(llm: Any, k: int) -> dict[str, Any]:
    """How many rollouts are the same tokens when they are drawn again: with the same others, and each alone."""
    sampler, own = VllmSampler(llm, DECODINGS["plain"]), seeds(PROMPTS, k)
    first, again = sampler(PROMPTS, own), sampler(PROMPTS, own)
    alone = [[sampler([p], [[seed]])[0][0] for seed in row[:4]] for p, row in zip(PROMPTS, own, strict=True)]
    together = [rollout for row in first for rollout in row[:4]]
    return {
        "again": share_equal([r for row in first for r in row], [r for row in again for r in row]),
        "alone": share_equal(together, [r for row in alone for r in row]),
        "different_in_a_prompt": len({r.completion for r in first[0]}) / k,
    }


def share_equal(one: list[Rollout], other: list[Rollout]) -> float:
    """The share of rollouts whose texts are the same."""
    return statistics.mean(a.completion == b.completion for a, b in zip(one, other, strict=True))


def in_turns(rounds: int, sides: dict[str, Callable[[], int]]) -> dict[str, float]:
    """The median tokens a second of each side, after one unmeasured round."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            speeds[name].append(side() / (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in speeds.items()}


def tokens(sampler: Sampler, k: int) -> int:
    """How many tokens the K rollouts of the prompts have; of an engine that does not count, the most they can have."""
    rollouts = sample(sampler, PROMPTS, seeds(PROMPTS, k))
    return sum(24 if r.tokens is None else r.tokens for rs in rollouts for r in rs)


def n_at_once(llm: Any, k: int) -> int:
    """The same by vLLM's own n=K: one request a prompt."""
    from vllm import SamplingParams

    params = SamplingParams(n=k, seed=0, max_tokens=24, temperature=1.0, logprobs=0)
    rows = VllmSampler(llm, DECODINGS["plain"])._tokens(PROMPTS)
    answers = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    return sum(len(output.token_ids) for answer in answers for output in answer.outputs)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[str]:
    """`vllm serve` on this machine, and its url."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself wants a package of the name vllm, which CPU builds are not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--served-model-name", "policy"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    command += ["--logprobs-mode", "processed_logprobs", "--enforce-eager", "--max-num-seqs", str(args.sequences)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            if server.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {server.returncode}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def answers_kept() -> Iterator[list[Any]]:
    """The choices of all answers, in order: rollouts have texts, and token ids are needed here."""
    kept: list[Any] = []
    read = openai.parse_answer

    def reading(answer: Any, *others: Any) -> Any:
        kept.extend(sorted(answer["choices"], key=lambda choice: choice["index"]))
        return read(answer, *others)

    openai.parse_answer = reading
    try:
        yield kept
    finally:
        openai.parse_answer = read


def over_http(model: Any, tokenizer: Any, url: str, k: int) -> dict[str, Any]:
    """Both APIs: counts, ends, and log-probabilities against a plain forward on the tokens that the server names."""
    found: dict[str, Any] = {}
    for api, prompts in (("completions", PROMPTS), ("chat", PROMPTS[2:])):
        words = {"tokenizer": tokenizer} if api == "completions" else {}
        for name, decoding in DECODINGS.items():
            options = {"logprobs": "processed", "extra": {"return_token_ids": True}, "concurrency": 1, **words}
            sampler = OpenAISampler(url, "policy", decoding, api, **options)  # type: ignore[arg-type]
            sampler.check(prompts)
            with answers_kept() as kept:
                rollouts = [r for rs in sample(sampler, prompts, seeds(prompts, k)) for r in rs]
            rows = VllmSampler(Engine(str(tokenizer.name_or_path)), decoding)._tokens(prompts)
            drawn = [choice["token_ids"] for choice in kept]
            rows = [row for row in rows for _ in range(k)]
            compared = list(zip(rows, drawn, rollouts, strict=True))[:: max(1, len(drawn) // COMPARED)]
            gaps = [abs(forward(model, row, ids, decoding) - r.logprob) / len(ids) for row, ids, r in compared]
            found[f"{api}_{name}"] = {
                "finish": dict(Counter(r.finish for r in rollouts)),
                "tokens_are_the_servers": [r.tokens for r in rollouts] == [len(ids) for ids in drawn],
                "compared": len(gaps),
                "largest_logprob_gap_nats_a_token": max(gaps),
            }
    return found


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or an id of the Hub")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128, help="most that the engine runs at once")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": args.sequences}
    loaded = VllmSampler.load(args.model, DECODINGS["plain"], **options)
    llm = loaded.llm.llm

    results: dict[str, Any] = {"vllm": installed(), "prompts": len(PROMPTS), "k": args.k, "max_tokens": 24}
    results["engine"] = {name: agreement(model, llm, d, args.k) for name, d in DECODINGS.items()}
    results["first_token"] = first_tokens(model, llm, args.draws)
    results["seeds"] = seeded(llm, args.k)
    hf = HfSampler(model, tokenizer, DECODINGS["plain"])
    sides = {"vllm_sampler": lambda: tokens(loaded, args.k), "hf_sampler": lambda: tokens(hf, args.k)}
    sides["vllm_n_at_once"] = lambda: n_at_once(llm, args.k)
    results["tokens_a_second_float32"] = in_turns(args.rounds, sides)
    llm.llm_engine.engine_core.shutdown()
    with served(args) as url:
        results["served"] = over_http(model, tokenizer, url, min(args.k, 16))
        plain = OpenAISampler(url, "policy", DECODINGS["plain"], tokenizer=tokenizer, logprobs="processed")
        each = replace(plain, most_at_once=1, concurrency=64)
        sides = {"n_at_once": lambda: tokens(plain, args.k), "each_its_own_seed": lambda: tokens(each, args.k)}
        results["served_tokens_a_second"] = in_turns(args.rounds, sides)
    print(save("vllm_sampler", results))


if __name__ == "__main__":
    main()

"""What TRL's own trainers converge to with CalibratedReward, against pi_ref e^{Phi(C)/beta} / Z, where they should.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py

Prints a table and writes benchmarks/results/convergence.json. Four prompts; completions of one token (8 of them) or of
up to two (57: the end token alone, or a letter and any token); a tiny real Llama whose reference is skewed; scores that
are sums of whole numbers, so that completions tie. The table's references are in the proportions of the reference
policy itself, K = 1000 a prompt by largest remainders: nothing is left to the luck of sampling but the training.

The target is enumerated in plain numpy, apart from the package: mid-ranks by counting, transforms by their formula,
beta by bisection so that its KL, averaged over the prompts, is 1. The trained policy is enumerated too: no sampling
stands between the last step's parameters and the total variation that is printed. Of GRPO the point is enumerated at
which its own gradient vanishes, which is another one where completions have more than one token.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from environment import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.transforms import Exponential, Identity, Log
from calibrated_rewards.training.check_settings.trl import grpo_settings, rloo_settings

LETTERS = "abcdefg"
EOS = len(LETTERS)
PROMPTS = ("ab", "cd", "ef", "ga")  # two letters: attention alone cannot tell "a" from "aa"
K, KL, SIZE = 1000, 1.0, 32
TRANSFORMS = {"identity": Identity(), "log": Log(), "e^{10u}": Exponential(10.0)}
# The same in plain numpy, on the unit scale.
FORMULAS = {
    "identity": lambda u: u,
    "log": lambda u: np.log(np.maximum(u, 0.5 / K)),
    "e^{10u}": lambda u: np.expm1(10 * u) / np.expm1(10),
}
# What all runs share, and is not about the objective.
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class TableScorer:
    """A reward model of a few levels, so that completions tie: written out by prompt and completion."""

    levels: tuple[tuple[str, tuple[float, ...]], ...]
    texts: tuple[str, ...]

    def __call__(self, prompts, completions):
        """The scores."""
        own = dict(self.levels)
        at = {text: i for i, text in enumerate(self.texts)}
        return np.array([own[p][at[c]] for p, c in zip(prompts, completions, strict=True)], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """All there is."""
        return {"scorer": "TableScorer", "levels": [list(row) for _, row in self.levels]}


@dataclass(frozen=True)
class Problem:
    """All completions as token lists, the reference policy's law of them for each prompt, and their scores."""

    length: int
    folder: str
    tokens: tuple[tuple[int, ...], ...]
    reference: np.ndarray  # (prompts, completions)
    scores: np.ndarray

    @property
    def texts(self) -> tuple[str, ...]:
        """The completions as TRL decodes them."""
        return tuple("".join(LETTERS[t] for t in own if t != EOS) for own in self.tokens)

    def counts(self) -> np.ndarray:
        """K references a prompt in the proportions of the reference policy, by largest remainders."""
        exact = self.reference * K
        whole = np.floor(exact).astype(int)
        order = np.argsort(whole - exact, axis=1, kind="stable")
        for row, best, left in zip(whole, order, K - whole.sum(axis=1), strict=True):
            row[best[:left]] += 1
        return whole

    def quantiles(self) -> np.ndarray:
        """(below + equal / 2) / K of each completion among the references, by counting."""
        own, other = self.scores[:, :, None], self.scores[:, None, :]
        return (((other < own) + 0.5 * (other == own)) * self.counts()[:, None, :]).sum(axis=2) / K

    def target(self, name: str) -> tuple[float, np.ndarray]:
        """beta, and pi_ref e^{Phi(C)/beta} / Z, whose KL to the reference is 1 on average over the prompts."""
        values = FORMULAS[name](self.quantiles())
        low, high = -12.0, 12.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.kl(self.tilted(values, np.exp(middle))) > KL else (low, middle)
        return float(np.exp(low)), self.tilted(values, np.exp(low))

    def tilted(self, values: np.ndarray, beta: float) -> np.ndarray:
        """pi_ref e^{values/beta} / Z."""
        weights = self.reference * np.exp((values - values.max(axis=1, keepdims=True)) / beta)
        return weights / weights.sum(axis=1, keepdims=True)

    def grpo_point(self, name: str, beta: float) -> np.ndarray:
        """Where GRPO's own gradient vanishes, for completions of one or two tokens.

        Its KL is a term of each token's loss, so a token has no credit for the KL of those after it. The last token is
        tilted as it should be; the first one by the mean reward that it leads to, not by that less the beta KL which
        it also leads to.
        """
        values = FORMULAS[name](self.quantiles())
        inner, mean = self.tilted(values, beta), np.empty_like(values)
        for first in {own[0] for own in self.tokens}:
            same = np.array([own[0] == first for own in self.tokens])
            inner[:, same] /= inner[:, same].sum(axis=1, keepdims=True)
            mean[:, same] = (inner * values)[:, same].sum(axis=1, keepdims=True)
            inner[:, same] *= self.reference[:, same].sum(axis=1, keepdims=True)
        weights = inner * np.exp((mean - mean.max(axis=1, keepdims=True)) / beta)
        return weights / weights.sum(axis=1, keepdims=True)

    def kl(self, law: np.ndarray) -> float:
        """KL to the reference, averaged over the prompts."""
        logs = np.log(np.maximum(law, 1e-300)) - np.log(self.reference)
        return float((law * logs).sum(axis=1).mean())

    def table(self) -> ReferenceTable:
        """The references as our own table."""
        counts = self.counts()
        return ReferenceTable.build(
            [(p, np.repeat(s, n)) for p, s, n in zip(PROMPTS, self.scores, counts, strict=True)]
        )

    def scorer(self) -> TableScorer:
        """The scores as our own scorer."""
        return TableScorer(tuple(zip(PROMPTS, map(tuple, self.scores.tolist()), strict=True)), self.texts)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and an end token that is also the padding: nothing else can be drawn."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"</s>": EOS}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", padding_side="left")


def problem(length: int, folder: str, seed: int = 0) -> Problem:
    """A saved reference policy, and its law by enumeration. Saved, because TRL reloads the reference from its files."""
    torch.manual_seed(seed)
    shape = {"hidden_size": SIZE, "intermediate_size": 2 * SIZE, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": EOS + 1, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=16, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2)  # a skewed reference
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    tokens = tuple(sequences(length))
    reference = law(model, tokens)
    return Problem(length, folder, tokens, reference, levels(tokens, np.random.default_rng(seed)))


def levels(tokens: tuple[tuple[int, ...], ...], rng: np.random.Generator) -> np.ndarray:
    """Scores for each prompt: sums of whole numbers that its tokens have at their places, so that many tie."""
    points = rng.integers(0, 6, (len(PROMPTS), len(tokens[-1]), EOS + 1))
    return np.array([[sum(own[i, t] for i, t in enumerate(each)) for each in tokens] for own in points], np.float32)


def sequences(length: int) -> list[tuple[int, ...]]:
    """All completions: they end with the end token, or at the length."""
    words = [w for n in range(length) for w in itertools.product(range(EOS), repeat=n)]
    return [(*w, EOS) for w in words] + list(itertools.product(range(EOS), repeat=length))


def law(model: LlamaForCausalLM, tokens: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The chance of each completion after each prompt, by one forward pass a prompt."""
    model.eval()
    padded = torch.tensor([[*own, *[EOS] * (len(tokens[-1]) - len(own))] for own in tokens])
    real = torch.tensor([[*[1.0] * len(own), *[0.0] * (len(tokens[-1]) - len(own))] for own in tokens])
    rows = []
    for prompt in PROMPTS:
        start = torch.tensor([[LETTERS.index(letter) for letter in prompt]]).expand(len(tokens), -1)
        with torch.inference_mode():
            logits = model(torch.cat([start, padded], dim=1)).logits[:, len(prompt) - 1 : -1].double()
        each = logits.log_softmax(-1).gather(2, padded[:, :, None])[:, :, 0]
        rows.append((each * real).sum(dim=1).exp().numpy())
    return np.stack(rows)


def trained(task: Problem, trainer: Any, settings: Any, reward: Any) -> np.ndarray:
    """The law of the policy after training, by enumeration."""
    model = LlamaForCausalLM.from_pretrained(task.folder)
    data = Dataset.from_dict({"prompt": list(PROMPTS)})
    run = trainer(model=model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=tokenizer())
    run.remove_callback(PrinterCallback)
    run.train()
    return law(run.model, task.tokens)


def measure(task: Problem, name: str, label: str) -> dict[str, Any]:
    """One run against its target."""
    beta, target = task.target(name)
    run = RUNS[label]
    reward = CalibratedReward(task.scorer(), task.table(), TRANSFORMS[name])
    with tempfile.TemporaryDirectory() as folder:
        group = GROUP[task.length]
        chosen = {**PLAIN, **SCHEDULE, **EFFORT[task.length], **run.settings(beta, group)}
        size = {"max_completion_length": task.length, "per_device_train_batch_size": len(PROMPTS) * group}
        settings = run.config(output_dir=folder, **size, **chosen)
        start = perf_counter()
        got = trained(task, run.trainer, settings, reward)
    distances = np.abs(got - target).sum(axis=1) / 2
    own = task.grpo_point(name, beta)
    grpo = {
        "grpo_point_tv": float((np.abs(own - target).sum(axis=1) / 2).mean()),
        "tv_to_grpo_point": float((np.abs(own - got).sum(axis=1) / 2).mean()),
    }
    return {
        "transform": name,
        "trainer": label,
        "tokens": task.length,
        "beta": beta,
        "steps": settings.max_steps,
        "group": group,
        "tv_mean": float(distances.mean()),
        "tv_worst": float(distances.max()),
        "tv_before": float((np.abs(task.reference - target).sum(axis=1) / 2).mean()),
        "kl": task.kl(got),
        **(grpo if label == "GRPO, recommended" else {}),
        "seconds": round(perf_counter() - start, 1),
    }


# Adam forgets fast, so that completions which have become rare still move; the rate falls to 0, and the noise with it.
SCHEDULE = {"lr_scheduler_type": "cosine", "adam_beta2": 0.95}
# By length: with 3e-3 and 16 completions a prompt, good pairs behind a rare first letter are lost before they are seen.
GROUP = {1: 16, 2: 32}
EFFORT = {1: {"max_steps": 600, "learning_rate": 3e-3}, 2: {"max_steps": 2000, "learning_rate": 1e-3}}


@dataclass(frozen=True)
class Run:
    """A trainer, and the settings that it is given for a beta."""

    trainer: Any
    config: Any
    recommended: Any = None
    has_beta: bool = True

    def settings(self, beta: float, group: int) -> dict[str, Any]:
        """All but what every run shares."""
        chosen = self.recommended(beta, group) if self.recommended else {"num_generations": group}
        return {**({"beta": beta} if self.has_beta else {}), **chosen}


RUNS = {
    "RLOO": Run(RLOOTrainer, RLOOConfig, rloo_settings),
    "GRPO, recommended": Run(GRPOTrainer, GRPOConfig, grpo_settings),
    "GRPO, its defaults and beta": Run(GRPOTrainer, GRPOConfig),
    "GRPO, its defaults": Run(GRPOTrainer, GRPOConfig, has_beta=False),
}
ORDER = (
    *((1, name, label) for name in TRANSFORMS for label in ("RLOO", "GRPO, recommended")),
    *((2, name, "RLOO") for name in TRANSFORMS),
    *((1, "log", label) for label in RUNS if "defaults" in label),
    *((2, name, "GRPO, recommended") for name in TRANSFORMS),
    (2, "log", "GRPO, its defaults and beta"),
)


def main() -> None:
    """All runs, printed and written one by one."""
    torch.set_num_threads(1)
    results = []
    print(
        f"{'tokens':>6} {'transform':<10} {'trainer':<28} {'beta':>7} {'KL':>6} {'TV mean':>8} {'worst':>8} {'s':>6} "
        f"{'GRPO point':>10} {'TV to it':>8}"
    )
    for tokens, name, label in ORDER:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(problem(tokens, folder), name, label)
        results.append(row)
        numbers = (
            f"{row['beta']:7.4f} {row['kl']:6.3f} {row['tv_mean']:8.5f} {row['tv_worst']:8.5f} {row['seconds']:6.1f}"
        )
        own = f" {row['grpo_point_tv']:10.5f} {row['tv_to_grpo_point']:8.5f}" if "grpo_point_tv" in row else ""
        print(f"{tokens:6} {name:<10} {label:<28} {numbers}{own}", flush=True)
        save("convergence", results)


if __name__ == "__main__":
    main()

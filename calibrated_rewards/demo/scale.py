"""How much of everything a demo does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes; the same ones give the same numbers."""

    prompts: int
    """To calibrate and to train on."""
    held_out: int
    """To evaluate on."""
    k: int
    """Rollouts of a prompt in the table."""
    tokens: int
    """Of a completion, at most."""
    texts: int
    """That each of the two reward models learns from."""
    steps: int
    """Of training, for each reward."""
    prompts_a_step: int
    completions: int
    """Of a prompt, in a step."""
    lr: float
    lora_rank: int
    lora_layers: int
    """The last ones, that have adapters."""
    m: int
    """Completions of a held-out prompt of each policy."""
    n: int = 4
    """Best of how many the policy will be served with."""
    kl: float = 0.5
    """How far from the reference, in nats, the trained policy shall be."""
    temperature: float = 0.8


FULL = Scale(24, 24, 48, 10, 1_500, 18, 8, 4, 3e-3, 16, 10, 12)
QUICK = Scale(6, 6, 16, 8, 0, 3, 2, 4, 1e-2, 2, 1, 8)

"""Random numbers that a forward draws in evaluation: the same ones each time, and none of the loop around it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SEED = 0


@contextmanager
def steady_draws(device: torch.device) -> Iterator[None]:
    """Give a forward one seed for what it draws (Reformer hashes by random directions, BigBird picks random blocks).

    The generators of torch and numpy are as they were afterwards: some models seed them in each forward.
    """
    gpu = device.type == "cuda"
    before = np.random.get_state()  # noqa: NPY002  # the generator that BigBird seeds
    try:
        with torch.random.fork_rng([device] if gpu else []):
            torch.default_generator.manual_seed(SEED)
            if gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002

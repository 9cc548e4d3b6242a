"""Random numbers of a forward: the same each time, and the generators around it stay as they were."""

import numpy as np
import torch

from calibrated_rewards.models.unchanged import steady_draws


def drawn() -> tuple[float, float]:
    """A number from torch's generator, and one from numpy's."""
    return float(torch.rand(())), float(np.random.rand())  # noqa: NPY002


def test_draws_are_the_same_each_time() -> None:
    """Whatever was drawn before, and whatever a forward seeds itself."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = [drawn() for _ in range(3)]
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    inside, outside = [], []
    for _ in range(3):
        outside.append(drawn())
        with steady_draws(torch.device("cpu")):
            inside.append(drawn())
            torch.manual_seed(7)
            np.random.seed(7)  # noqa: NPY002

    assert outside == expected
    assert len(set(inside)) == 1


def test_generators_are_put_back_after_an_error() -> None:
    """A forward that fails leaves them as they were, too."""
    before = torch.get_rng_state()
    try:
        with steady_draws(torch.device("cpu")):
            drawn()
            raise KeyError
    except KeyError:
        pass

    assert torch.equal(torch.get_rng_state(), before)

"""Several processes as one: `accelerate launch` starts them, each draws for its own prompts, gradients are averaged."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

Each = TypeVar("Each")


@dataclass(frozen=True)
class Together:
    """This process among those that train one policy; a single one does nothing here.

    >>> Together(1, 2).own(["a", "b", "c", "d"])
    ['b', 'd']
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Together":
        """As the environment of `accelerate launch`, or torchrun, says."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def check(self, prompts_a_step: int) -> None:
        """ValueError if a step's prompts cannot be shared out evenly: a mean of means would be another mean."""
        if prompts_a_step % self.size:
            raise ValueError(
                f"{self.size} processes need prompts_a_step to be a multiple of {self.size}, got {prompts_a_step}"
            )

    def own(self, asked: Sequence[Each]) -> list[Each]:
        """The part of a step that is this process's."""
        return list(asked[self.rank :: self.size])

    def seed(self, seed: int) -> None:
        """Other completions in each process; with one, what was seeded before goes on."""
        if self.size > 1:
            torch.manual_seed(seed + self.rank)

    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """The mean of all processes' gradients, in place of this one's."""
        for group in optimizer.param_groups if self.size > 1 else ():
            for weight in group["params"]:
                if weight.grad is not None:
                    distributed.all_reduce(weight.grad)
                    weight.grad /= self.size

    def means(self, told: Mapping[str, float]) -> dict[str, float]:
        """The mean over all processes of each number."""
        if self.size == 1:
            return dict(told)
        device = f"cuda:{torch.cuda.current_device()}" if distributed.get_backend() == "nccl" else "cpu"
        # float32, which every device has: these are for reading.
        values = torch.tensor(list(told.values()), device=device)
        distributed.all_reduce(values)
        return dict(zip(told, (values / self.size).tolist(), strict=True))

    def device(self, asked: str | None) -> Any:
        """Where this process's model goes: as asked, or a GPU of its own if there is one."""
        if asked is not None or not torch.cuda.is_available():
            return asked or "cpu"
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


def learned(model: Any) -> list[Any]:
    """The weights that are trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]

"""The processes that train together: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from space.errors import refuse

WAIT = datetime.timedelta(hours=2)
"""How long processes wait for each other: the first prepares data and teacher for all."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among `world` processes, and the device that is its own."""

    rank: int
    world: int
    device: str

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes; with one, it is the tensor itself."""
        if self.world == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total

    def wait(self) -> None:
        """Wait for all."""
        if self.world > 1:
            distributed.barrier()

    def agree(self, model: nn.Module) -> None:
        """Give all processes the first one's buffers: each batch norm has seen its own images."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over all processes."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)


def world_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Read (rank, world, local rank) as torchrun sets them, or be alone. Raises InputError."""
    found = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = environment.get(name, str(default))
        if not text.isdigit():
            raise refuse(name, text, "an integer >= 0", "start with torchrun, or unset it")
        found.append(int(text))
    rank, world, local = found
    if not rank < max(world, 1):
        raise refuse("RANK", rank, f"less than WORLD_SIZE={world}", "start with torchrun")
    return rank, max(world, 1), local


@contextmanager
def together(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, over gloo on CPUs and nccl on GPUs; or be alone.

    Of "cuda" each process takes the GPU of its local number. Raises InputError.
    """
    rank, world, local = world_of()
    if world == 1:
        yield Ranks(0, 1, device)
        return
    cuda = device.startswith("cuda")
    if cuda:
        if local >= torch.cuda.device_count():
            got = f"{torch.cuda.device_count()} GPUs for local process {local}"
            raise refuse("--device", got, "a GPU for each process", "start fewer with torchrun")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield Ranks(rank, world, device)
    finally:
        distributed.destroy_process_group()

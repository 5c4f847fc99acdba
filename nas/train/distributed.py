"""The processes of a distributed training: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from space.errors import InputError, refuse

WAIT = datetime.timedelta(hours=2)
"""How long processes wait for each other: one of them prepares data and teacher for all."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` processes, and its device."""

    rank: int
    world: int
    device: str

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on this one's device."""
        if self.world == 1:
            return value
        total = value.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total

    def gather(self, value: str) -> list[str]:
        """Return the value of each process, to all of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return [str(each) for each in found]

    def check_same(self, name: str, value: str, remedy: str) -> None:
        """Refuse a value that differs between processes. All of them call this."""
        found = self.gather(value)
        if len(set(found)) > 1:
            raise refuse(name, " and ".join(dict.fromkeys(found)), "one for all processes", remedy)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise an `InputError` of one process in all of them."""
        message = ""
        try:
            yield
        except InputError as error:
            message = str(error) or "refused"
        for rank, text in enumerate(self.gather(message)):
            if text:
                raise InputError(text if rank == 0 else f"process {rank}: {text}")

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            distributed.barrier()

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers to all: each batch norm has seen its own images."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a model whose gradients are averaged over all processes."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)


def world_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Read (rank, world, local rank) as torchrun sets them, else (0, 1, 0). Raises InputError."""
    found = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = environment.get(name, str(default))
        if not (text.isascii() and text.isdecimal()):
            raise refuse(name, text, "an integer >= 0", "start with torchrun, or unset it")
        found.append(int(text))
    rank, world, local = found
    if not rank < max(world, 1):
        raise refuse("RANK", rank, f"less than WORLD_SIZE={world}", "start with torchrun")
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if world > 1 and missing:
        remedy = "start with torchrun, or unset WORLD_SIZE"
        raise refuse(", ".join(missing), "nothing", "where the first of the processes listens", remedy)
    return rank, max(world, 1), local


def local_world(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many of the processes run on this machine."""
    text = environment.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isascii() and text.isdecimal() and int(text) else 1


@contextmanager
def init_distributed(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, over gloo on CPUs and nccl on GPUs.

    On "cuda" each process takes the GPU of its local rank. Raises InputError.
    """
    rank, world, local = world_of()
    if world == 1:
        yield Ranks(0, 1, device)
        return
    cuda = device.startswith("cuda")
    if cuda:
        here, gpus = local_world(), torch.cuda.device_count()
        if here > gpus:
            got = f"{gpus} GPUs for {here} processes here"
            raise refuse("--device", got, "a GPU for each process", "start fewer with torchrun")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield Ranks(rank, world, device)
    finally:
        distributed.destroy_process_group()

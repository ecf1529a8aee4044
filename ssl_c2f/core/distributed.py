"""The processes of a job: one, or those that torchrun started. With one process every call returns at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_c2f.core.options import UserError


@dataclass(frozen=True)
class Dist:
    """This process among the `world` processes of the job. Every method must be called by all of them."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: how all of them stop at the same step when one gets a signal."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes: (...) -> (...), a new tensor on this process's device."""
        total = tensor.detach().to(self.device, copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """The `value` of every process, which must be picklable, in the order of ranks."""
        parts: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, value)
        return parts

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, which must be picklable."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]


class _AllRows(torch.autograd.Function):
    """Rows of all processes. torch's own (`torch.distributed.nn`) has wrong gradients with gloo in torch 2.14."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def all_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The (n, ...) rows of all processes, (world n, ...) in the order of ranks, and this process's rank. Gradients flow
    back to the process that a row is from, and are summed there: DDP's mean of them is that of the mean loss."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    found: Tensor = _AllRows.apply(rows.contiguous())  # type: ignore[no-untyped-call]
    return found, dist.get_rank()


def init(device: str = "auto", timeout_minutes: float = 30.0) -> Dist:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), if it did.

    `device` is "cpu", "cuda" or "auto" for CUDA where there is any. Calling it again changes nothing. A process that
    waits for another longer than `timeout_minutes` fails instead of hanging.
    """
    rank, world, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: there is none here, or this build of torch cannot use it")
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Dist(rank, world, local_rank, place)

"""The processes that work on one store together, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A process waits for the others as long as their share of a corpus takes; one that died is told of by the launcher.
_PATIENCE = timedelta(days=7)


class Ranks:
    """This process among ``size``; objects and tensors are exchanged on the CPU where the group allows it.

    Args:
        group: a ``torch.distributed`` process group; default all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # NCCL moves tensors of GPUs only.
        on_gpu = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @classmethod
    def from_environment(cls) -> Ranks | None:
        """The processes that a launcher started (``RANK``, ``WORLD_SIZE``); None if this one is alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls()

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """Every process's ``tensor``, in the order of their ranks; all of one shape and dtype."""
        own = tensor.to(self.device).contiguous()
        tensors = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(tensors, own, group=self.group)
        return [part.to(tensor.device) for part in tensors]

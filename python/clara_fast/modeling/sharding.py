"""Parameters that FSDP2 has spread over processes (DTensors): read and written as if they were whole.

Told by what a DTensor can do, so that nothing of ``torch.distributed`` is imported where there is one process.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# What checkpoints of activations, switched on in FSDP's options, put into the names of what they wrap.
_WRAPPED = "_checkpoint_wrapped_module."


def plain_name(name: str) -> str:
    """A parameter's name as it is without wrappers around its layer."""
    return name.replace(_WRAPPED, "")


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor itself, or the parts of all processes put together: each of them must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def assign(target: Any, value: Tensor) -> None:
    """Copy ``value``, which is whole, into ``target``; of one that is sharded, every process writes its own part."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.data.copy_(value)

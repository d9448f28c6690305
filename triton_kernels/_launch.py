"""What the launchers share."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
from torch import Tensor

# The interpreter computes bfloat16 wrongly: kernels then widen what they load at once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_guard(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)


@lru_cache(maxsize=16)
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def num_splits(pieces: int, size: int, device: torch.device, most: int = 16) -> int:
    """Programs per piece of work so that ``pieces`` of them fill the device about four times over."""
    wanted = triton.cdiv(4 * num_processors(device), max(pieces, 1))
    return max(min(wanted, size, most), 1)


def warps_for(block: int) -> int:
    """Threads for a block of float32 numbers in registers: 16 to 32 numbers each."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16

"""What the launchers share: device, interpreter, how much to split, and which configuration a kernel runs with."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

# The interpreter computes bfloat16 wrongly: kernels then widen what they load at once.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"

# A configuration: blocks, num_warps and num_stages.
Blocks = dict[str, int]

_autotuning = os.environ.get("CLARA_FAST_AUTOTUNE", "0") == "1"


def autotune(enabled: bool = True) -> None:
    """Lets kernels try a few configurations around the usual one at their first call (``CLARA_FAST_AUTOTUNE=1``).

    Triton keeps the fastest on disk, beside its compiled kernels. Trying waits for the device, so it has to happen
    before a CUDA graph is captured.
    """
    global _autotuning
    _autotuning = enabled


def autotuning() -> bool:
    return _autotuning


@lru_cache(maxsize=256)
def _autotuner(kernel: Any, candidates: tuple[tuple[tuple[str, int], ...], ...], key: tuple[str, ...]) -> Any:
    configs = []
    for candidate in candidates:
        blocks = dict(candidate)
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages") if name in blocks}
        configs.append(triton.Config(blocks, **options))
    cached = "cache_results" in inspect.signature(triton.autotune).parameters
    return triton.autotune(configs, key=list(key), **({"cache_results": True} if cached else {}))(kernel)


def launch(
    kernel: Any, grid: tuple[int, ...] | Callable, *arguments: Any, candidates: list[Blocks], **constants: Any
) -> None:
    """``kernel[grid](*arguments, ...)`` with the first of ``candidates`` or, where autotuning is on, the fastest.

    ``grid`` may be a function of the blocks.
    """
    if _autotuning and len(candidates) > 1 and not INTERPRETING:
        choices = tuple(tuple(blocks.items()) for blocks in candidates)
        _autotuner(kernel, choices, tuple(constants))[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants, **candidates[0])


def device_guard(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor or, if its address is no multiple of 16 bytes as that of an allocation is, a copy."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def padded(tensor: Tensor) -> Tensor:
    """The tensor or, if its last dimension is no multiple of 16, a copy with zeros up to one.

    Triton compiles a kernel again for sizes and strides that are no multiples of 16, and loads element by element.
    """
    odd = -tensor.shape[-1] % 16
    return torch.nn.functional.pad(tensor, (0, odd)) if odd else tensor


@lru_cache(maxsize=16)
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100, ..."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_splits(pieces: int, most: int, device: torch.device, per_processor: int = 4) -> int:
    """Programs per piece of work, at most ``most``, so that ``pieces`` of them fill the device a few times over.

    From shapes and the device alone: the grid is known without a look at the data, and sums are taken in one order.
    """
    wanted = triton.cdiv(per_processor * num_processors(device), max(pieces, 1))
    return max(min(wanted, most), 1)

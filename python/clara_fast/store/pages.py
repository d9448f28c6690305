"""Pages of mapped files: bringing them into the system's cache at the disk's rate, and letting them go."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

# Small reads at first let the system's read-ahead grow from small pages to large ones, which are mapped faster.
_READ_BYTES = 64 << 10
# One page in so many bytes is asked for: what brings pages in and what drops them works in larger pieces.
_PROBE_BYTES = 1 << 20


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forget(mapped: Tensor) -> None:
    """Let the pages under a mapped tensor go from this process; the system's cache keeps them."""
    # Elsewhere MADV_DONTNEED has other meanings, or none. On Linux it drops the pages of a file from this process
    # only: touching them again maps them again.
    if (libc := _linux()) is not None and mapped.numel():
        start, size = _pages(mapped)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def bring(mapped: Tensor, path: Path, start: int) -> None:
    """Have the pages under a mapped tensor in the system's cache, as far as they fit; nothing is done if they are.

    Touching a map reads the disk at less than half its rate, and leaves single pages in the cache, which every later
    search maps one by one. A hint only: what cannot be read here is told when the map is touched.

    Args:
        mapped: contiguous.
        path: the file.
        start: where in the file the tensor begins.
    """
    if all(_probes(mapped)):
        return
    left = mapped.numel() * mapped.element_size()
    buffer = memoryview(bytearray(_READ_BYTES))
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left > 0 and (count := file.readinto(buffer[:left])):
            left -= count


def _probes(mapped: Tensor) -> Iterator[bool]:
    """Whether some pages, spread evenly, are in the system's cache; nothing where it does not say."""
    if (libc := _linux()) is None or not mapped.numel():
        return
    start, size = _pages(mapped)
    found = ctypes.c_ubyte()
    for offset in range(0, size, _PROBE_BYTES):
        failed = libc.mincore(ctypes.c_void_p(start + offset), ctypes.c_size_t(1), ctypes.byref(found))
        yield bool(failed) or bool(found.value & 1)


def _pages(mapped: Tensor) -> tuple[int, int]:
    """Address of the first page, and bytes up to the tensor's end."""
    address = mapped.data_ptr()
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return start, address + mapped.numel() * mapped.element_size() - start


@functools.cache
def _linux() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MADV_DONTFORK") else None

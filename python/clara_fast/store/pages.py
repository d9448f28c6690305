"""Pages of mapped files: bringing them into the system's cache in large pieces, and letting them go."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from pathlib import Path

import numpy as np
from torch import Tensor

_HUGE = 2 << 20
# How far apart a tensor is looked at to see whether it is in the cache, which loses pages by the thousand.
_PROBE_BYTES = 32 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, which Python does not name yet


def forget(mapped: Tensor) -> None:
    """Let the pages under a mapped tensor go from this process; the system's cache keeps them."""
    # Elsewhere MADV_DONTNEED has other meanings, or none. On Linux it drops the pages of a file from this process
    # only: touching them again maps them again.
    if (libc := _linux()) is not None and mapped.numel():
        start, size = _pages(mapped)
        libc.madvise(start, size, mmap.MADV_DONTNEED)


def bring(path: Path, start: int, size: int) -> None:
    """Have a file's bytes in the system's cache, as far as they fit, in pages as large as the system gives.

    Read in pieces of 2 MB they become pages of 2 MB, which cost next to nothing to map and to let go, and the disk
    gives its full rate. Touching a map in the common way brings single pages, which every later search would map one
    by one, for as long as it then takes to read them. A hint only: where huge pages are not to be had, or the file is
    not, nothing is done, and touching the map brings what it brings.

    Args:
        path: the file.
        start, size: which bytes.
    """
    if (libc := _linux()) is None or start < 0 or size <= 0:
        return
    # ValueError: the file is empty.
    with (
        contextlib.suppress(OSError, ValueError),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        view.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        for offset in range(start // _HUGE * _HUGE, min(start + size, len(view)), _HUGE // 2):
            if not _is_cached(libc, address + offset):
                # Not a plain access, which would hold the interpreter for as long as the disk takes.
                libc.madvise(address + offset, mmap.PAGESIZE, _POPULATE_READ)


def cached(mapped: Tensor) -> bool:
    """Whether the pages under a mapped tensor are in the system's cache, as far as some that are spread evenly tell."""
    if (libc := _linux()) is None or not mapped.numel():
        return True
    start, size = _pages(mapped)
    return all(_is_cached(libc, start + offset) for offset in range(0, size, _PROBE_BYTES))


def _is_cached(libc: ctypes.CDLL, address: int) -> bool:
    """Whether a page is in the system's cache; True where that cannot be told."""
    found = ctypes.c_ubyte()
    failed = libc.mincore(address, 1, ctypes.byref(found))
    return bool(failed) or bool(found.value & 1)


def _pages(mapped: Tensor) -> tuple[int, int]:
    """Address of the first page, and bytes up to the tensor's end."""
    address = mapped.data_ptr()
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    return start, address + mapped.numel() * mapped.element_size() - start


@functools.cache
def _linux() -> ctypes.CDLL | None:
    if not (hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MADV_DONTFORK")):
        return None
    libc = ctypes.CDLL(None)
    # Said once: a search calls these between blocks, while the threads that compare wait.
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc

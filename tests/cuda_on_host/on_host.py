"""Builds the CUDA kernels for this CPU and runs them: see cuda_on_host.h."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
# Bytes of shared memory of a multiprocessor; a block may have all but 1024 of them.
H100_SHARED = 228 << 10
A100_SHARED = 164 << 10
SMALLEST_SHARED = 100 << 10  # sm_86, sm_89 and sm_120


@dataclass(frozen=True)
class Found:
    """What the kernels returned, and how they were laid out."""

    scores: Tensor
    indices: Tensor
    bank_conflicts: int
    queries_per_tile: int
    parts: int
    in_shared: bool
    copy_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a problem would be laid out."""

    queries_per_tile: int
    query_tiles: int
    parts: int
    shared_bytes: int
    merge_shared_bytes: int
    in_shared: int
    workspace_bytes: int


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: Path) -> Path:
    program = folder / "cosine_topk"
    command = [compiler(), "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DCLARA_FAST_CUDA_ON_HOST", f"-I{HERE}", f"-I{SOURCES}", HERE / "cosine_topk.cpp", "-o", program]
    subprocess.run(command, check=True)
    return program


def _header(query_dtype: torch.dtype, key_dtype: torch.dtype, *numbers: int) -> bytes:
    return struct.pack("10q", _TYPES[query_dtype], _TYPES[key_dtype], *numbers)


def plans(program: Path, problems: list[tuple]) -> list[Plan]:
    """For (query dtype, key dtype, queries, keys, columns, k, multiprocessors, bytes of shared memory) of each."""
    headers = b"".join(_header(*problem[:6], 0, 0, *problem[6:]) for problem in problems)
    result = subprocess.run([program, "plan"], input=headers, capture_output=True, check=True)
    return [Plan(*numbers) for numbers in struct.iter_unpack("7q", result.stdout)]


def cosine_topk(
    program: Path,
    queries: Tensor,
    keys: Tensor,
    k: int,
    key_scales: Tensor | None = None,
    *,
    seed: int = 0,
    multiprocessors: int = 2,
    shared: int = H100_SHARED,
) -> Found:
    """Runs the kernels as on a device of so many multiprocessors; ``seed`` changes the order of its threads."""
    header = _header(
        *(queries.dtype, keys.dtype, len(queries), *keys.shape, k, key_scales is not None, seed),
        *(multiprocessors, shared),
    )
    tensors = [queries, keys] if key_scales is None else [queries, keys, key_scales]
    data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    result = subprocess.run([program], input=header + data, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr.decode()}"
    conflicts, tile, parts, in_shared, copy_bytes = struct.unpack("5q", result.stdout[:40])
    middle = 40 + 4 * len(queries) * k
    scores = torch.frombuffer(bytearray(result.stdout[40:middle]), dtype=torch.float32)
    indices = torch.frombuffer(bytearray(result.stdout[middle:]), dtype=torch.int64)
    shape = (len(queries), k)
    return Found(scores.view(shape), indices.view(shape), conflicts, tile, parts, bool(in_shared), copy_bytes)

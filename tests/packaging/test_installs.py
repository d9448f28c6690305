"""Wheels installed into fresh environments: the kernels load and are right, on more than one torch."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from tests.packaging import fresh
from tests.packaging.conftest import HOUSE, Wheel, run

# Prints what is loaded, and the largest error of the operators against float64.
PROBE = """
import json, sys
import torch, clara_fast
from clara_fast import ops
from clara_fast.ops import _library, reference

queries, keys = torch.randn(3, 40), torch.randn(50, 40)
hidden, offsets = torch.randn(30, 40), torch.tensor([0, 12, 30], dtype=torch.int32)
scores, rows = ops.cosine_topk(queries, keys, 5)
memory, mse = ops.pool_memory(hidden, offsets, 2)
exact = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(keys.double()).T
exact_memory, exact_mse = reference.pool_memory(hidden.double(), offsets, 2)
pairs = (scores, exact.topk(5).values), (exact.gather(1, rows), exact.topk(5).values), (mse, exact_mse)
maps = open("/proc/self/maps").read()
print(json.dumps({
    "package": clara_fast.__file__,
    "version": clara_fast.__version__,
    "torch": torch.__version__,
    "cuda_torch": torch.version.cuda is not None,
    "cpu_kernels": sorted(_library.native),
    "cuda_kernels": sorted(_library.native_cuda),
    "cuda_library": "clara_fast_cuda.so" in maps,
    "cuda_initialised": torch.cuda.is_initialized(),
    "error": max((a.double() - b).abs().max().item() for a, b in pairs),
}))
"""
# On a CPU torch the CUDA library's functions have nothing to call, but it does load lazily and registers.
REGISTRATIONS = """
import ctypes, os, sys
import torch
from clara_fast.ops import _library

ctypes.CDLL(sys.argv[1], os.RTLD_LAZY)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*sorted(name for name in _library.NATIVE_SCHEMAS if has(f"clara_fast_native::{name}", "CUDA")))
"""


def registered(device: str) -> list[str]:
    source = (HOUSE / "csrc" / f"register_{device}.cpp").read_text()
    return sorted(re.findall(r'm\.impl\("(\w+)"', source))


def installed(python, wheel: Wheel) -> dict:
    fresh.install(python, "--no-deps", "--force-reinstall", "--no-index", wheel.path)
    facts = json.loads(run(python, "-W", "error", "-c", PROBE, cwd="/").stdout)
    assert facts["package"].startswith(str(python.parents[1]))
    assert facts["version"].endswith("+cpu" if wheel.kind == "cpu" else f"+cu{wheel.kind}")
    assert facts["cpu_kernels"] == registered("cpu")
    assert facts["error"] < 1e-5
    assert not facts["cuda_initialised"]
    return facts


def test_runs_in_a_fresh_environment(wheel, tmp_path):
    facts = installed(fresh.environment(tmp_path), wheel)
    if not facts["cuda_torch"]:
        assert not facts["cuda_library"]
        assert facts["cuda_kernels"] == []


def test_cuda_library_registers_every_operator(cuda_wheel, tmp_path):
    python = fresh.environment(tmp_path)
    fresh.install(python, "--no-deps", "--no-index", cuda_wheel.path)
    (library,) = cuda_wheel.unpacked.rglob("clara_fast_cuda.so")
    assert run(python, "-c", REGISTRATIONS, library, cwd="/").stdout.split() == registered("cuda")


@pytest.fixture(scope="module")
def second_torch(tmp_path_factory):
    """An environment with the torch that CLARA_FAST_SECOND_TORCH names: gigabytes, so removed at once."""
    requirement = os.environ.get("CLARA_FAST_SECOND_TORCH")
    if not requirement:
        pytest.skip("CLARA_FAST_SECOND_TORCH names no torch, such as torch==2.14.1")
    folder = tmp_path_factory.mktemp("second_torch")
    if (free := shutil.disk_usage(folder).free) < 15e9:
        pytest.skip(f"a second torch needs 15 GB of disk, free: {free / 1e9:.0f} GB")
    python = fresh.environment(folder)
    try:
        fresh.install(python, "--no-cache-dir", "--ignore-installed", requirement)
        yield python
    finally:
        shutil.rmtree(folder)


def test_runs_on_a_second_torch(wheel, second_torch):
    facts = installed(second_torch, wheel)
    expected = registered("cuda") if facts["cuda_torch"] and wheel.kind != "cpu" else []
    assert facts["cuda_kernels"] == expected
    assert facts["cuda_library"] == bool(expected)
    wanted = re.search(r"==([0-9.]+)", os.environ["CLARA_FAST_SECOND_TORCH"])
    assert wanted is None or facts["torch"].startswith(wanted[1])

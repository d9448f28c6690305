"""The CUDA library compiles, loads and registers without a GPU, and its kernels take what the recorded table says."""

import json
import re
import subprocess
import sys

import pytest

from clara_fast.ops import _library
from tests.packaging import cuda_library

TABLE = json.loads(cuda_library.TABLE.read_text())
reason = cuda_library.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"the CUDA library cannot be built here: {reason}")

# Threads of a block, and blocks that a multiprocessor's 65,536 registers are to hold: csrc/cuda/search.h.
SEARCH_THREADS = 128
RESIDENT = {"8": 4, "32": 2, "64": 2}


@pytest.fixture(scope="module")
def library(cuda_wheel):
    """For sm_90a, out of the wheel: compiled once for all tests."""
    return next(path for path in cuda_wheel.binaries() if path.name == "clara_fast_cuda.so")


def test_registers_every_operator(library):
    names = cuda_library.registered()
    assert set(names) <= _library.NATIVE_SCHEMAS.keys()
    assert {"cosine_topk", "cosine_topk_out", "cosine_topk_workspace", "cuda_has_image"} <= set(names)
    code = (
        "import ctypes, os, sys, torch; from clara_fast.ops import _library;"
        "has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key(f'clara_fast_native::{name}', 'CUDA');"
        "names = sys.argv[2:]; assert torch.version.cuda or not any(map(has, names));"
        "ctypes.CDLL(sys.argv[1], os.RTLD_LAZY);"
        "missing = [name for name in names if not has(name)]; assert not missing, missing"
    )
    cuda_library.run(sys.executable, "-c", code, library, *names)


def test_uses_the_stable_interface_only(library):
    wanted = cuda_library.run("nm", "-D", "--undefined-only", library)
    from_torch = set(re.findall(r"\b(?:aoti_)?torch_\w+", wanted))
    assert "aoti_torch_get_current_cuda_stream" in from_torch
    assert not re.search(r"\b_Z\w*(?:c10|2at|5torch)", wanted)  # nothing of torch by C++ name
    assert not re.search(r"\bcuda[A-Z]\w+", wanted)  # its runtime is inside
    offered = cuda_library.run("nm", "-D", "--defined-only", library)
    assert not re.search(r"\bcuda\w+|\b_Z\w*clara_fast", offered)
    assert "libcudart" not in cuda_library.run("readelf", "-d", library)


def assert_resources(architecture, library):
    found = cuda_library.resources(library)
    assert found.keys() == TABLE.keys() - {"nvcc"}
    version = re.search(r"release ([\d.]+)", cuda_library.run("nvcc", "--version"))[1]
    for name, numbers in found.items():
        assert numbers["stack"] == 0, f"{name} spills"
        if tile := re.search(r"(\d+)_queries", name):
            assert numbers["registers"] * SEARCH_THREADS * RESIDENT[tile[1]] <= 65536
        if version == TABLE["nvcc"]:
            assert numbers == TABLE[name][architecture], (
                "if that is meant: python -m tests.packaging.cuda_library > tests/packaging/cuda_resources.json"
            )


def test_resources(library):
    assert_resources("90a-real", library)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [one for one in cuda_library.ARCHITECTURES if one != "90a-real"])
def test_resources_of_other_architectures(architecture):
    assert_resources(architecture, cuda_library.build(architecture))


def test_off_and_wrong_settings_are_said(tmp_path):
    def configure(value):
        command = ["cmake", "-G", "Ninja", "-S", cuda_library.ROOT, "-B", tmp_path / value]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCLARA_FAST_BUILD_CUDA={value}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "no CUDA library in this build: CLARA_FAST_BUILD_CUDA is OFF" in configure("OFF").stdout
    wrong = configure("YES")
    assert wrong.returncode != 0
    assert "CLARA_FAST_BUILD_CUDA (YES) must be AUTO, ON or OFF" in " ".join(wrong.stderr.split())

"""Every Triton kernel compiles without a GPU, spills nothing, and takes of one what the recorded table says."""

import json

import pytest

triton = pytest.importorskip("triton")

import triton_compile  # noqa: E402

TABLE = json.loads(triton_compile.TABLE.read_text())
CASES = [
    pytest.param(name, architecture, marks=[] if architecture == 90 else pytest.mark.slow)
    for architecture in triton_compile.ARCHITECTURES
    for name in triton_compile.variants(architecture)
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_resources(name, architecture):
    case = triton_compile.variants(architecture)[name]
    found = triton_compile.resources(triton_compile.compile_kernel(*case, architecture))
    assert found["shared"] <= triton_compile.MOST_SHARED[architecture]
    if triton.__version__ == TABLE["triton"]:
        assert found["stack"] == 0
        assert found == TABLE[name][f"sm_{architecture}"], (
            "if that is meant: python tests/ops/triton_compile.py > tests/ops/triton_resources.json"
        )
    else:
        # Another compiler allocates otherwise, but not at random.
        assert found["stack"] <= 128


def test_table_has_every_kernel():
    for architecture in triton_compile.ARCHITECTURES:
        recorded = {name for name, row in TABLE.items() if name != "triton" and f"sm_{architecture}" in row}
        assert recorded == triton_compile.variants(architecture).keys()


def test_blocks_fit_the_processors_with_little_shared_memory():
    """sm_86, sm_89 and sm_120 take sm_80's blocks and have 99 KB."""
    for name, row in TABLE.items():
        assert name == "triton" or row["sm_80"]["shared"] <= 99 * 1024, name

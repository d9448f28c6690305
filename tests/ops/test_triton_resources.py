"""Every Triton kernel compiles without a GPU, spills nothing, and takes of one what the recorded table says.

The table has every configuration, and is held to the launchers and to the kernels' code; the most demanding ones of
each kernel are compiled anew here, and the rest in the slow tests.
"""

import json

import pytest

triton = pytest.importorskip("triton")

import triton_compile  # noqa: E402
from triton_compile import ARCHITECTURES, configurations  # noqa: E402

TABLE = json.loads(triton_compile.TABLE.read_text())
UPDATE = "to record them: python tests/ops/triton_compile.py"


def rows(architecture):
    """What was recorded; null stands for what was not compiled yet."""
    return {name: row for name, row in TABLE[f"sm_{architecture}"].items() if row is not None}


def most_demanding(architecture):
    """Of each kernel, the recorded configuration of most registers and, among these, of most shared memory."""
    names = sorted(rows(architecture), key=lambda name: rows(architecture)[name][::2])
    return [(architecture, name) for name in {name.split()[0]: name for name in names}.values()]


def check(places):
    for (architecture, name), found in triton_compile.compile_all(places).items():
        _, stack, shared = found
        assert stack == 0, (architecture, name)
        assert shared <= triton_compile.MOST_SHARED[architecture], (architecture, name)
        # Another compiler allocates otherwise.
        if triton.__version__ == TABLE["triton"] and name in rows(architecture):
            assert list(found) == rows(architecture)[name], (architecture, name, UPDATE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_table_lists_what_the_launchers_can_choose(architecture):
    assert TABLE[f"sm_{architecture}"].keys() == configurations(architecture).keys(), UPDATE


@pytest.mark.parametrize("family", triton_compile.FAMILIES)
def test_table_is_of_the_kernels_as_they_are(family):
    assert TABLE["code"][family] == triton_compile.fingerprint(family), UPDATE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_and_everything_fits(architecture):
    # sm_86, sm_89 and sm_120 take sm_80's blocks and have 99 KB.
    most = 99 * 1024 if architecture == 80 else triton_compile.MOST_SHARED[architecture]
    for name, (_, stack, shared) in rows(architecture).items():
        assert stack == 0, name
        assert shared <= most, name


def test_most_demanding_configurations():
    check([place for architecture in ARCHITECTURES for place in most_demanding(architecture)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_configurations(architecture):
    check([(architecture, name) for name in configurations(architecture)])

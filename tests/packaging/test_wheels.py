"""What the wheels hold, what their binaries ask of a system, and the scripts that build them."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest

from tests.packaging.conftest import HOUSE, run

PYPROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
LIBRARIES = {"cpu": {"clara_fast_cpu.so"}, "130": {"clara_fast_cpu.so", "clara_fast_cuda.so"}}
# glibc is in pieces before 2.34, and its names stay on newer systems.
SYSTEM = {
    "libc",
    "libm",
    "libdl",
    "librt",
    "libpthread",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
    "libstdc++",
    "libgcc_s",
}
NEEDED = {"_native": SYSTEM, "clara_fast_cpu": SYSTEM | {"libtorch"}, "clara_fast_cuda": SYSTEM | {"libtorch"}}
SYSTEM_VERSIONS = re.compile(r".+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+")
FROM_LOADER = re.compile(r"__gmon_start__|_ITM_(de)?registerTMCloneTable")
STABLE = re.compile(r"(aoti_)?torch_[a-z0-9_]+")
PYTHON_API = re.compile(r"_?Py[A-Za-z0-9_]+")
STABLE_HEADERS = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/shim.h")


def script(name):
    spec = importlib.util.spec_from_file_location(f"clara_fast_{name}", HOUSE / "cmake" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Contents


def test_holds_the_package_and_nothing_else(wheel):
    held = {str(path.relative_to(wheel.unpacked)) for path in wheel.unpacked.rglob("*") if path.is_file()}
    held = {name for name in held if ".dist-info/" not in name}
    sources = {
        f"{target}/{path.relative_to(HOUSE / folder)}"
        for target, folder in PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"].items()
        for path in (HOUSE / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "results"} & set(path.parts)
    }
    binaries = {name for name in held if name.endswith(".so")}
    assert {"clara_fast/py.typed", "clara_fast/triton_kernels/pool_memory.py"} <= sources
    assert any(name.startswith("clara_fast/assets/demo/") for name in sources)
    assert held - binaries == sources
    assert {Path(name).name.partition(".")[0] for name in binaries} == {
        "_native",
        *(name.removesuffix(".so") for name in LIBRARIES[wheel.kind]),
    }


def test_is_labelled(wheel):
    (metadata,) = wheel.unpacked.glob("*.dist-info/METADATA")
    version = Parser().parsestr(metadata.read_text())["Version"]
    assert version == script("version").dynamic_metadata({}, {})["version"] + (
        "+cpu" if wheel.kind == "cpu" else f"+cu{wheel.kind}"
    )
    assert wheel.path.name.startswith(f"clara_fast-{version}-cp{sys.version_info.major}{sys.version_info.minor}-")


def test_auditwheel_agrees_with_its_tag(wheel):
    tag = wheel.path.stem.rpartition("-")[2]
    assert re.fullmatch(rf"manylinux_2_[0-9]+_{platform.machine()}", tag)
    verdict = run(sys.executable, "-m", "auditwheel", "show", wheel.path).stdout
    assert f'constrains the platform tag to "{tag}"' in " ".join(verdict.split())


def test_building_downloads_no_torch(wheel):
    assert not any("torch" in name for name in PYPROJECT["build-system"]["requires"])
    assert "Installing build dependencies" in wheel.log
    assert not re.search(r"(Collecting|Downloading|Using cached|Processing)[^\n]*torch-?[0-9=]", wheel.log)


# Binaries


def test_needs_only_libtorch_and_the_system(wheel):
    for binary in wheel.binaries():
        dynamic = run("readelf", "--wide", "--dynamic", binary).stdout
        needed = {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)}
        assert needed <= NEEDED[binary.name.partition(".")[0]], binary.name
        assert ("libtorch" in needed) == ("clara_fast" in binary.name)
        assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), f"{binary.name} looks for libraries in a fixed folder"


def test_uses_no_symbol_outside_the_stable_abi(wheel):
    for binary in wheel.binaries():
        foreign = PYTHON_API if binary.name.startswith("_native") else STABLE
        lines = run("nm", "--dynamic", "--undefined-only", binary).stdout.splitlines()
        names = [line.split()[-1] for line in lines]
        allowed = (SYSTEM_VERSIONS, FROM_LOADER, foreign)
        assert [name for name in names if not any(rule.fullmatch(name) for rule in allowed)] == [], binary.name
        assert any(foreign.fullmatch(name) for name in names)


def test_offers_no_symbol_of_cuda_or_torch(wheel):
    for binary in wheel.binaries():
        defined = run("nm", "--dynamic", "--defined-only", "--demangle", binary).stdout
        assert not re.search(r"^\S+ [TDBRVWu] (__)?(cuda|c10::|at::|torch::|aoti_)", defined, re.MULTILINE), binary.name


def test_sources_include_stable_headers_only():
    sources = [path for path in (HOUSE / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    included = [
        (path.name, header)
        for path in sources
        for header in re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]+)', path.read_text())
    ]
    assert included
    assert [found for found in included if not found[1].startswith(STABLE_HEADERS)] == []


# Scripts


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """Makes ``nvcc`` programs that name a release; only these are found."""
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")

    def make(release):
        nvcc = tmp_path / release / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
        nvcc.chmod(0o755)
        return nvcc

    return make


def test_finds_the_toolkit_of_a_release(toolkits, monkeypatch):
    find_nvcc = script("wheel").find_nvcc
    old, new = toolkits("11.7"), toolkits("99.1")
    monkeypatch.setenv("PATH", str(old.parent))
    monkeypatch.setenv("CUDA_HOME", str(new.parents[1]))
    assert find_nvcc("99.1") == str(new)
    assert find_nvcc("11.7") == str(old)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDACXX", str(new))
    assert find_nvcc("99.1") == str(new)


def test_names_the_toolkit_that_is_missing(toolkits, monkeypatch):
    find_nvcc = script("wheel").find_nvcc
    with pytest.raises(SystemExit, match=r"^this wheel needs the CUDA 99\.2 toolkit, nvcc found: none; .*"):
        find_nvcc("99.2")
    other = toolkits("99.1")
    monkeypatch.setenv("CUDACXX", str(other))
    with pytest.raises(
        SystemExit, match=rf"needs the CUDA 99\.2 toolkit, nvcc found: {other} \(99\.1\); CUDA_HOME"
    ) as stop:
        find_nvcc("99.2")
    assert "\n" not in str(stop.value)


def test_refuses_an_unknown_kind():
    done = subprocess.run([sys.executable, HOUSE / "cmake" / "wheel.py", "127"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: '127'" in done.stderr


def test_refuses_a_strange_label(monkeypatch):
    version = script("version")
    monkeypatch.setenv("CLARA_FAST_LOCAL_VERSION", "cuda")
    with pytest.raises(ValueError, match=r"CLARA_FAST_LOCAL_VERSION \(cuda\) must be cpu or cu with three digits"):
        version.dynamic_metadata({}, {})

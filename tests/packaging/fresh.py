"""A fresh virtual environment that borrows this one's dependencies, so that it costs a second and not gigabytes."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

BORROWED = ("torch", "numpy", "transformers", "pytest", "hypothesis", "triton")


def environment(folder: Path) -> Path:
    """Makes ``folder`` a virtual environment without pip and returns its interpreter.

    What is installed into it comes first on its path; whatever else it imports comes from the folders that hold
    this interpreter's packages. Their own ``.pth`` files are not read, so an editable clara_fast stays behind.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    (purelib,) = folder.glob("lib/python3*/site-packages")
    (purelib / "borrowed.pth").write_text("".join(f"{path}\n" for path in _package_folders()))
    return python


def install(python: Path, *arguments: str | Path) -> None:
    """``pip install`` into another environment, by this one's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *arguments], check=True)


def _package_folders() -> list[str]:
    folders = {sysconfig.get_path("purelib"): None}
    for name in BORROWED:
        try:
            folders[str(distribution(name).locate_file(""))] = None
        except PackageNotFoundError:
            continue
    return list(folders)

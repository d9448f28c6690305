"""What disks and people do to a file."""

from __future__ import annotations

import os
from pathlib import Path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def remove(file: Path) -> None:
    file.unlink()


def scramble(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))

"""Who may write, and which states of a store are still being read."""

from __future__ import annotations

import os
import socket
import struct
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clara_fast.store.errors import StoreError, StoreLockedError

WRITER_LOCK = "writer.lock"
READERS_LOCK = "readers.lock"


class WriterLock:
    """An exclusive ``flock`` on a store folder, freed by :meth:`release` or the end of the process.

    Raises:
        StoreLockedError: another writer holds it; the message names its process and host.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise StoreError("writing a store needs flock, which this system lacks; reading works") from None
        descriptor = os.open(folder / WRITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 300).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise StoreLockedError(
                f"{folder} is being written by another process ({owner or 'unknown'}); "
                "wait until it has finished, or close that store"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self.release = weakref.finalize(self, _unlock, descriptor, os.getpid())


def _unlock(descriptor: int, owner: int) -> None:
    import fcntl

    if os.getpid() == owner:  # a forked process shares the lock: closing is not enough, and not for it to do
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


class ReaderPin:
    """Keeps the files of the generation that is being read: byte number ``generation`` of a file, locked shared.

    A writer removes what no manifest names any more only once no reader stands at an earlier generation. Locks
    belong to the open file, not to the process, so that several stores may be open in one. Where the system or
    the folder allows none (a read-only copy without the file), reading goes on without.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / READERS_LOCK
        self._descriptor: int | None = None
        self._close: Callable[[], object] = lambda: None
        self.generation: int | None = None
        self._open()
        _pins.add(self)

    def _open(self) -> None:
        if _ofd_lock is None:
            return
        # Not for writing, which would keep a file system from being made read-only.
        for flags in (os.O_RDONLY, os.O_RDONLY | os.O_CREAT):
            with suppress(OSError):
                self._descriptor = os.open(self._file, flags | os.O_CLOEXEC, 0o644)
                self._close = weakref.finalize(self, os.close, self._descriptor)
                break

    def own(self) -> None:
        """Pin the generation a second time, through a file of one's own: after a fork both processes share one."""
        self._close()
        self._descriptor = None
        self._open()
        if self.generation is not None:
            self._lock("shared", self.generation)

    def move(self, generation: int) -> None:
        """Pin ``generation``, then let go of the one before."""
        before, self.generation = self.generation, generation
        if generation != before:
            self._lock("shared", generation)
            if before is not None:
                self._lock("free", before)

    def alone(self, generation: int) -> bool:
        """Whether nobody reads a generation before ``generation``."""
        if _ofd_lock is None or generation == 0:
            return True  # without such locks readers of before may lose what was replaced
        with open(self._file, "ab") as file:  # closing it frees the lock
            return _ofd_lock(file.fileno(), "exclusive", 0, generation)

    def _lock(self, kind: str, generation: int) -> None:
        if self._descriptor is not None and _ofd_lock is not None:
            _ofd_lock(self._descriptor, kind, generation, 1)


def _make_ofd_lock() -> Callable[[int, str, int, int], bool] | None:
    """``lock(descriptor, kind, start, length) -> whether it was got``, or None where the system has no such locks."""
    try:
        import fcntl

        command = fcntl.F_OFD_SETLK
    except (ImportError, AttributeError):
        return None
    kinds = {"shared": fcntl.F_RDLCK, "exclusive": fcntl.F_WRLCK, "free": fcntl.F_UNLCK}

    def lock(descriptor: int, kind: str, start: int, length: int) -> bool:
        # struct flock of 64-bit Linux: type, whence, start, length, pid (must be 0).
        request = struct.pack("hhqqi4x", kinds[kind], os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(descriptor, command, request)
        except OSError:
            return False
        return True

    return lock


def _own_pins() -> None:
    for pin in list(_pins):
        pin.own()


_pins: weakref.WeakSet[ReaderPin] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_own_pins)
_ofd_lock = _make_ofd_lock() if os.name == "posix" and struct.calcsize("P") == 8 else None

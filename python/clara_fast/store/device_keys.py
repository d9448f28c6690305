"""Keys on an accelerator: as many as fit stay there, the others stream through while the ones before are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from clara_fast.store.blocks import Block, Keys, Run, checked_room, forget
from clara_fast.store.manifest import ShardEntry

BLOCK_BYTES = 128 << 20  # large enough that launches cost little
_SLOTS = 2
_SHARE = 0.8


class DeviceKeys:
    """Reads blocks of keys on ``device``.

    Blocks that are not resident go through two pinned buffers: while the device compares one block, the next is
    copied by a stream of its own, and the one after it read from disk.

    Args:
        device: such as ``"cuda"``.
        resident_bytes: what may stay there; default: 80 % of what is free on a GPU.
    """

    def __init__(self, device: torch.device | str, resident_bytes: int | None = None) -> None:
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        if resident_bytes is None:
            resident_bytes = int(_SHARE * torch.cuda.mem_get_info(self.device)[0]) if self._cuda else 0
        self._room = checked_room(resident_bytes)
        self._resident: dict[Any, Keys] = {}
        self._slots: list[_Slot] = []
        self._turn = Lock()  # the slots serve one search at a time
        self._copies = torch.cuda.Stream(self.device) if self._cuda else None

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    @property
    def resident_bytes(self) -> int:
        """What stays on the device now."""
        return sum(part.nbytes for keys in self._resident.values() for part in keys if part is not None)

    def keep_only(self, shards: Iterable[ShardEntry]) -> None:
        """Let go of keys whose shard's memories are in none of ``shards``."""
        names = {entry.memory for entry in shards}
        self._resident = {name: keys for name, keys in list(self._resident.items()) if name[0] in names}

    def read(self, blocks: Iterable[Block]) -> Iterator[Run]:
        """Each block with its keys and scales on the device, in order; valid until the next is asked for."""
        with self._turn:
            yield from self._read(blocks)

    def _read(self, blocks: Iterable[Block]) -> Iterator[Run]:
        waiting: tuple[Block, Keys, _Slot | None] | None = None
        turn = 0
        # One block behind: the copy of a block has begun before the one before it is handed out.
        for block in chain(blocks, (None,)):
            coming = None
            if block is not None:
                keys, slot = self._bring(block, turn)
                turn += slot is not None
                coming = (block, keys, slot)
            if waiting is not None:
                shown, on_device, used = waiting
                if used is not None:
                    used.wait_copied()
                yield Run([shown], [on_device])
                if used is not None:
                    used.mark_compared()
            waiting = coming

    def _bring(self, block: Block, turn: int) -> tuple[Keys, _Slot | None]:
        name = block.name
        if name in self._resident:
            return self._resident[name], None
        block.bring()
        keys = block.keys
        if self.resident_bytes + block.size <= self._room:
            # Always a copy: on a CPU `to` would keep what is mapped.
            kept = tuple(
                None if part is None else torch.empty_like(part, device=self.device).copy_(part) for part in keys
            )
            self._resident[name] = kept  # type: ignore[assignment]
            forget(keys)
            return self._resident[name], None
        if not self._slots:
            self._slots = [_Slot(self.device, self._copies) for _ in range(_SLOTS)]
        slot = self._slots[turn % _SLOTS]
        on_device = slot.copy(keys)
        forget(keys)
        return on_device, slot


class _Slot:
    """A pinned buffer and its twin on the device, used again and again."""

    def __init__(self, device: torch.device, copies: torch.cuda.Stream | None) -> None:
        self._device, self._copies = device, copies
        self._host = self._twin = torch.empty(0, dtype=torch.uint8)
        self._copied = torch.cuda.Event() if copies is not None else None
        self._compared = torch.cuda.Event() if copies is not None else None

    def copy(self, keys: Keys) -> Keys:
        """Begin to copy ``keys``; what is returned holds them after :meth:`wait_copied`."""
        if self._copied is not None:
            self._copied.synchronize()  # the buffer may still be on its way from its last use
        parts = [part for part in keys if part is not None]
        # Each part starts on a cache line, which is also what any dtype may start at.
        starts, total = [], 0
        for part in parts:
            starts.append(total)
            total += -(-part.numel() * part.element_size() // 256) * 256
        if total > len(self._host):
            if self._compared is not None:
                self._compared.synchronize()
            self._host = torch.empty(total, dtype=torch.uint8, pin_memory=self._copies is not None)
            self._twin = torch.empty(total, dtype=torch.uint8, device=self._device)
        for start, part in zip(starts, parts, strict=True):
            _view(self._host, start, part).copy_(part)
        with torch.cuda.stream(self._copies) if self._copies is not None else nullcontext():
            if self._copies is not None and self._compared is not None and self._copied is not None:
                self._copies.wait_event(self._compared)  # the device may still read what lies in the twin
                self._twin[:total].copy_(self._host[:total], non_blocking=True)
                self._copied.record(self._copies)
            else:
                self._twin[:total].copy_(self._host[:total])
        views = [_view(self._twin, start, part) for start, part in zip(starts, parts, strict=True)]
        return views[0], views[1] if len(views) > 1 else None

    def wait_copied(self) -> None:
        """Let the device's work from here on find the keys."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def mark_compared(self) -> None:
        """All work on the keys has been given to the device."""
        if self._compared is not None:
            self._compared.record(torch.cuda.current_stream(self._device))


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)

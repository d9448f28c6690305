"""What memories may be stored as: floating point, or 8 bits with one float32 scale per memory token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A stored number: its name in a manifest, in torch and in safetensors; ``largest`` if it needs scales."""

    name: str
    dtype: torch.dtype
    safetensors: str
    largest: float | None = None

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows ``[..., D]`` as they are stored and, for 8 bits, the scale of each ``[...]`` float32.

        A row's largest number becomes the format's largest; rows of zeros have scale 1.
        """
        if self.largest is None:
            return values.to(self.dtype).contiguous(), None
        values = values.float()
        scales = values.abs().amax(-1) / self.largest
        # The quotient of a denormal overflows: such rows are zeros.
        scales = scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 1.0)
        scaled = (values / scales.unsqueeze(-1)).clamp_(-self.largest, self.largest)
        return (scaled.round_() if self.dtype == torch.int8 else scaled).to(self.dtype).contiguous(), scales

    def decode(self, stored: Tensor, scales: Tensor | None) -> Tensor:
        """What ``stored`` stands for: itself, or float32 where it has scales."""
        return stored if scales is None else stored.float() * scales.unsqueeze(-1)


FORMATS = {
    format.name: format
    for format in (
        Format("bfloat16", torch.bfloat16, "BF16"),
        Format("float16", torch.float16, "F16"),
        Format("float32", torch.float32, "F32"),
        Format("int8", torch.int8, "I8", 127.0),
        Format("float8_e4m3fn", torch.float8_e4m3fn, "F8_E4M3", 448.0),
    )
}


def format_of(dtype: str) -> Format:
    """The format called ``dtype``.

    Raises:
        ValueError: there is none.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(map(repr, FORMATS))}")
    return FORMATS[dtype]


@dataclass
class Rows:
    """Documents' numbers as they are stored.

    Attributes:
        memory: ``[n, m, D]``.
        scales: ``[n, m]`` float32 for 8 bits, else None.
        pooled: ``[n, D]``, the mean over the memory tokens, in stores with pooled keys.
        pooled_scales: ``[n]`` float32 for 8 bits, else None.
    """

    memory: Tensor
    scales: Tensor | None = None
    pooled: Tensor | None = None
    pooled_scales: Tensor | None = None

    @classmethod
    def encoded(cls, memory: Tensor, format: Format, *, pooled: bool) -> Rows:
        """Memories ``[n, m, D]`` of any floating dtype in a store's format."""
        stored, scales = format.encode(memory)
        if not pooled:
            return cls(stored, scales)
        pooled_keys, pooled_scales = format.encode(memory.float().mean(1))
        return cls(stored, scales, pooled_keys, pooled_scales)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        parts = {name: part if part is None else take(part, rows) for name, part in vars(self).items()}
        return Rows(**parts)  # type: ignore[arg-type]


def take(values: Tensor, rows: slice | Tensor) -> Tensor:
    """``values[rows]``, also for 8-bit floats, which torch cannot index everywhere."""
    if isinstance(rows, slice) or values.dtype != torch.float8_e4m3fn:
        return values[rows]
    return values.view(torch.int8)[rows].view(values.dtype)

"""Tokens per second, model FLOPs utilisation (MFU) and peak memory of training.

MFU is ``FLOPs of the steps / (seconds * peak of the devices)``. The FLOPs are those that LoRA training has no way
around, whatever is recomputed or padded:

- a token through the decoder: 2 for each weight of its linear layers in forward, and 2 in backward for the gradient of
  what entered the layer, if the token's role trains (6, the usual count, has another 2 for the gradient of the weight,
  which a frozen weight has not);
- through the role's adapter: 2 in forward and 4 in backward for each of its weights;
- an answer token through the head: 2 and 2 for each of its weights.

Attention scores (a few percent at the lengths of documents and prompts here), norms, the loss and the optimizer are
left out. Experts that are no linear layers of their own are not seen, so the MFU of such models comes out too low.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from clara_fast._memory import peak_memory
from clara_fast.modeling import Clara
from clara_fast.modeling.packing import PackedDocuments, PackedPrompts

# Dense 16-bit matmul rates with 32-bit accumulation in TFLOP/s, by the vendors' data sheets. The first name that occurs
# in the device's counts.
DATA_SHEET = {
    "GB200": 2500.0,
    "GB300": 2500.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 311.9,
    "A800": 311.9,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
}


@dataclass(frozen=True)
class Peak:
    """What a device can do at most: FLOP/s, and where the number is from."""

    rate: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """By the data sheet for 16-bit work on a known GPU; else the rate of large matmuls of ``dtype``, measured now."""
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for known, teraflops in DATA_SHEET.items():
            if known in name:
                return Peak(teraflops * 1e12, f"{name}: data sheet, dense 16-bit")
    return Peak(_matmul_rate(device, dtype), f"{device.type}: matmuls of {str(dtype).removeprefix('torch.')}, measured")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 1024 if device.type == "cpu" else 4096
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Throughput:
    """Counts the work of one process's steps, and says what became of all processes' together.

    Args:
        model: whose weights are counted, once.
    """

    def __init__(self, model: Clara) -> None:
        self.model = model
        decoder, head = model.lm.get_decoder(), model.lm.get_output_embeddings()
        # Layers are asked for their size, not their weights: those may be packed (k-bit) or sharded.
        self._base = sum(_size(m) for n, m in decoder.named_modules() if m is not head and "lora_" not in n)
        self._head = _size(head)
        self._adapters = {
            role: sum(_size(m) for n, m in decoder.named_modules() if n.endswith((f"lora_A.{role}", f"lora_B.{role}")))
            for role in model.roles
        }
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0
        self._peak: Peak | None = None

    def add(self, inputs: dict[str, Any]) -> None:
        """Count the packed texts of a batch."""
        work = {"documents": "compressor", "queries": self.model.query_role, "prompts": "generator"}
        for name, role in work.items():
            packed = inputs.get(name)
            if isinstance(packed, PackedDocuments | PackedPrompts):
                count = packed.input_ids.numel()
                self.tokens += count
                self.flops += count * self.flops_per_token(role)
            if isinstance(packed, PackedPrompts):
                self.flops += 4 * self._head * int((packed.labels != -100).sum())

    def flops_per_token(self, role: str) -> int:
        """Of the decoder under ``role``, forward and, if the role trains, backward."""
        base, adapter = self._base, self._adapters.get(role, 0)
        return 4 * base + 6 * adapter if role in self.model.trainable else 2 * (base + adapter)

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """What was counted since the last call, over all processes, which all call this at the same time.

        The same in each; nothing if none has counted anything.
        """
        device = self.model.device
        if self._peak is None:
            mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
            self._peak = device_peak(device, mixed or self.model.dtype)
            if accelerator.is_main_process:
                print(f"mfu is relative to {self._peak.rate / 1e12:.4g} TFLOP/s ({self._peak.source})", flush=True)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
        mine = torch.tensor([self.tokens, self.flops, self.seconds, self._peak.rate, peak], device=accelerator.device)
        tokens, flops, seconds, rate, peaks = accelerator.gather(mine[None]).double().unbind(1)
        self.tokens, self.flops, self.seconds = 0, 0.0, 0.0
        longest = float(seconds.max())
        if not longest:
            return {}
        return {
            "tokens_per_second": round(float(tokens.sum()) / longest, 1),
            "mfu": round(float(flops.sum()) / (longest * float(rate.sum())), 4),
            "peak_memory_gib": round(float(peaks.max()) / 2**30, 3),
        }


def _size(module: nn.Module | None) -> int:
    """Weights of a linear layer; 0 of anything else, and of peft's wrapper around one."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    wrapped = module is None or isinstance(module, LoraLayer)
    return 0 if wrapped or None in sizes else int(sizes[0]) * int(sizes[1])  # type: ignore[arg-type]

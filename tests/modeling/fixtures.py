"""The recorded reference (``shared/fixtures/apple_tiny``): read in place, never copied."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clara_fast import Clara

ROOT = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "apple_tiny"
CASES = ["nosys/stage1", "nosys/stage1_2", "nosys/stage2", "sys/stage1", "sys/stage2"]
ADAPTER_OF_ROLE = {
    "compressor": "encoder_adapter",
    "query_reasoner": "query_reasoner_adapter",
    "generator": "decoder_adapter",
}

needs_recording = pytest.mark.skipif(
    not ROOT.is_dir(), reason=f"the recorded reference is not here ({ROOT}); parity is not checked"
)


class Recording:
    """One case: its inputs, its recorded numbers, and the model loaded from its checkpoint."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.folder = ROOT / case
        self.inputs = _json(ROOT / "inputs.json")
        self.info = _json(self.folder / "info.json")
        self.prompts = _json(self.folder / "prompts.json")
        self.tokens = np.load(self.folder / "tokens.npz")
        self.numbers = np.load(self.folder / "expected_float32.npz")
        self.expected = _json(self.folder / "expected_float32.json")
        self.stage = self.info["batch"]["stage"]

    def model(self) -> Clara:
        # config.json names the base by a path relative to the fixtures' root.
        base = ROOT / json.loads((self.folder / "checkpoint" / "config.json").read_text())["decoder_model_name"]
        return Clara.from_pretrained(self.folder / "checkpoint", base_model=base, dtype=torch.float32, device="cpu")

    def number(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.numbers[key])


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((value.detach() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

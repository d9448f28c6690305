"""What the log says of the work done: FLOPs counted against torch's own counter, rates, peaks, all ranks together."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clara_fast import Clara
from clara_fast.data import ScpSample
from clara_fast.modeling import lora
from clara_fast.training import throughput
from clara_fast.training.collation import ScpCollator
from clara_fast.training.throughput import DATA_SHEET, Throughput, device_peak
from tests.modeling.tiny import make_base
from tests.ranks import run_ranks

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
SAMPLES = [
    ScpSample(str(i), "The door is red and the boat is blue.", ["red", "blue"], ["Door?", "Boat?"]) for i in "ab"
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("base"), "mistral")
    return Clara.from_base(base, doc_max_length=32, compression_rate=16, lora=LORA, device="cpu")


@pytest.mark.parametrize("trained", [(), ("generator",), ("compressor", "generator", "memory_tokens")])
def test_flops_are_those_of_the_matmuls(model, trained, monkeypatch):
    """Everything that torch counts in a step, less what the module says it leaves out, and a little it cannot skip."""
    # Weights merged for one call save a part of the adapters' work, which is counted all the same.
    monkeypatch.setattr(lora, "_merging_pays", lambda rows, weight: False)
    model.train_only(*trained)
    batch = ScpCollator(model)(SAMPLES)
    counted = Throughput(model)
    counted.add(batch)
    documents, prompts = batch["documents"], batch["prompts"]
    assert counted.tokens == documents.input_ids.numel() + prompts.input_ids.numel()
    # torch counts the matmul that makes a new tensor only.
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        output = model(documents=documents, prompts=prompts)
        if trained:
            (output.lm_loss + output.mse_loss).backward()
    by_op = counter.get_flop_counts()["Global"]
    matmuls = sum(flops for op, flops in by_op.items() if "mm" in str(op))
    model.zero_grad()
    head = 4 * counted._head * int((batch["labels"] != -100).sum())
    if not trained:  # nothing asks for the gradient of the head's input
        head //= 2
        counted.flops -= head
    # Nothing lies below the first trained layer that would need its input's gradient, where only its adapter trains.
    first = sum(
        m.in_features * m.out_features for n, m in model.lm.model.layers[0].named_modules() if n.endswith("base_layer")
    )
    slack = 2 * counted.tokens * first if "memory_tokens" not in trained and trained else 0
    assert counted.flops - slack <= matmuls <= counted.flops * 1.001


def test_what_a_role_costs(model):
    model.train_only("generator")
    counted = Throughput(model)
    # Seven linear layers: q and o 32 x 32, k and v 32 x 16 (two heads of eight), three of 32 x 48.
    base = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    adapter = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert counted.flops_per_token("generator") == 4 * base + 6 * adapter
    assert counted.flops_per_token("compressor") == 2 * base + 2 * adapter


def leave_metrics(folder):
    """What two processes log: after both have worked, after the second alone has, and after neither has."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    throughput.device_peak = lambda *_: throughput.Peak(1e12, "made up")
    throughput.peak_memory = lambda: 2**30 * (1 + rank)
    counted = Throughput(Clara.from_pretrained(folder / "model", device="cpu"))
    counted.tokens, counted.flops, counted.seconds = ((1000, 1e12, 4.0), (2000, 2e12, 2.0))[rank]
    found = [counted.metrics(accelerator)]
    if rank == 1:
        counted.tokens, counted.flops, counted.seconds = 100, 1e12, 1.0
    found += [counted.metrics(accelerator), counted.metrics(accelerator)]
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_all_ranks_count(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    assert run_ranks(2, leave_metrics, tmp_path, log=tmp_path / "log.txt")
    for rank in (0, 1):
        both, one, none = json.loads((tmp_path / f"{rank}.json").read_text())
        # 3000 tokens in the 4 seconds of the slower one; 3 TFLOP of the 8 that two such devices could do.
        assert both == {"tokens_per_second": 750.0, "mfu": 0.375, "peak_memory_gib": 2.0}
        assert one == {"tokens_per_second": 100.0, "mfu": 0.5, "peak_memory_gib": 2.0}
        assert none == {}
    assert (tmp_path / "log.txt").read_text().count("mfu is relative to 1 TFLOP/s (made up)") == 1


def test_peaks(monkeypatch):
    cpu = device_peak(torch.device("cpu"), torch.float32)
    assert cpu.source == "cpu: matmuls of float32, measured"
    assert 1e9 < cpu.rate < 1e14
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-40GB": "A100",
        "NVIDIA A10G": "A10G",
        "NVIDIA A10": "A10",
        "NVIDIA L40S": "L40S",
        "NVIDIA L4": "L4",
        "NVIDIA GH200 480GB": "GH200",
        "NVIDIA GB200": "GB200",
    }
    for name, entry in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        peak = device_peak(torch.device("cuda"), torch.bfloat16)
        assert peak.rate == DATA_SHEET[entry] * 1e12, name
        assert "data sheet" in peak.source
    monkeypatch.setattr(throughput, "_matmul_rate", lambda *_: 5.0)
    assert device_peak(torch.device("cuda"), torch.float32).rate == 5.0  # the table is of 16-bit work
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Unheard-of")
    assert device_peak(torch.device("cuda"), torch.bfloat16).rate == 5.0


def test_layers_are_asked_for_their_size_not_their_weights():
    """Quantised layers keep several weights in a byte."""
    packed = nn.Linear(64, 32, bias=False)
    packed.weight = nn.Parameter(torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert throughput._size(packed) == 64 * 32

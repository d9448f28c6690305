"""The benchmarks run, agree with their baselines, and refuse to time what is wrong. Nothing here looks at a speed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("benchmarks_harness", BENCHMARKS / "harness.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(script: str, folder: Path, *options: str) -> dict:
    target = folder / "result.json"
    command = [sys.executable, BENCHMARKS / script, "--quick", "--json", target, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def test_model_benchmark(tmp_path):
    report = run("model.py", tmp_path)
    work = {row["work"]: row for row in report["results"]}
    assert list(work) == [
        "compress a corpus",
        "compress full documents",
        "SCP step",
        "joint step",
        "answer",
        "peak memory: SCP step",
    ]
    assert all(row["ratio"] > 0 for row in work.values())
    assert work["answer"]["agreement"] == "same text from the same documents"
    assert "random Llama tiny" in report["facts"]["base"]
    peaks = work["peak memory: SCP step"]["bytes"]
    assert all(one["peak"] >= one["before"] > 0 for one in peaks.values())


def test_ops_benchmark(tmp_path):
    report = run("ops.py", tmp_path)
    measured = {row["work"].split(",")[0] for row in report["results"]}
    assert measured == {"pool_memory", "cosine_topk", "select_memory", "attention"}
    assert report["facts"]["read GB/s"] > 0


def test_wrong_results_are_refused(harness):
    value = torch.randn(50)
    assert harness.require_close("x", value, value + 1e-7, 1e-5) < 1e-5
    with pytest.raises(harness.Disagreement, match=r"x: relative error .* no speed is reported"):
        harness.require_close("x", value, value + 1e-3, 1e-5)
    with pytest.raises(harness.Disagreement):
        harness.require_close("x", value, torch.full_like(value, torch.nan), 1e-5)
    with pytest.raises(harness.Disagreement, match="shapes differ"):
        harness.require_close("x", value, value[:1], 1e-5)


def test_accuracy_is_measured_against_eager(harness):
    exact = torch.randn(50, dtype=torch.float64)
    eager = exact.to(torch.bfloat16)
    harness.require_accurate("x", eager.clone(), eager, exact)
    with pytest.raises(harness.Disagreement):
        harness.require_accurate("x", eager * 1.1, eager, exact)


def test_contestants_take_turns(harness):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = harness.interleaved(calls, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(t.repetitions == 3 and t.p20 <= t.median <= t.p80 for t in timings.values())


@pytest.mark.parametrize(("seconds", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us")])
def test_durations_read_well(harness, seconds, text):
    assert harness.duration(seconds) == text

"""The benchmarks run, agree with their peers, and refuse to time what is wrong. Nothing here looks at a speed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clara_fast.benchmarks import (
    answer_loss,
    compressed_context_attention,
    end_to_end,
    harness,
    machine,
    model,
    ops,
    roofline,
    select_memory,
    text_or_memory,
)
from clara_fast.benchmarks import timing as clocks
from clara_fast.benchmarks.harness import OURS, Bar, Case, Contest, Floor, Options, Result
from clara_fast.cli import main as clara_fast_command
from clara_fast.ops import reference

CPU = torch.device("cpu")
QUICK = Options(CPU, quick=True, compiled=False, repetitions=2)
CEILINGS = machine.Ceilings(read=10e9, copy=20e9, matmul={"float32": 1e11, "bfloat16": 4e11})
WALL = clocks.WallClock(0.0)


def run(module, folder: Path, *options: str) -> dict:
    target = folder / "result.json"
    assert module.main(["--quick", "--json", str(target), *options]) == 0
    return json.loads(target.read_text())


def check_document(document: dict) -> dict[str, dict]:
    """What every result promises; returns the results by name."""
    assert document["format"] == 1
    assert {"cpu", "threads", "versions", "time", "device"} <= document["facts"].keys()
    assert document["ceilings"]["read"] > 0
    assert document["ceilings"]["matmul"].keys() == {"float32", "bfloat16"}
    results = {f"{one['work']}: {one['case']}": one for one in document["results"]}
    assert len(results) == len(document["results"]), "names are not unique"
    for name, one in results.items():
        assert one["refused"] is None, f"{name}: {one['refused']}"
        for contestant in one["contestants"].values():
            value = contestant.get("median", contestant.get("value"))
            assert math.isfinite(value)
            if "median" in contestant:
                assert 0 < contestant["p20"] <= contestant["median"] <= contestant["p80"]
        if one["floor"]:
            assert one["floor"]["read"] > 0
            assert one["floor"]["of_ceiling"] > 0
    return results


@pytest.mark.parametrize(
    ("only", "peers"),
    [
        ("pool_memory: documents", {"eager"}),
        ("select_memory: x 12", {select_memory.DENSE}),
        ("packed float32", {"SDPA, each", "SDPA, padded", "plain matmuls"}),
        ("branches float32", {"SDPA, context repeated", "clara_fast, context repeated", "plain matmuls"}),
        ("decode", {"SDPA, each", "SDPA, mask", "plain matmuls"}),
        ("cosine_topk: 500", {"torch float32", "torch bfloat16"}),
        ("answer_loss: tokens", {answer_loss.ALL_LOGITS}),
        ("call overhead: o", {"op", "raw kernel call"}),
    ],
)
def test_operators(tmp_path, only, peers):
    results = check_document(run(ops, tmp_path, "--only", only))
    for name, one in results.items():
        absent = one["absent"].keys()
        assert one["contestants"].keys() >= {OURS, *peers} or "raw kernel call" in absent, name
        assert all(bar["met"] is None for bar in one["bars"]), "tiny sizes say nothing about a bar"


def test_faiss_is_a_peer(tmp_path):
    pytest.importorskip("faiss")
    (one,) = check_document(run(ops, tmp_path, "--only", "cosine_topk: bfloat16 B = 8")).values()
    assert {"FAISS flat", "FAISS fp16", "FAISS 8-bit"} <= one["contestants"].keys()


@pytest.mark.slow
def test_compiled_peers(tmp_path):
    results = check_document(run(ops, tmp_path, "--compiled", "--only", "float32 fwd"))
    assert any("FlexAttention" in one["contestants"] for one in results.values())
    (one,) = check_document(run(ops, tmp_path, "--compiled", "--only", "pool_memory float32 with")).values()
    assert "torch.compile" in one["contestants"]


def test_extra_memory(tmp_path):
    (one,) = run(ops, tmp_path, "--only", "extra memory")["results"]
    assert one["unit"] == "bytes"
    # The dense formulation holds several tensors [B, k, N]; it would not show if memory were not seen at all.
    assert one["contestants"][select_memory.DENSE]["value"] > one["notes"]["one [B, k, N]"]


@pytest.mark.parametrize("scene", ["packed", "branches", "decode"])
def test_plain_matmuls_are_the_reference(scene):
    make = getattr(compressed_context_attention, scene)
    found = make(*{"packed": (3,), "branches": (16, 5, 3), "decode": (3, 20)}[scene], True)
    query = torch.randn(found.q_rows, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, found.k_rows, 2, 8, dtype=torch.float64)
    (plain,) = compressed_context_attention.plain_matmuls(found, query, key, value)
    torch.testing.assert_close(plain, reference.compressed_context_attention(query, key, value, found.layout))


def test_the_dense_formulation_is_the_reference():
    query, memory = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    upstream = [torch.randn(2, 3, 3, 4), torch.randn(2, 5)]
    sides = (lambda q, m: select_memory.dense(q, m, 3)), select_memory.selected_by(reference.select_memory, 3)
    for mine, other in zip(*(harness.with_gradients(side, [query, memory], upstream) for side in sides), strict=True):
        torch.testing.assert_close(mine, other)


def test_model(tmp_path):
    results = check_document(run(model, tmp_path))
    assert [one["work"] for one in results.values()] == [
        "compress a corpus",
        "compress full documents",
        "SCP step",
        "joint step",
        "answer",
        "peak memory",
    ]
    assert all(one["contestants"].keys() == {OURS, "baseline"} for one in results.values())
    by_work = {one["work"]: one for one in results.values()}
    assert by_work["answer"]["notes"]["agreement"] == "same text from the same documents"
    memory = by_work["peak memory"]
    before, peak = memory["notes"]["before"], memory["notes"]["peak"]
    for side, taken in memory["contestants"].items():
        assert before[side] > 0
        assert taken["value"] == peak[side] - before[side] > 0


def test_memories_beside_full_text(tmp_path):
    picture = tmp_path / "end_to_end.png"
    pytest.importorskip("matplotlib")
    document = run(end_to_end, tmp_path, "--rates", "16", "--plot", str(picture))
    results = check_document(document)
    by_work = {one["work"]: one for one in results.values()}
    assert list(by_work) == [*end_to_end.WORKS, "peak memory"]
    for work in ("SCP step", "joint step", "answer", "peak memory"):
        assert by_work[work]["contestants"].keys() == {OURS, end_to_end.TEXT}
    tokens = by_work["answer"]["notes"]["prompt_tokens"]
    assert tokens[OURS] < tokens[end_to_end.TEXT]
    table = dict(line.strip("| ").split(" | ", 1) for line in end_to_end.markdown(document).splitlines()[2:])
    assert list(table) == [line.title for line in end_to_end.LINES if line.case != ": answer"]  # not measured if quick
    step = by_work["joint step"]["contestants"]
    assert table["joint step, s"] == " | ".join(f"{step[side]['median']:.3g}" for side in (end_to_end.TEXT, OURS))
    rate = 3 / by_work["compress"]["contestants"][OURS]["median"]
    assert table["compress, documents a second"].strip(" |") == f"{rate:.3g}"
    assert picture.read_bytes().startswith(b"\x89PNG")


# What is wrong gets no speed


def test_a_wrong_answer_is_refused(monkeypatch, capsys):
    right = text_or_memory.answering.generate_ids

    def wrong(*arguments, **named):
        ids = right(*arguments, **named)
        return (ids + 1) % 100

    monkeypatch.setattr(text_or_memory.answering, "generate_ids", wrong)
    assert end_to_end.main(["--quick", "--rates", "16", "--only", "answer 16x:"]) == 1
    assert "behind the likeliest one" in capsys.readouterr().out


def test_store(tmp_path):
    from clara_fast.benchmarks import store

    results = check_document(run(store, tmp_path, "--folder", str(tmp_path)))
    searched = results["store: search, bfloat16, 300 documents of 128, B = 1"]
    reading = {"one pass of reading (sum)", "one pass of reading (amax)"}
    searching = {OURS, store.KEEPING_NOTHING, store.KEEPING_ALL, store.BARE, store.PEER}
    assert searched["contestants"].keys() == searching | reading
    # The fastest of these passes, timed in turn with the search, is the ceiling; and none of them is a peer.
    fastest = min(searched["contestants"][name]["median"] for name in reading)
    if searched["floor"]["limit"] == "read bandwidth":
        assert searched["floor"]["of_ceiling"] == pytest.approx(fastest / searched["contestants"][OURS]["median"])
    assert searched["best_peer"] == store.PEER
    assert results["store: search, int8, 300 documents of 128, B = 8"]["contestants"].keys() >= {OURS, store.BARE}
    assert len(results) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "stores are left behind"


def test_a_wrong_store_is_refused(tmp_path, monkeypatch):
    from clara_fast.benchmarks import store

    topk = store.MemoryStore.topk
    monkeypatch.setattr(
        store.MemoryStore, "topk", lambda *a, **named: tuple(part.flip(1) for part in topk(*a, **named))
    )
    stored = store.Stored(store.QUICK[0], tmp_path)
    result = Case("store", "search", lambda: store.search_contest(stored, 1)).run(QUICK, WALL, CEILINGS)
    assert "scores differ" in result.refused
    assert not result.measured


def test_what_formats_cost_in_ranking(tmp_path):
    from clara_fast.benchmarks import store, store_formats

    stored = store.Stored(store.Size(60, 2, 64, 60, "float32"), tmp_path)
    queries = stored.store.memory(range(20)) + 0.01

    def loss(converted):  # what is read back is what a format costs
        return float((converted.memory(range(60)).float() - stored.store.memory(range(60))).abs().mean())

    rows = store_formats.compare(stored.store, queries, [{i} for i in range(20)], tmp_path, loss)
    assert len(rows) == 10
    losses = {row["dtype"]: row["answer_loss"] for row in rows}
    assert losses["float32"] == losses["bfloat16"] == 0 < losses["int8"] < losses["float8_e4m3fn"]
    whole = {row["dtype"]: row for row in rows if row["keys"] == "memory"}
    assert whole["float32"]["overlap@10"] == whole["float32"]["recall@1"] == 1
    assert whole["int8"]["recall@1"] == 1
    assert 0.5 < whole["float8_e4m3fn"]["overlap@10"] < 1  # some neighbours of random memories change places
    assert whole["int8"]["bytes_per_document"] < whole["bfloat16"]["bytes_per_document"]


def test_a_wrong_kernel_is_refused(tmp_path, monkeypatch, capsys):
    right = ops.pool_memory.ops.pool_memory

    def wrong(*arguments, **named):
        memory, mse = right(*arguments, **named)
        return memory, mse * 1.01

    monkeypatch.setattr(ops.pool_memory.ops, "pool_memory", wrong)
    target = tmp_path / "result.json"
    assert ops.main(["--quick", "--only", "pool_memory: float32", "--json", str(target)]) == 1
    for one in json.loads(target.read_text())["results"]:
        assert "no speed is reported" in one["refused"]
        assert one["contestants"] == {}
    assert "refused: pool_memory" in capsys.readouterr().out


def test_a_wrong_search_is_refused(monkeypatch):
    right = ops.cosine_topk.ops.cosine_topk

    def wrong(queries, keys, k, **named):
        scores, indices = right(queries, keys, k, **named)
        return scores, indices.roll(1, 1)

    monkeypatch.setattr(ops.cosine_topk.ops, "cosine_topk", wrong)
    case = next(ops.all_cases(QUICK, "cosine_topk: bfloat16"))
    result = case.run(QUICK, WALL, CEILINGS)
    assert "keys: off by" in result.refused
    assert result.measured == {}


def test_a_crash_is_refused_and_others_go_on(monkeypatch):
    def crash(*arguments, **named):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ops.pool_memory.ops, "pool_memory", crash)
    result = next(ops.all_cases(QUICK, "pool_memory: float32")).run(QUICK, WALL, CEILINGS)
    assert result.refused == "it failed: no kernel image"
    assert [verdict.met for verdict in result.verdicts] == [None, None]


def contest_of(checks: dict, **others) -> Result:
    def check(name):
        if isinstance(checks[name], Exception):
            raise checks[name]
        return checks[name]

    contest = Contest({name: lambda: None for name in checks}, check, **others)
    return Case("work", "case", lambda: contest).run(Options(CPU, repetitions=3), WALL, CEILINGS)


def test_a_peer_that_is_wrong_or_missing_is_named():
    checks = {OURS: 0.0, "a": harness.Disagreement("a: off"), "b": harness.Unavailable("b is not here"), "c": 0.0}
    result = contest_of(checks, bars=[Bar("2x a", "ratio", 2, ("a",)), Bar("any", "ratio", 0.0)])
    assert result.measured.keys() == {OURS, "c"}
    assert result.absent == {"a": "a: off", "b": "b is not here"}
    assert result.verdicts[0].text == "2x a: not judged (a: a: off)"
    assert result.verdicts[1].met


def test_results_are_compared_with_float64():
    exact = torch.randn(50, dtype=torch.float64)
    eager = exact.to(torch.bfloat16)
    harness.require_accurate("x", eager.clone(), eager, exact)
    for wrong in (eager * 1.1, torch.full_like(eager, torch.nan)):
        with pytest.raises(harness.Disagreement, match=r"x: relative error .* no speed is reported"):
            harness.require_accurate("x", wrong, eager, exact)
    with pytest.raises(harness.Disagreement, match="shapes differ"):
        harness.require_close("x", eager, eager[:1], 1e-5)


def test_a_case_that_cannot_be_set_up_hides_no_other(monkeypatch, capsys):
    def crash(*arguments, **named):
        raise RuntimeError("no such layout")

    monkeypatch.setattr(compressed_context_attention.ContextLayout, "padded", crash)
    assert ops.main(["--quick", "--only", "float32 decode"]) == 1
    assert "refused: attention: SmolLM2, float32, decode" in capsys.readouterr().out


# Floors, bars, clocks


def test_the_floor_is_what_takes_longer():
    moving, limit = Floor(read=10**9, flops=10**9).seconds(CEILINGS)
    assert (moving, limit) == (pytest.approx(0.1), "read bandwidth")
    assert Floor(read=10**9, written=10**9).seconds(CEILINGS) == (pytest.approx(0.1), "copy bandwidth")
    computing = Floor(read=10**6, flops=4 * 10**11, dtype="int8").seconds(CEILINGS)
    assert computing == (pytest.approx(1.0), "bfloat16 matmul rate")


@pytest.mark.parametrize(
    ("bar", "met", "text"),
    [
        (Bar("3x the best", "ratio", 3), False, "3x the best: MISSED, 2.00x (33% short)"),
        (Bar("4x b", "ratio", 4, ("b",)), True, "4x b: met, 4.00x"),
        (Bar("90% of read", "share", 0.9), False, "90% of read: MISSED, 45% (50% short)"),
        (Bar("under 1 s", "seconds", 1.0), True, "under 1 s: met, 500 ms"),
        (Bar("under 100 ms", "seconds", 0.1), False, "under 100 ms: MISSED, 500 ms (5.0 times as much)"),
    ],
)
def test_bars(bar, met, text):
    # "lossy" is faster, but computes something less.
    result = Result("work", "case", measured={OURS: 0.5, "a": 1.0, "b": 2.0, "lossy": 0.1}, outside=("lossy",))
    result.of_ceiling = 0.45
    verdict = harness.judge(bar, result)
    assert (verdict.met, verdict.text) == (met, text)


def test_contestants_take_turns_until_their_time_is_up():
    order = []

    class Clock:
        def sampler(self, call):
            return lambda: (call(), 1.0)[1], "test"

    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings, _ = clocks.interleaved(calls, Clock(), repetitions=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(timing.repetitions == 3 for timing in timings.values())
    timings, _ = clocks.interleaved(calls, Clock(), repetitions=9, budget=0.0)
    assert all(timing.repetitions == clocks.FEWEST_SAMPLES for timing in timings.values())


def test_timing_of_samples():
    timing = clocks.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize(("seconds", "text"), [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 us")])
def test_durations_read_well(seconds, text):
    assert clocks.duration(seconds) == text


# The command


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = clara_fast_command(["bench", "--quick", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command(tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    picture, output = tmp_path / f"roof.{suffix}", tmp_path / "results" / "ops.json"
    only = ("--only", "bfloat16 B =")
    code, out, err = command(capsys, *only, "--json", "--plot", str(picture), "--output", str(output))
    assert code == 0, err
    assert "roofline drawn to" in err
    document = json.loads(out)
    check_document(document)
    assert json.loads(output.read_text()) == document
    start = picture.read_bytes()[:400]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in start or b"<?xml" in start


def test_command_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    only = ("--only", "cosine_topk: int8")
    code, out, err = command(capsys, *only)
    assert code == 0, err
    assert "cosine_topk: int8" in out
    assert "no roofline: the picture needs matplotlib: pip install 'clara-fast[bench]'" in err
    code, out, err = command(capsys, *only, "--plot", "roof.png")
    assert (code, out) == (1, "")
    assert err == "error: the picture needs matplotlib: pip install 'clara-fast[bench]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "what to measure (everything) must be one of ops, model, all"),
        (["--only", "nothing"], "--only (nothing) and --dtype leave no case"),
        (["model", "--only", "nothing"], "--only (nothing) leaves no case"),
        (["--dtype", "int4"], "--dtype (int4) must be one of float32"),
        (["--threads", "0"], "--threads (0) must be at least 1"),
        (["--plot", "roof.gif"], "the picture's name (roof.gif) must end in .png or .svg"),
        (["--plot", "roof.png", "--no-plot"], "--plot (roof.png) does not go with --no-plot"),
        (["--device", "nowhere"], "--device (nowhere) must be cpu, cuda, cuda:1, ..."),
        (["--device", "cuda:99"], "--device (cuda:99) must be cpu or a CUDA GPU that torch sees"),
    ],
)
def test_command_errors(capsys, arguments, message):
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_picture_of_nothing_says_so(tmp_path):
    class Empty:
        results = ()

    pytest.importorskip("matplotlib")
    with pytest.raises(roofline.NoPicture, match="no case here has bytes and operations"):
        roofline.draw(Empty, tmp_path / "roof.png")


def test_scripts_run_as_files():
    script = Path(ops.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--only" in done.stdout

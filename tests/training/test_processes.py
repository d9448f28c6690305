"""Training in two processes over gloo: DDP and FSDP2 are worth one process on the same samples."""

from __future__ import annotations

import pytest
import torch

from clara_fast import Clara
from clara_fast.training import ScpTrainingArguments
from tests.modeling.tiny import make_base
from tests.training.processes import FSDP, Run, make_model, result, run_all

ACCUMULATED = {"gradient_accumulation_steps": 2}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
STAGES = [
    "scp",
    "search",
    *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("instruct", "joint", "fly", "retriever")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    make_model(folder, make_base(folder / "base", "mistral"))
    return folder


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """The same with dropout."""
    folder = tmp_path_factory.mktemp("dropping")
    make_model(folder, make_base(folder / "base", "mistral"), dropout=0.1)
    return folder


def error_of(found, expected):
    """The largest distances of losses, gradient norms and weights."""
    assert found["weights"].keys() == expected["weights"].keys()
    weights = [(found["weights"][name] - weight).abs().max() for name, weight in expected["weights"].items()]
    return torch.stack(
        [
            (torch.tensor(found["losses"]) - torch.tensor(expected["losses"])).abs().max(),
            (torch.tensor(found["norms"]) - torch.tensor(expected["norms"])).abs().max(),
            torch.stack(weights).max(),
        ]
    )


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(folder, stage):
    """Their error against one process in float64 is that of one process in float32.

    Batches are accumulated, answers and lists of documents differ in length; every kind of weight trains.
    """
    names = ("float64", "one", "ddp", "fsdp")
    runs = [
        Run(f"{stage}-float64", stage, dtype="float64", options=ACCUMULATED),
        Run(f"{stage}-one", stage, options=ACCUMULATED),
        Run(f"{stage}-ddp", stage, 2, options={**ACCUMULATED, **(CHECKPOINTED if stage == "scp" else {})}),
        Run(f"{stage}-fsdp", stage, 2, options={**ACCUMULATED, **FSDP}),
    ]
    run_all(folder, runs)
    expected, one, ddp, fsdp = (result(folder, f"{stage}-{name}") for name in names)
    budget = 3 * error_of(one, expected) + torch.tensor([1e-5, 1e-5, 1e-6])
    for found in (ddp, fsdp):
        assert (error_of(found, expected) <= budget).all(), (error_of(found, expected), budget)
        for name, value in one["eval"].items():
            assert found["eval"][name] == pytest.approx(value, rel=1e-4), name
    assert fsdp["sharded"]
    assert not ddp["sharded"]
    saved = Clara.from_pretrained(folder / f"{stage}-fsdp" / "out" / "final", device="cpu", dtype="float32")
    for name, parameter in saved.named_parameters():
        assert name not in fsdp["weights"] or torch.equal(parameter, fsdp["weights"][name]), name
    other = result(folder, f"{stage}-fsdp", 1)
    assert all(torch.equal(weight, other["weights"][name]) for name, weight in fsdp["weights"].items())
    assert other["work"] == fsdp["work"], "of both processes together"


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["scp", "fly"])
def test_checkpointing_of_activations_changes_nothing(folder, stage, sharded):
    """In float64, since what is computed without a graph may be rounded otherwise than with one."""
    kinds = {
        f"reentrant-{reentrant}": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
        for reentrant in (False, True)
    }
    plain = {**ACCUMULATED, **(FSDP if sharded else {})}
    runs = {name: {**plain, **options} for name, options in {"plain": {}, **kinds}.items()}
    if sharded:
        own = {**FSDP["fsdp_config"], "activation_checkpointing": True}
        runs["own"] = {**plain, "fsdp_config": own}
    mode = "fsdp" if sharded else "ddp"
    run_all(folder, [Run(f"{stage}-{mode}-{name}", stage, 2, "float64", options) for name, options in runs.items()])
    plain = result(folder, f"{stage}-{mode}-plain")
    for kind in runs:
        other = result(folder, f"{stage}-{mode}-{kind}")
        saved = Clara.from_pretrained(folder / f"{stage}-{mode}-{kind}" / "out" / "final", device="cpu")
        saved = dict(saved.named_parameters())
        assert other["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        for name, weight in plain["weights"].items():
            assert weight.dtype == torch.float64
            assert torch.allclose(other["weights"][name], weight, rtol=0, atol=1e-8), name
            assert torch.equal(saved[name], other["weights"][name].to(saved[name].dtype)), name


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_stops_all_processes(folder, sharded):
    """Though it is one process that has it, and not in the last batch of its step."""
    options = {**ACCUMULATED, "save_strategy": "steps", "save_steps": 1, **(FSDP if sharded else {})}
    name = "fsdp-nan" if sharded else "ddp-nan"
    run_all(folder, [Run(name, "scp", 2, options=options, poison="s3")])
    for rank in (0, 1):
        found = result(folder, name, rank)
        assert found["error"].startswith("step 2: the loss is nan (samples s3); no weight was changed by it")
        assert found["error"].endswith("checkpoint-1")
        assert found["ids"] == ["s3"]
    last = Clara.from_pretrained(folder / name / "out" / "checkpoint-1", device="cpu", dtype="float32")
    for name, parameter in last.named_parameters():
        assert name not in found["weights"] or torch.equal(parameter, found["weights"][name]), name


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["scp", pytest.param("search", marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(dropping, stage, sharded):
    """With dropout, whose random numbers are each process's own."""
    options = {**ACCUMULATED, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **(FSDP if sharded else {})}
    names = [f"{stage}-{sharded}-{kind}" for kind in ("unbroken", "broken")]
    run_all(
        dropping,
        [
            Run(names[0], stage, 2, options=options),
            Run(names[1], stage, 2, options=options, dies="checkpoint-4"),
            Run(names[1], stage, 2, options=options, resume=True),
        ],
    )
    for rank in (0, 1):
        unbroken, resumed = (result(dropping, name, rank) for name in names)
        assert resumed["losses"] == unbroken["losses"]
        assert len(resumed["losses"]) == 4
        assert resumed["from"] == "checkpoint-2"
        assert all(torch.equal(weight, resumed["weights"][name]) for name, weight in unbroken["weights"].items())
    files = {path.name for path in (dropping / names[1] / "out" / "checkpoint-4").iterdir()}
    assert "optimizer.bin" in files if sharded else "optimizer.pt" in files
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not any(name.startswith("pytorch_model") for name in files), "the base model is not saved again"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [("scp", 1), ("joint", 1), ("retriever", 2)])
def test_compiled(folder, stage, world):
    """`torch.compile`, under DDP if there are two: the same losses and weights as without."""
    options = {"max_steps": 2}
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", **options}
    names = (f"{stage}-plain", f"{stage}-compiled")
    run_all(folder, [Run(n, stage, world, options=o) for n, o in zip(names, (options, compiled), strict=True)])
    plain, compiled = (result(folder, name) for name in names)
    assert not plain["graphs"]
    assert compiled["graphs"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    for name, weight in plain["weights"].items():
        assert torch.allclose(compiled["weights"][name], weight, rtol=0, atol=1e-5), name


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a machine with an accelerator, that is used")
def test_processes_without_accelerator_form_a_group(tmp_path):
    """transformers would start one, and then let each process train on everything by itself."""
    assert ScpTrainingArguments(output_dir=str(tmp_path)).use_cpu

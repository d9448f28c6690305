"""``attn_implementation="clara_fast"`` in any transformers model: against float64, and against sdpa.

float64 is sdpa's too: transformers' own eager attention takes its softmax in float32.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from clara_fast import ops
from clara_fast._register_attention import register_attention
from clara_fast.modeling import attention
from tests.modeling.tiny import SHAPE

VOCABULARY = 64
LENGTHS = [5, 12, 9]
CONFIGS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, short window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral, long window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 40}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen2, one layer with a window": (
        Qwen2Config,
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 1, "head_dim": 16}),
    "phi": (PhiConfig, {}),
    "phi3": (Phi3Config, {"num_key_value_heads": 4}),
}
# Layers whose window is shorter than a sequence go to sdpa, with the mask that says so.
LAYERS_WITH_A_LAYOUT = {"mistral, short window": 0, "qwen2, one layer with a window": 1}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    """The same model with our attention, with sdpa in float32 and in float64; and the name."""
    config_class, options = CONFIGS[request.param]
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = config_class(vocab_size=VOCABULARY, initializer_range=0.3, **SHAPE, **ids, **options)
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="clara_fast").eval()
    sdpa = copy.deepcopy(ours)
    sdpa.set_attn_implementation("sdpa")
    exact = copy.deepcopy(sdpa).double()
    assert ours.config._attn_implementation == "clara_fast"
    return ours, sdpa, exact, request.param


@pytest.fixture
def layouts(monkeypatch):
    """The layouts of the calls of the op."""
    seen = []

    def spy(query, key, value, layout, **options):
        seen.append(layout)
        return ops.compressed_context_attention(query, key, value, layout, **options)

    monkeypatch.setattr(attention, "compressed_context_attention", spy)
    return seen


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def padded(ids: list[Tensor], side: str) -> dict[str, Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return {"input_ids": rows, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def flattened(ids: list[Tensor], **options) -> dict[str, Tensor]:
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": row.tolist()} for row in ids])
    batch.pop("labels")
    return batch


def values_and_gradients(model, inputs: dict, real: Tensor | None = None) -> list[Tensor]:
    """Logits of the rows in ``real``, and the gradients of a weighted sum of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits = logits[real] if real is not None else logits[0]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (logits * weights.to(logits.dtype)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_as_good_as(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], factor: int = 2) -> None:
    """error(ours) <= factor * error(sdpa) + rounding, each against float64."""
    assert len(ours) == len(theirs) == len(exact)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        rounding = 8 * torch.finfo(mine.dtype).eps * true.abs().max()
        errors = [(values.double() - true).abs().max().item() for values in (mine, other)]
        assert errors[0] <= factor * errors[1] + rounding.item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(models, ids, layouts, side):
    ours, sdpa, exact, name = models
    inputs = padded(ids, side)
    real = inputs["attention_mask"].bool()
    assert_as_good_as(*(values_and_gradients(model, inputs, real) for model in (ours, sdpa, exact)))
    assert len(layouts) == LAYERS_WITH_A_LAYOUT.get(name, 2), "sdpa would have done the rest"


def test_a_mask_with_holes_is_sdpa_s(models, ids, layouts):
    ours, sdpa, exact, _ = models
    inputs = padded(ids, "left")
    inputs["attention_mask"][1, 4] = 0
    real = inputs["attention_mask"].bool()
    assert_as_good_as(*(values_and_gradients(model, inputs, real) for model in (ours, sdpa, exact)))
    assert not layouts


@pytest.mark.parametrize("with_mask", [True, False])
def test_unpadded_batches(models, ids, layouts, with_mask):
    ours, sdpa, exact, name = models
    rows = torch.stack([ids[1], ids[1].flip(0)])
    inputs = {"input_ids": rows, **({"attention_mask": torch.ones_like(rows)} if with_mask else {})}
    real = torch.ones_like(rows, dtype=torch.bool)
    assert_as_good_as(*(values_and_gradients(model, inputs, real) for model in (ours, sdpa, exact)))
    assert len(layouts) == LAYERS_WITH_A_LAYOUT.get(name, 2)


@pytest.mark.parametrize("told_by", ["positions", "positions, with a cache", "bounds", "both"])
def test_packed_sequences_equal_separate_ones(models, ids, layouts, told_by):
    ours, sdpa, exact, name = models
    short = name == "mistral, short window"
    inputs = flattened(ids, return_flash_attn_kwargs=told_by in ("bounds", "both"))
    inputs["use_cache"] = told_by == "positions, with a cache"
    if told_by == "bounds":
        del inputs["position_ids"]
    if told_by == "positions, with a cache" and "window" in name:
        pytest.skip("transformers makes a mask of one sequence then, for every implementation")
    separate = []
    for model in (sdpa, exact):
        model.zero_grad()
        alone = [model(input_ids=row[None]).logits[0] for row in ids]
        logits = torch.cat(alone)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
        (logits * weights.to(logits.dtype)).sum().backward()
        separate.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    # Rotations counted from another start round differently.
    assert_as_good_as(values_and_gradients(ours, inputs), *separate, factor=10 if told_by == "bounds" else 2)
    assert len(layouts) == (0 if short else LAYERS_WITH_A_LAYOUT.get(name, 2))
    for layout in layouts:
        assert layout.q_len.tolist() == LENGTHS


def test_several_packed_rows(ids, models):
    ours, sdpa, exact, _ = models
    rows = torch.cat(ids)[:24].view(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    inputs = {"input_ids": rows, "position_ids": positions, "use_cache": False}
    real = torch.ones_like(rows, dtype=torch.bool)
    assert_as_good_as(*(values_and_gradients(model, inputs, real) for model in (ours, sdpa, exact)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(models, ids, reentrant):
    ours, *_ = models
    ours.train()
    for inputs in (flattened(ids), padded(ids, "left")):
        inputs["use_cache"] = False
        plain = values_and_gradients(ours, inputs)
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        try:
            checkpointed = values_and_gradients(ours, inputs)
        finally:
            ours.gradient_checkpointing_disable()
        for one, other in zip(plain, checkpointed, strict=True):
            assert torch.equal(one, other)
    ours.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 1},
    ],
    ids=["dynamic cache", "static cache", "no cache", "beams", "one token in a full cache"],
)
def test_generation_gives_the_same_tokens(models, ids, layouts, options):
    ours, sdpa, _, name = models
    inputs = padded(ids, "left")
    del inputs["position_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    mine, theirs = (model.generate(**inputs, **options) for model in (ours, sdpa))
    assert torch.equal(mine, theirs)
    assert len({tuple(row) for row in mine[:, 12:].tolist()}) > 1, "the samples differ, so the prompts matter"
    if not options.get("cache_implementation"):
        assert layouts or "short window" in name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("batch", ["left-padded", "unpadded", "one"])
def test_decoding_gives_the_same_logits(models, ids, layouts, batch, cache, holes):
    """A prompt in two parts, then two tokens, over a cache; the tokens go through the op but where a mask has holes."""
    ours, sdpa, exact, name = models
    rows = {"left-padded": ids, "unpadded": [ids[1], ids[1].flip(0)], "one": ids[1:2]}[batch]
    inputs = padded(rows, "left")
    if holes:
        inputs["attention_mask"][0, -4] = 0
    results, seen = [], []
    for model in (ours, sdpa, exact):
        options = {"config": model.config, **({"max_cache_len": 16} if cache == "static" else {})}
        kept = (StaticCache if cache == "static" else DynamicCache)(**options)
        logits = []
        for start, end in ((0, 7), (7, 10), (10, 11), (11, 12)):
            part = {name: values[:, start:end] for name, values in inputs.items()}
            part["attention_mask"] = inputs["attention_mask"][:, :end]
            layouts.clear()
            with torch.no_grad():
                output = model(**part, past_key_values=kept, use_cache=True)
            logits.append(output.logits[part["attention_mask"][:, start:].bool()])
            if model is ours:
                seen.append(len(layouts))
        results.append(logits)
    assert_as_good_as(*results)
    # Where a layer's window hides the hole from a token, what it reads is one run again: both are right.
    assert seen[-1] == 2 if not holes else seen[-1] == 0 or "window" in name


class TestRefused:
    @pytest.fixture
    def model(self):
        config = LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.2, **SHAPE)
        return AutoModelForCausalLM.from_config(config, attn_implementation="clara_fast").train()

    def test_dropout_goes_to_sdpa_or_is_refused(self, model, ids, layouts):
        assert model(**padded(ids, "left")).logits.isfinite().all()
        assert not layouts
        inputs = flattened(ids, return_flash_attn_kwargs=True)
        del inputs["position_ids"]
        with pytest.raises(ValueError, match=r"packed attention does not know dropout \(0.2\)"):
            model(**inputs)

    def test_attention_weights(self, model, ids):
        with pytest.raises(ValueError, match=r'no weights to give.*attn_implementation="eager"'):
            model(ids[0][None], output_attentions=True)

    @pytest.mark.parametrize("feature", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
    def test_soft_caps_and_sinks(self, model, feature):
        states = torch.zeros(1, 4, 3, 8)
        with pytest.raises(ValueError, match=rf"attention does not know {next(iter(feature))} \(.+\)"):
            attention.clara_fast_attention(model.model.layers[0].self_attn, states, states, states, None, **feature)


def test_importing_clara_fast_is_enough():
    code = (
        "import sys, clara_fast; assert 'transformers' not in sys.modules;"
        "from transformers import AutoModelForCausalLM, LlamaConfig;"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
        "num_attention_heads=1);"
        "model = AutoModelForCausalLM.from_config(config, attn_implementation='clara_fast');"
        "assert model.config._attn_implementation == 'clara_fast'; assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_importing_clara_fast_after_transformers_is_enough(monkeypatch):
    monkeypatch.delitem(sys.modules, "clara_fast.modeling.attention")
    monkeypatch.setattr(attention.AttentionInterface, "_global_mapping", {})
    finders = list(sys.meta_path)
    register_attention()
    assert "clara_fast" in attention.AttentionInterface._global_mapping
    assert sys.meta_path == finders


def test_what_breaks_the_registration_does_not_break_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "clara_fast.modeling.attention", None)
    with pytest.warns(UserWarning, match='attn_implementation="clara_fast" is not there: .*attention'):
        register_attention()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_are_written_into_are_read_again(models, mode):
    ours, *_ = models
    rows = torch.arange(12).view(1, 12) + 5
    other = torch.tensor([[*range(4), *range(8)]])
    with mode():
        positions = torch.tensor([[*range(6), *range(6)]])
        first = ours(input_ids=rows, position_ids=positions).logits
        positions.copy_(other)
        second = ours(input_ids=rows, position_ids=positions).logits
        assert torch.equal(second, ours(input_ids=rows, position_ids=other).logits)
        assert not torch.equal(first, second)

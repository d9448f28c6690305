"""Bases in 8 and 4 bits (bitsandbytes): roles train on them as on the same weights written out."""

from __future__ import annotations

import pytest
import torch

from clara_fast import Clara, MemoryStore, ScpTrainer
from clara_fast.modeling import roles
from clara_fast.store import StoreMismatchError
from clara_fast.training.collation import ScpCollator
from tests.modeling.tiny import DOCUMENTS, make_base
from tests.training.test_scp import SAMPLES, adapters_of, arguments

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install clara-fast[kbit]")
TEXTS = [document[:60] for document in DOCUMENTS[:4]]
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
KINDS = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


def new_model(base, kind):
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    model = Clara.from_base(
        base,
        doc_max_length=64,
        compression_rate=32,
        lora=lora,
        device="cpu",
        quantization_config=SETTINGS.get(kind),
    )
    torch.manual_seed(0)
    for role in sorted(model.roles):
        for parameter in roles.role_parameters(model.lm, role).values():
            parameter.data.normal_(std=0.05)
    return model


def written_out(base, kind):
    """A model with the weights that the quantised base stands for, as ordinary layers."""
    model, quantised = new_model(base, None), new_model(base, kind)
    layers = dict(quantised.lm.named_modules())
    for name, module in model.lm.named_modules():
        if name.endswith("base_layer"):
            module.weight.data.copy_(weight_of(layers[name]))
    return model


def weight_of(layer):
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scale[:, None] / 127


def step(model):
    model.train_only("compressor", "generator", "memory_tokens")
    model.train()
    batch = ScpCollator(model)(SAMPLES[:3])
    output = model(batch["documents"], batch["prompts"])
    (output.lm_loss + output.mse_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(output.lm_loss.detach()), gradients


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_is_that_of_the_weights_written_out(base, kind):
    quantised = new_model(base, kind)
    found = [m for m in quantised.lm.modules() if isinstance(m, KINDS[kind])]
    assert len(found) == 2 * 7, "every linear layer of the decoder"
    assert not isinstance(quantised.lm.lm_head, KINDS[kind])
    loss, gradients = step(quantised)
    expected_loss, expected = step(written_out(base, kind))
    plain_loss, plain = step(new_model(base, None))
    assert gradients.keys() == expected.keys()
    assert len(gradients) == 1 + 2 * 2 * 7 * 2

    def distance(a, b):
        return sum(float((a[name] - b[name]).double().pow(2).sum()) for name in a) ** 0.5

    # LLM.int8 rounds activations to 127 steps as well; 4-bit layers compute in full precision.
    rounding = 1 / 127 if kind == "int8" else 1e-5
    assert loss == pytest.approx(expected_loss, rel=rounding)
    size = distance(expected, {name: torch.zeros_like(g) for name, g in expected.items()})
    assert distance(gradients, expected) < 4 * rounding * size
    assert distance(plain, expected) > 0, "quantisation changed something"
    assert plain_loss != expected_loss
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_trains_and_is_saved_and_resumes(base, kind, tmp_path):
    def trainer(folder, **options):
        settings = arguments(tmp_path / folder, max_steps=4, save_steps=2, **options)
        return ScpTrainer(new_model(base, kind), settings, SAMPLES)

    unbroken = trainer("a", gradient_checkpointing=True)
    frozen = {n: p.detach().clone() for n, p in unbroken.model.lm.named_parameters() if "lora_" not in n}
    unbroken.train()
    resumed = trainer("a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected = adapters_of(unbroken.model)
    for name, tensor in adapters_of(resumed.model).items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name
    assert all(torch.equal(p, frozen[n]) for n, p in unbroken.model.lm.named_parameters() if n in frozen)

    unbroken.model.save_pretrained(tmp_path / "saved", adapter_dtype=torch.float32)
    loaded = Clara.from_pretrained(tmp_path / "saved", device="cpu")
    assert any(isinstance(m, KINDS[kind]) for m in loaded.lm.modules()), "the model remembers it"
    assert loaded.fingerprint == unbroken.model.fingerprint
    assert torch.equal(loaded.compress(TEXTS), unbroken.model.eval().compress(TEXTS))


def test_memories_of_another_precision_are_refused(base, tmp_path):
    model = new_model(base, "nf4")
    with MemoryStore.create(tmp_path / "store", model) as store:
        store.add([str(i) for i in range(len(TEXTS))], TEXTS, model.compress(TEXTS))
    MemoryStore.open(tmp_path / "store", new_model(base, "nf4"))
    for other in ("int8", None):
        with pytest.raises(StoreMismatchError, match="fingerprint"):
            MemoryStore.open(tmp_path / "store", new_model(base, other))


def test_bad_settings(base):
    with pytest.raises(ValueError, match="must set load_in_8bit or load_in_4bit"):
        Clara.from_base(base, quantization_config={"bnb_4bit_quant_type": "nf4"})
    with pytest.raises(ValueError, match="must be a BitsAndBytesConfig or its settings"):
        Clara.from_base(base, quantization_config=4)

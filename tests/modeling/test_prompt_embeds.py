"""Prompts as embeddings: another engine answers from them as the model itself does."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from clara_fast import Clara, MemoryStore
from clara_fast.modeling import roles
from tests.modeling.tiny import DOCUMENTS, make_base

QUESTIONS = ["Where do terns fly?", "Who built the bridge, and </s> why?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("base"), "mistral")
    model = Clara.from_base(base, doc_max_length=64, lora={"r": 4, "alpha": 8}, device="cpu")
    torch.manual_seed(0)
    for parameter in roles.role_parameters(model.lm, "generator").values():
        parameter.data.normal_(std=0.2)  # an adapter that changes every answer
    return model


def generated(engine, embeds, stop, model):
    tokens = engine.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return model.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


@pytest.mark.filterwarnings("ignore:.*doc_max_length")
def test_plain_transformers_give_the_same_answer(tmp_path, model):
    """The base model with the saved adapter, as an engine would load them: nothing of ours in it."""
    with MemoryStore.create(tmp_path / "store", model, dtype="float32") as store:
        store.add([f"d{i}" for i in range(12)], DOCUMENTS, model.compress(DOCUMENTS))
    model.save_pretrained(tmp_path / "model", adapter_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(model.config.base_model)
    engine = PeftModel.from_pretrained(plain, tmp_path / "model" / "generator").eval()
    for question in QUESTIONS:
        expected = model.answer(question, store=store, top_k=3, max_new_tokens=12)
        prompt = model.to_prompt_embeds(question, store=store, top_k=3)
        assert prompt.embeds.shape == (len(prompt.token_ids), model.config.hidden_size)
        assert [d.id for d in prompt.documents] == [d.id for d in expected.documents]
        memory = store.memory([store.ids[d.id] for d in prompt.documents]).flatten(0, 1)
        assert prompt.embeds[prompt.memory_slots].equal(memory)
        embeds = torch.load(io.BytesIO(base64.b64decode(prompt.to_base64())), weights_only=True)
        assert generated(engine, embeds, prompt.stop_token_ids, model) == expected.text
        with engine.disable_adapter():
            assert generated(engine, embeds, prompt.stop_token_ids, model) != expected.text
        again = model.to_prompt_embeds(question, memory=store.memory([store.ids[d.id] for d in prompt.documents]))
        assert again.embeds.equal(prompt.embeds)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="exactly one of store and memory"):
        model.to_prompt_embeds("What?")
    with pytest.raises(ValueError, match=r"memory .* must be \[k, m, D\]"):
        model.to_prompt_embeds("What?", memory=torch.zeros(4, 32))

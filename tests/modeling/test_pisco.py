"""A checkpoint in PISCO's format, written and run by transformers and peft alone, equals what Clara makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_fast import Clara
from clara_fast.modeling.answering import generate_ids
from tests.modeling.tiny import DOCUMENTS, make_base

LENGTH, RATE = 48, 16
SLOTS = [f"<MEM{i}>" for i in range(LENGTH // RATE)]
CONFIG = {
    "model_type": "COCOM",
    "auto_map": {"AutoConfig": "modelling_pisco.COCOMConfig", "AutoModel": "modelling_pisco.COCOM"},
    "compr_model_name": None,
    "compr_rate": RATE,
    "doc_max_length": LENGTH,
    "different_mem_tokens": True,
    "lora": True,
    "lora_r": 4,
    "sep": True,
    "training_form": "both_separately",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The checkpoint's folder, and the model and tokenizer that it was written from."""
    folder = tmp_path_factory.mktemp("pisco")
    base = make_base(folder / "base", "mistral")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SLOTS, "<AE>", "<ENC>", "<SEP>"]})
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    added = len(tokenizer) - model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        table.data[-added:] = torch.randn(added, table.shape[1], generator=generator) * 0.2
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    tables = {n: p.detach() for n, p in model.named_parameters() if "embed_tokens" in n or "lm_head" in n}
    model = get_peft_model(model, lora, "decoder_adapter")
    model.add_adapter("encoder_adapter", lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapters = {
        adapter: {
            name.removeprefix("base_model.model."): tensor.detach()
            for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
        }
        for adapter in ("decoder_adapter", "encoder_adapter")
    }
    torch.save(adapters, folder / "adapters.pth")
    torch.save(tables, folder / "decoder_first_last_layers.pth")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "decoder_model_name": str(base)}))
    return folder, model.eval(), tokenizer


@pytest.mark.filterwarnings("ignore:.*doc_max_length")
def test_memories_and_answers_are_theirs(theirs):
    folder, model, tokenizer = theirs
    clara = Clara.from_pretrained(folder, device="cpu", dtype="float32")
    assert set(clara.roles) == {"compressor", "generator"}
    documents, question = DOCUMENTS[:2], "Where do terns go?"  # longer than 48 tokens: cut as theirs are
    memory_ids = tokenizer.convert_tokens_to_ids(SLOTS)
    memories = []
    model.set_adapter("encoder_adapter")
    for text in documents:
        text = f"<ENC>{tokenizer.bos_token}{text}{tokenizer.eos_token}"
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=LENGTH + 3)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids + memory_ids]), output_hidden_states=True).hidden_states[-1]
        memories.append(states[0, -len(memory_ids) :])
    torch.testing.assert_close(clara.compress(documents), torch.stack(memories), rtol=1e-4, atol=1e-5)

    blocks = ("".join(SLOTS) + "<SEP>") * len(documents)
    system = (
        "You are a helpful assistant. Your task is to extract relevant information from provided documents and to "
        "answer to questions as briefly as possible."
    )
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Background:\n{blocks}\n\nQuestion:{question}"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    model.set_adapter("decoder_adapter")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        embeddings[0, torch.isin(ids[0], torch.tensor(memory_ids))] = torch.cat(memories)
        expected = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tokenizer.eos_token_id,
        )
    ours = [clara.text.prompt(clara.prompts, clara.prompts.answer(question, len(documents)))]
    assert ours == ids.tolist()
    found = generate_ids(clara, ours, [clara.compress(documents)], max_new_tokens=12)
    assert found[0].tolist() == expected[0].tolist()
    assert len(set(found[0].tolist())) > 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"compr_model_name": "bert-base"}, r"compr_model_name \('bert-base'\) in .*config.json must be None: of this"),
        ({"training_form": "both"}, r"training_form \('both'\) in .* must be 'both_separately'"),
        ({"lora": False}, r"lora \(False\) in .* must be True"),
    ],
)
def test_relatives_of_another_build_are_refused(tmp_path, changed, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "decoder_model_name": "base", **changed}))
    with pytest.raises(ValueError, match=message):
        Clara.from_pretrained(tmp_path)

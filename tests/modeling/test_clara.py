"""The model as its users meet it: any base, any batch, saved and loaded, bad input."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from clara_fast import Clara, MemoryStore
from clara_fast.modeling import roles
from clara_fast.modeling.packing import group_prompts, pack_documents, pack_prompts
from tests.modeling.tiny import ARCHITECTURES, DOCUMENTS, make_base

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


def fresh(base, **options):
    """A model whose adapters do something: their B matrices are not zero."""
    settings = {"doc_max_length": 64, "compression_rate": 16, "lora": LORA, "device": "cpu", **options}
    model = Clara.from_base(base, **settings)
    stir(model)
    return model


def stir(model):
    generator = torch.Generator().manual_seed(1)
    for role in sorted(model.roles):
        for parameter in roles.role_parameters(model.lm, role).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def any_model(request, tmp_path_factory):
    return fresh(make_base(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return fresh(base)


def quiet_compress(model, documents, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.compress(documents, **options)


def test_packed_equals_one_at_a_time(any_model):
    documents = [*DOCUMENTS[:5], "A.", "Tea"]
    packed = quiet_compress(any_model, documents)
    alone = torch.cat([quiet_compress(any_model, [document]) for document in documents])
    order = [3, 0, 6, 5, 1, 4, 2]
    shuffled = quiet_compress(any_model, [documents[i] for i in order], max_tokens=150)
    assert packed.shape == (7, 4, 32)
    assert torch.allclose(packed, alone, rtol=0, atol=1e-5 * float(packed.abs().max()))
    assert torch.allclose(packed[order], shuffled, rtol=0, atol=1e-5 * float(packed.abs().max()))


def test_packed_equals_the_library_s_own_padded_batch(any_model):
    """The same tokens through transformers' sdpa with left padding and an ordinary mask."""
    ids, _ = any_model.text.documents(["Tea and bread.", DOCUMENTS[0][:60]])
    rows = [[*row, *any_model.text.memory_ids] for row in ids]
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    padded = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    with torch.no_grad(), roles.default_role(any_model.lm.get_decoder(), "compressor"):
        hidden = any_model.lm.get_decoder()(
            padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        ).last_hidden_state
    expected = hidden[:, -any_model.config.num_memory :]
    memory = any_model.compress(["Tea and bread.", DOCUMENTS[0][:60]])
    assert torch.allclose(memory, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_answers_from_documents_memory_and_text(any_model):
    question = "What is it made of?"
    documents = [document[:80] for document in DOCUMENTS[:4]]
    by_documents = any_model.answer(question, documents=documents, top_k=2, max_new_tokens=6)
    rows, scores = any_model.rerank(question, documents, top_k=2)
    assert [int(d.id) for d in by_documents.documents] == rows.tolist()
    assert [d.score for d in by_documents.documents] == scores.tolist() == sorted(scores.tolist(), reverse=True)
    memory = any_model.compress(documents)[rows]
    by_memory = any_model.answer(question, memory=memory, max_new_tokens=6)
    assert by_memory.text == by_documents.text
    assert by_documents.timings.keys() == {"query", "compress", "search", "generate"}
    batch = any_model.answer([question, "Who?"], documents=[documents, documents[:2]], top_k=2, max_new_tokens=6)
    assert batch[0].text == by_memory.text
    assert len(any_model.paraphrase(memory, max_new_tokens=5)) == 2


def test_answers_from_a_store(model, base, tmp_path):
    documents = [document[:80] for document in DOCUMENTS[:4]]
    with MemoryStore.create(tmp_path / "store", model, dtype="float32") as store:
        store.add(list("abcd"), documents, model.compress(documents))
    by_store = model.answer("What is it made of?", store=store, top_k=2, max_new_tokens=6)
    by_documents = model.answer("What is it made of?", documents=documents, top_k=2, max_new_tokens=6)
    assert by_store.text == by_documents.text
    assert [d.id for d in by_store.documents] == ["abcd"[int(d.id)] for d in by_documents.documents]
    assert by_store.timings.keys() == {"query", "search", "generate"}
    with pytest.raises(ValueError, match=r"top_k \(9\) must be at least 1 and at most the number of documents \(4\)"):
        model.answer("What?", store=store, top_k=9)
    foreign = fresh(base, doc_max_length=32, compression_rate=8)
    with pytest.raises(ValueError, match="was written by another model"):
        foreign.answer("What?", store=store, top_k=1)


def test_one_batch_reads_other_memories_for_each_question(model):
    """As many documents as each question has, none included: together as alone."""
    memory = quiet_compress(model, DOCUMENTS[:3])
    questions, memories = ["Which bridge?", "Who made the tea?", "What?"], [memory[:1], memory[1:], memory[:0]]
    together = model.answer(questions, memory=memories, max_new_tokens=6)
    alone = [model.answer(q, memory=m, max_new_tokens=6).text for q, m in zip(questions, memories, strict=True)]
    assert [answer.text for answer in together] == alone
    assert [len(answer.documents) for answer in together] == [1, 2, 0]
    assert len(set(alone)) == 3


def test_generation_options_and_streaming(model):
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(model.tokenizer, skip_special_tokens=True)
    memory = model.compress(DOCUMENTS[:1])
    answer = model.answer("Which?", memory=memory, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer).strip() == answer.text
    torch.manual_seed(0)
    sampled = model.answer("Which?", memory=memory, max_new_tokens=8, do_sample=True, temperature=5.0)
    assert sampled.text != answer.text


@pytest.mark.parametrize("connector", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_saved_and_loaded_is_the_same_model(tmp_path, architecture, connector):
    model = fresh(make_base(tmp_path / "base", architecture), connector=connector, memory_positions="spread", top_k=2)
    model.add_role("query_reasoner", copy_of="compressor")
    if connector:
        model.calibrate_connector(DOCUMENTS[:4])
    model.memory_embeddings.data.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "saved")
    # Adapters are kept in bfloat16, so what was loaded once is what is loaded again.
    once = Clara.from_pretrained(tmp_path / "saved", device="cpu")
    once.save_pretrained(tmp_path / "saved")
    again = Clara.from_pretrained(tmp_path / "saved", device="cpu")
    assert once.fingerprint == again.fingerprint == model.fingerprint
    assert again.roles == {"compressor", "query_reasoner", "generator"}
    assert again.config == once.config
    assert torch.equal(quiet_compress(once, DOCUMENTS), quiet_compress(again, DOCUMENTS))
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    files = [f for f in (tmp_path / "saved").rglob("*") if f.is_file()]
    assert all(f.stat().st_mode & 0o777 == 0o644 for f in files), "others may read a model that is shared"


@pytest.mark.parametrize("rate", [4, 32])
def test_a_start_at_another_rate_keeps_all_weights(base, tmp_path, rate):
    model = fresh(base, connector=True, compression_rate=8)
    model.calibrate_connector(DOCUMENTS[:4])
    model.memory_embeddings.data.normal_()
    model.save_pretrained(tmp_path / "saved", adapter_dtype=torch.float32)
    other = Clara.from_pretrained(tmp_path / "saved", device="cpu", compression_rate=rate)
    assert other.config.num_memory == other.config.doc_max_length // rate == len(other.memory_embeddings)
    # Every new token is a saved one, in their order, and all along them.
    old, new = model.memory_embeddings, other.memory_embeddings
    came_from = [int((row == old).all(1).nonzero()) for row in new]
    assert came_from == sorted(came_from)
    gaps = torch.tensor(came_from).diff()
    assert int(gaps.max()) <= -(-len(old) // len(new))
    for role in model.roles:
        mine, theirs = (roles.role_parameters(m.lm, role) for m in (model, other))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    markers = [m.lm.get_input_embeddings().weight[m.text.added_ids[-3:]] for m in (model, other)]
    assert torch.equal(*markers)
    assert torch.equal(model.connector.weight, other.connector.weight)
    assert other.answer("Which?", documents=DOCUMENTS[:2], top_k=1, max_new_tokens=2).documents
    # What is saved again is a model of the new rate.
    other.save_pretrained(tmp_path / "again", adapter_dtype=torch.float32)
    assert Clara.from_pretrained(tmp_path / "again", device="cpu").config.compression_rate == rate


def test_peft_loads_the_adapters(model, base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "saved")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved" / "generator")
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad(), roles.default_role(model.lm.get_decoder(), "generator"):
        mine = model.lm(ids).logits[..., : theirs.config.vocab_size]
    assert torch.allclose(theirs(ids).logits, mine, atol=2e-2 * float(mine.abs().max()))
    bare = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert not torch.allclose(bare, mine, atol=2e-2 * float(mine.abs().max()))


def test_bfloat16(base, tmp_path):
    wide = fresh(base)
    wide.save_pretrained(tmp_path / "saved")
    narrow = Clara.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    a, b = quiet_compress(wide, DOCUMENTS[:4]), quiet_compress(narrow, DOCUMENTS[:4])
    assert b.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(a.flatten(1), b.float().flatten(1)).min() > 0.99
    assert wide.fingerprint == narrow.fingerprint
    assert narrow.answer("Which?", memory=b[:2], max_new_tokens=3).text is not None


def scp_inputs(model, documents=DOCUMENTS[:3]):
    text, prompts = model.text, model.prompts
    groups = [
        group_prompts(
            [text.exchange(prompts, prompts.answer(q, 1), a) for q, a in (("Who?", "Ann"), ("Where?", "There"))]
        )
        for _ in documents
    ]
    return {"documents": model.pack(documents), "prompts": pack_prompts(groups, frozenset(text.memory_ids))}


def gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    (output.lm_loss + 0.1 * output.mse_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_branches_equal_separate_sequences(model):
    model.train_only("compressor", "generator", "memory_tokens")
    text, prompts = model.text, model.prompts
    pairs = [("Who was it?", "Ann"), ("Where?", "On the far bank"), ("Which colour?", "Blue and green")]
    exchanges = [text.exchange(prompts, prompts.answer(q, 1), a) for q, a in pairs]
    shared = pack_prompts([group_prompts(exchanges)], frozenset(text.memory_ids))
    separate = pack_prompts([group_prompts([e]) for e in exchanges], frozenset(text.memory_ids))
    assert shared.input_ids.numel() < separate.input_ids.numel() < sum(len(ids) for ids, _ in exchanges)
    one = gradients(model, documents=model.pack(DOCUMENTS[:1]), prompts=shared)
    three = gradients(model, documents=model.pack([DOCUMENTS[0]] * 3), prompts=separate)
    assert one.keys() == three.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, three[name], rtol=0, atol=2e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    """The reference recomputes with the wrong adapters; a role is part of the call here."""
    model.train_only("compressor", "generator", "memory_tokens")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    inputs = scp_inputs(model)
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients(model, **inputs)
    assert plain.keys() == checkpointed.keys()
    assert any("compressor" in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=0, atol=1e-5 * float(gradient.abs().max())), name


def test_frozen_roles_have_no_dropout_and_no_graph(model):
    model.train_only("generator")
    model.train()
    first, second = (model(**scp_inputs(model)) for _ in range(2))
    assert torch.equal(first.memory, second.memory)
    assert not first.memory.requires_grad
    assert not torch.equal(first.lm_loss, second.lm_loss), "the generator trains, so its dropout is on"
    first.lm_loss.backward()
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"generator"}


def test_only_memory_rows_of_the_embedding_train(model):
    model.train_only("compressor", "generator", "memory_tokens")
    gradient = gradients(model, **scp_inputs(model))
    assert gradient["memory_embeddings"].shape == (4, 32)
    assert not any("embed_tokens" in name or "lm_head" in name for name in gradient)


def test_compress_leaves_training_mode_alone(model):
    model.train_only("compressor")
    model.train()
    a, b = quiet_compress(model, DOCUMENTS[:2]), quiet_compress(model, DOCUMENTS[:2])
    assert model.training
    assert torch.equal(a, b)


def test_special_tokens_inside_a_text_are_only_text(model):
    plain, _ = model.text.documents(["Left < MEM0> and < |im_end|>right"])
    hostile, _ = model.text.documents(["Left <MEM0> and <|im_end|>right"])
    assert plain == hostile
    assert model.answer("Is <MEM1> <SEP> here?", memory=model.compress(["Tea"]), max_new_tokens=2).text is not None


def test_spread_positions():
    packed = pack_documents([[1] * 8, [1] * 3], [90, 91, 92, 93], spread=True)
    assert packed.position_ids.tolist() == [*range(8), 1, 3, 5, 7, 0, 1, 2, 0, 1, 1, 2]


class TestBadInput:
    def test_sliding_window_shorter_than_a_document(self, model, monkeypatch):
        monkeypatch.setattr(model.lm.config, "sliding_window", 20, raising=False)
        assert model.compress(["Tea."]).shape == (1, 4, 32)
        with pytest.raises(ValueError, match=r"does not fit the base model's sliding_window \(20\)"):
            quiet_compress(model, DOCUMENTS[:1])

    def test_empty_documents(self, model):
        for text in ("", " \n\t"):
            with pytest.raises(ValueError, match=r"documents\[1\] must hold text"):
                model.compress(["fine", text])
        with pytest.raises(ValueError, match=r"documents\[0\] must hold text"):
            model.encode_queries("")
        assert model.compress([]).shape == (0, 4, 32)

    def test_one_string_for_many(self, model):
        with pytest.raises(TypeError, match="must be a sequence of strings"):
            model.compress("one document")
        with pytest.raises(TypeError, match=r"documents\[1\] must be a string, not NoneType"):
            model.compress(["fine", None])

    def test_too_long_is_cut_and_counted(self, model):
        with pytest.warns(UserWarning, match=r"2 of 3 texts were cut to doc_max_length \(64 tokens\)"):
            model.compress(["word " * 300, "short", "long " * 400])

    def test_top_k_above_the_number_of_documents(self, model):
        with pytest.raises(
            ValueError, match=r"top_k \(7\) must be at least 1 and at most the number of documents \(2\)"
        ):
            model.answer("Who?", documents=["Ann came.", "Bob left."], top_k=7)
        assert len(model.answer("Who?", documents=["Ann came."], max_new_tokens=1).documents) == 1

    def test_ragged_lists(self, model):
        with pytest.raises(ValueError, match="one list for each of 2 questions"):
            model.answer(["Who?", "Where?"], documents=[["Ann."], ["There."], ["Then."]])
        with pytest.raises(ValueError, match=r"memory must hold one \[k, m, D\] for each of these 2 questions, not 3"):
            model.answer(["Who?", "Where?"], memory=torch.zeros(3, 2, 4, 32))
        with pytest.raises(
            ValueError, match=r"memory of question 1 \(\(2, 3, 32\)\) must be \[k, m, D\] with m, D = \(4, 32\)"
        ):
            model.answer(["Who?", "Where?"], memory=[torch.zeros(1, 4, 32), torch.zeros(2, 3, 32)])

    def test_no_source_or_two(self, model):
        with pytest.raises(ValueError, match="exactly one of store, documents and memory"):
            model.answer("Who?")
        with pytest.raises(ValueError, match="exactly one of store, documents and memory"):
            model.answer("Who?", documents=["Ann."], memory=torch.zeros(1, 4, 32))

    def test_unknown_part_or_role(self, model):
        with pytest.raises(ValueError, match="'query_reasoner'"):
            model.train_only("query_reasoner")
        with pytest.raises(ValueError, match="there already"):
            model.add_role("generator")

    def test_settings(self, base):
        with pytest.raises(ValueError, match=r"doc_max_length \(8\) must be at least compression_rate \(16\)"):
            Clara.from_base(base, doc_max_length=8, compression_rate=16)
        with pytest.raises(ValueError, match="memory_positions"):
            Clara.from_base(base, memory_positions="before")

    def test_missing_base(self, tmp_path):
        with pytest.raises(ValueError, match=r"base_model .* cannot be loaded"):
            Clara.from_base(tmp_path / "nowhere")


class TestDamagedCheckpoint:
    @pytest.fixture
    def saved(self, model, tmp_path):
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    @pytest.mark.parametrize("file", ["config.json", "memory.safetensors", "generator/adapter_model.safetensors"])
    def test_missing_file(self, saved, file):
        (saved / file).unlink()
        with pytest.raises(FileNotFoundError, match=file.split("/")[-1]):
            Clara.from_pretrained(saved)

    @pytest.mark.parametrize("file", ["memory.safetensors", "compressor/adapter_model.safetensors"])
    def test_truncated_file(self, saved, file):
        content = (saved / file).read_bytes()
        (saved / file).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{file.split('/')[-1]} is damaged"):
            Clara.from_pretrained(saved)

    def test_foreign_configuration(self, saved):
        (saved / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(ValueError, match="'llama' model, not a Clara"):
            Clara.from_pretrained(saved)
        (saved / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            Clara.from_pretrained(saved)

    def test_adapter_of_another_base(self, saved, tmp_path):
        from safetensors.torch import load_file, save_file

        file = saved / "compressor" / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "q_proj.lora_A" in name)
        save_file({**tensors, name: torch.zeros(4, 31)}, file)
        with pytest.raises(ValueError, match=r"lora_A.* has shape \(4, 31\), the base model needs \(4, 32\)"):
            Clara.from_pretrained(saved)
        del tensors[name]
        save_file(tensors, file)
        with pytest.raises(ValueError, match="compressor does not fit the base model: it lacks"):
            Clara.from_pretrained(saved)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            Clara.from_pretrained(tmp_path / "nowhere")

    def test_settings_without_a_base(self, model, tmp_path):
        model.save_pretrained(tmp_path / "theirs", format="ml-clara")
        (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "CLaRa"}))
        with pytest.raises(ValueError, match=r"config\.json names no decoder_model_name"):
            Clara.from_pretrained(tmp_path / "theirs")

    def test_unknown_adapter(self, model, tmp_path):
        model.save_pretrained(tmp_path / "theirs", format="ml-clara")
        file = tmp_path / "theirs" / "adapters.pth"
        adapters = torch.load(file, weights_only=True)
        torch.save({**adapters, "critic_adapter": adapters["encoder_adapter"]}, file)
        with pytest.raises(ValueError, match=r"adapters\.pth holds an unknown adapter: critic_adapter"):
            Clara.from_pretrained(tmp_path / "theirs")

    def test_reference_checkpoint_that_is_not_plain_tensors(self, model, tmp_path):
        model.save_pretrained(tmp_path / "theirs", format="ml-clara")
        (tmp_path / "theirs" / "adapters.pth").write_bytes(b"garbage")
        with pytest.raises(ValueError, match=r"adapters\.pth is damaged"):
            Clara.from_pretrained(tmp_path / "theirs")
        torch.save({"encoder_adapter": print}, tmp_path / "theirs" / "adapters.pth")
        with pytest.raises(ValueError, match=r"adapters\.pth is damaged or no checkpoint"):
            Clara.from_pretrained(tmp_path / "theirs")


def test_the_connector_trains_without_the_compressor(base):
    model = fresh(base, connector=True)
    model.train_only("connector", "generator")
    gradient = gradients(model, **scp_inputs(model))
    assert any(name.startswith("connector") for name in gradient)
    assert not any("compressor" in name or name == "memory_embeddings" for name in gradient)


def test_saving_over_another_model_leaves_nothing_of_it(base, tmp_path):
    model = fresh(base, lora={**LORA, "r": 2, "alpha": 4})
    model.add_role("query_reasoner")
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "trainer_state.json").write_text("{}")
    fresh(base).save_pretrained(tmp_path / "saved")
    assert Clara.from_pretrained(tmp_path / "saved", device="cpu").roles == {"compressor", "generator"}
    assert (tmp_path / "saved" / "trainer_state.json").exists()


def test_another_base_with_the_same_embeddings_has_another_fingerprint(model, base):
    before = model.fingerprint
    weight = model.lm.get_decoder().layers[-1].mlp.down_proj
    weight = getattr(weight, "base_layer", weight).weight
    weight.data += 0.01
    assert model.fingerprint != before


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tokens_are_counted_without_those_around_them(tmp_path, architecture):
    model = fresh(make_base(tmp_path / "base", architecture))
    texts = ["The cat", "A much longer text about a cat."]
    own = [len(model.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert model.count_tokens(texts) == own == [len(model.token_spans(text)) for text in texts]


def test_generation_options_that_do_not_fit(model):
    for option, value in (("num_return_sequences", 2), ("return_dict_in_generate", True), ("generation_config", {})):
        with pytest.raises(ValueError, match=option):
            model.answer("Who?", documents=DOCUMENTS[:2], **{option: value})

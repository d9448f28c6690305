"""LLMLingua-2 by the package llmlingua itself, with tiny classifiers that learnt to keep long words."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

from clara_fast.evaluation import harness
from clara_fast.evaluation.hard_compression import llmlingua2
from clara_fast.evaluation.journal import Journal
from clara_fast.evaluation.protocol import EvalProtocol, read_eval_set
from tests.modeling.tiny import DOCUMENTS

LONG = 6
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 514,
}
FAMILIES = {
    "bert-base-multilingual-cased": (BertConfig, BertForTokenClassification, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]),
    "xlm-roberta-large": (XLMRobertaConfig, XLMRobertaForTokenClassification, ["<s>", "<pad>", "</s>", "<unk>"]),
}


@pytest.fixture(scope="session", autouse=True)
def vocabulary_of_gpt():
    """llmlingua counts in it, and would download it: llama-index-core carries it along."""
    pytest.importorskip("llmlingua", reason="needs the extra 'llmlingua'")
    package = find_spec("llama_index")
    folders = (
        [Path(f, "core", "_static", "tiktoken_cache") for f in package.submodule_search_locations] if package else []
    )
    known = os.environ.get("TIKTOKEN_CACHE_DIR") or next((str(f) for f in folders if f.is_dir()), None)
    if known is None:
        pytest.skip("needs the extra 'llamaindex', whose package carries the vocabulary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", known)
        yield


@pytest.fixture(scope="session", params=FAMILIES)
def classifier(request, tmp_path_factory, vocabulary_of_gpt):
    """A folder with a classifier of the tokens of DOCUMENTS: a word is kept if it has six letters or more."""
    folder = tmp_path_factory.mktemp("llmlingua") / request.param
    config_class, model_class, special = FAMILIES[request.param]
    spaced = request.param.startswith("xlm")
    words = sorted({word for text in DOCUMENTS for word in re.findall(r"\w+|[^\w\s]", text)})
    names = [*special, *(f"▁{w}" if spaced and w.isalnum() else w for w in words)]
    unknown = special[3] if spaced else special[1]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown))
    if spaced:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
        special_names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special_names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_names).save_pretrained(folder)

    torch.manual_seed(0)
    pad = names.index(special_names["pad_token"])
    model = model_class(config_class(vocab_size=len(names), num_labels=2, pad_token_id=pad, **SHAPE))
    ids = torch.randint(len(special), len(names), (200, 32))
    labels = torch.tensor([[int(len(names[i].lstrip("▁")) >= LONG) for i in row] for row in ids.tolist()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    model.save_pretrained(folder)
    return folder


def words_of(text):
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("rate", [4, 8])
def test_words_that_the_classifier_wants_are_kept(model, classifier, rate):
    import tiktoken

    tokens = tiktoken.encoding_for_model("gpt-3.5-turbo")
    shorten = llmlingua2(model, str(classifier), rate)
    for text in DOCUMENTS[:4]:
        kept = words_of(shorten(text))
        assert kept
        assert all(len(word) >= LONG for word in kept), kept
        rest = iter(words_of(text))
        assert all(word in rest for word in kept), "not in the text's order"
        share = sum(len(tokens.encode(f" {word}")) for word in kept) / len(tokens.encode(text))
        # The word that the threshold falls into goes as a whole, and so do all that are as probable.
        assert 0.3 / rate < share <= 1 / rate + 0.02


def test_without_a_rate_as_much_is_kept_as_there_are_memory_tokens(model, classifier):
    import tiktoken

    tokens = tiktoken.encoding_for_model("gpt-3.5-turbo")
    shorten = llmlingua2(model, str(classifier))
    counts = [len(tokens.encode(shorten(text))) for text in DOCUMENTS]
    budget = model.config.num_memory
    assert max(counts) <= budget + 1
    assert sum(counts) >= 0.4 * budget * len(counts)  # its threshold is a whole percentage, of whole words


def test_it_is_a_method_of_the_harness(model, classifier, multidoc):
    asked = read_eval_set(str(multidoc), EvalProtocol())
    tools = {"llmlingua_model": str(classifier), "llmlingua_rate": 4.0}
    methods = ["text", "llmlingua2"]
    found = harness.run(
        "tiny", model, asked, EvalProtocol(), methods, Journal(None, {}), max_new_tokens=2, batch_size=4, tools=tools
    )
    text, short = ([one for one in found if one.method == method] for method in methods)
    for whole, part in zip(text, short, strict=True):
        assert (part.read, part.ranking) == (whole.read, whole.ranking)
        assert 0 < part.context_tokens < 0.5 * whole.context_tokens == 0.5 * whole.text_tokens
        assert part.loss != whole.loss
        assert part.seconds["compress"] > whole.seconds["compress"]


def test_what_cannot_be_loaded(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"llmlingua_model \(tiny\) must have xlm-roberta-large or bert-base-multi"):
        llmlingua2(model, "tiny")
    missing = tmp_path / "xlm-roberta-large"
    with pytest.raises(ValueError, match=rf"llmlingua_model \({missing}\) cannot be loaded: \S") as caught:
        llmlingua2(model, str(missing))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"llmlingua_rate \(0.5\) must be at least 1"):
        llmlingua2(model, "xlm-roberta-large", 0.5)
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(ImportError, match=r"pip install 'clara-fast\[llmlingua\]'"):
        llmlingua2(model)

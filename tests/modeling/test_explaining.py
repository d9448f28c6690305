"""A question's memory in words, and the gradient that teaches the retriever."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from clara_fast import Clara, MemoryStore, ops
from clara_fast.modeling import roles
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.modeling.explaining import score_gradient
from tests.modeling.tiny import DOCUMENTS, make_base

pytestmark = pytest.mark.filterwarnings("ignore:.*doc_max_length")
QUESTION, ANSWER = "What is quince tea made from?", "quince"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "connector"])
def model(request, tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("explained") / "base")
    clara = Clara.from_base(
        base, doc_max_length=64, lora={"r": 4, "alpha": 8}, top_k=2, connector=request.param, device="cpu"
    )
    clara.add_role("query_reasoner")
    generator = torch.Generator().manual_seed(1)
    for role in sorted(clara.roles):
        for parameter in roles.role_parameters(clara.lm, role).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if request.param:
        clara.calibrate_connector(DOCUMENTS)
    return clara


def test_the_lens_is_the_head_on_the_last_states(model):
    explanation = model.explain(QUESTION, num_tokens=3)
    packed = model.pack([QUESTION])
    with torch.no_grad(), roles.default_role(model.lm.get_decoder(), "query_reasoner"):
        # The whole language model on the same tokens: its logits at the memory slots, by its own norm and head.
        embeds = model.lm.get_input_embeddings()(packed.input_ids)
        embeds[-4:] = model.memory_embeddings.to(embeds)
        logits = model.lm(inputs_embeds=embeds[None], position_ids=packed.position_ids[None]).logits[0, -4:]
    known = logits[:, : model.text.added_ids[0]].softmax(-1)
    values, ids = known.topk(3)
    assert len(explanation.slots) == 4
    for slot, row, probabilities in zip(explanation.slots, ids.tolist(), values.tolist(), strict=True):
        assert [t.text for t in slot] == [model.tokenizer.decode([i]).strip() for i in row]
        assert [t.probability for t in slot] == pytest.approx(probabilities, rel=1e-4)
    assert explanation.documents == explanation.candidates == []


def test_marks(model):
    """Every token of the vocabulary is shown, so that those of question and documents must be marked."""
    explanation = model.explain(QUESTION, documents=["A bridge of stone.", "Quince."], top_k=2, num_tokens=400)
    names = [d.text for d in explanation.documents]
    tokens = {t.text: t for t in explanation.slots[0]}
    ids = model.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    for piece in (model.tokenizer.decode([i]).strip() for i in ids):
        if piece:
            assert tokens[piece].in_question
    assert "b" in tokens
    assert not tokens["b"].in_question
    assert names.index("A bridge of stone.") in tokens["of"].in_documents
    assert not any(token.in_question for token in explanation.added)
    likely = [token.probability for token in explanation.added]
    assert likely == sorted(likely, reverse=True)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_gradient_is_what_joint_training_sends_back(model, top_k):
    """Through the cosines it must give the gradient in the query that the training step computes."""
    query, memory = model.encode_queries(QUESTION)[0], model.compress(DOCUMENTS[:4])
    order = F.cosine_similarity(query.flatten()[None], memory.flatten(1)).argsort(descending=True)
    memory = memory[order]
    loss, gradient = score_gradient(model, QUESTION, ANSWER, query, memory, top_k, temperature=0.5)
    leaf = query.flatten()[None].clone().requires_grad_()
    prompts = pack_groups(model, [question_branches(model, [(QUESTION, ANSWER)], num_documents=top_k)])
    chosen, _, _ = ops.select_memory(leaf, memory.flatten(1)[None], memory[None], top_k, temperature=0.5)
    trained = model.answer_loss(prompts, chosen.flatten(0, 2))
    (expected,) = torch.autograd.grad(trained, leaf)
    cosines = F.cosine_similarity(leaf, memory.flatten(1))
    (found,) = torch.autograd.grad(cosines, leaf, gradient)
    assert loss == pytest.approx(float(trained.detach()), rel=1e-5)
    assert float(gradient.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-5 * float(gradient.abs().max()) + 1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_candidates_of_a_store_and_of_documents(model, tmp_path):
    documents = DOCUMENTS[:5]
    with MemoryStore.create(tmp_path / "store", model) as store:
        store.add([f"d{i}" for i in range(5)], documents, model.compress(documents))
        stored = model.explain(QUESTION, store=store, answer=ANSWER, num_candidates=4)
    given = model.explain(QUESTION, documents=documents, answer=ANSWER)
    assert [f"d{one.document.id}" for one in given.candidates[:4]] == [one.document.id for one in stored.candidates]
    assert [one.selected for one in stored.candidates] == [True, True, False, False]
    assert len(given.documents) == 2
    assert given.loss == pytest.approx(stored.loss, rel=0.05)  # the store rounds to bfloat16
    scores = [one.document.score for one in given.candidates]
    assert scores == sorted(scores, reverse=True)
    assert all(one.raised == (one.gradient < 0) for one in given.candidates)


def test_as_text_and_json_and_picture(model, tmp_path):
    pytest.importorskip("matplotlib")
    explanation = model.explain("Does $5 and $6 buy quince tea?", documents=DOCUMENTS[:3], answer=ANSWER)
    text = str(explanation)
    assert text.count("raised") + text.count("lowered") == 3
    assert len([line for line in text.splitlines() if " read " in line]) == 2
    again = json.loads(json.dumps(explanation.as_dict()))
    assert again["candidates"][0]["raised"] == explanation.candidates[0].raised
    assert len(again["slots"]) == 4
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        explanation.draw(tmp_path / f"why{suffix}")
        assert (tmp_path / f"why{suffix}").read_bytes().startswith(start)


def test_errors(model):
    for options, message in (
        ({"store": object(), "documents": ["a"]}, "takes a store or documents, not both"),
        ({"answer": "a"}, "needs a store or documents with it"),
        ({"documents": ["a"], "answer": ""}, "answer must hold text"),
        ({"documents": ["a"], "top_k": 2}, r"top_k \(2\) must be at least 1 and at most the number of documents \(1\)"),
        ({"num_candidates": 0}, r"num_candidates \(0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.explain(QUESTION, **options)
    with pytest.raises(ValueError, match="must hold text"):
        model.explain(" ")

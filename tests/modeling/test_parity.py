"""Equal to the reference implementation, number by number (tolerances as the recording's README suggests)."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from clara_fast import Clara
from clara_fast.modeling import roles
from clara_fast.modeling.answering import generate_ids
from clara_fast.modeling.packing import group_prompts, pack_prompts
from tests.modeling.fixtures import ADAPTER_OF_ROLE, CASES, ROOT, Recording, needs_recording, relative

pytestmark = needs_recording

TENSOR, SCORE, LOSS, GRADIENT, TRAJECTORY = 5e-5, 2e-5, 2e-5, 5e-4, 1e-3
STAGE_1_CASES = [case for case in CASES if not case.endswith("stage2")]
STAGE_2_CASES = [case for case in CASES if case.endswith("stage2")]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    recording = Recording(request.param)
    return SimpleNamespace(recording=recording, model=recording.model())


@pytest.fixture(scope="module")
def stepped(case):
    """The recorded training batch with its gradients."""
    recording, model = case.recording, case.model
    inputs = training_batch(recording, model)
    output = training_forward(recording, model, inputs)
    name = "train" if recording.stage == "stage2" else "train_total"
    (output.lm_loss + mse_weight(recording) * output.mse_loss).backward()
    return SimpleNamespace(**vars(case), inputs=inputs, output=output, name=name)


def exchanges(recording, model):
    text, prompts, batch = model.text, model.prompts, recording.info["batch"]
    instructions = iter(recording.info["case"]["paraphrase_instructions"])
    for question, answer in zip(batch["questions"], batch["answers"], strict=True):
        if recording.stage != "stage1":
            yield text.exchange(prompts, prompts.answer(question, model.config.top_k), answer)
        elif question:
            yield text.exchange(prompts, prompts.questions(), prompts.question_pairs(question, answer))
        else:
            yield text.exchange(prompts, prompts.paraphrase(next(instructions)), answer[0])


def training_batch(recording, model):
    batch = recording.info["batch"]
    groups = [group_prompts([exchange]) for exchange in exchanges(recording, model)]
    documents = [document for group in batch["docs"] for document in group]
    inputs = {
        "documents": model.pack(documents),
        "prompts": pack_prompts(groups, frozenset(model.text.memory_ids)),
    }
    if recording.stage == "stage2":
        # The reference cuts training questions at its decoder's length, not at the documents'.
        longest = recording.info["case"]["dec_max_len"] + 3
        inputs["queries"] = model.pack(batch["questions"], max_length=longest)
        inputs["candidates"] = torch.arange(len(documents)).view(len(batch["questions"]), -1)
    return inputs


def training_forward(recording, model, inputs):
    first = "query_reasoner" if recording.stage == "stage2" else "compressor"
    model.train_only(first, "generator", "memory_tokens")
    model.eval()
    model.zero_grad()
    return model(**inputs, taken_logit=math.log(1e-8))


def mse_weight(recording):
    return 0.0 if recording.stage == "stage2" else 0.1


def test_prompt_strings(case):
    prompts, recorded = case.model.prompts, case.recording.prompts
    k = recorded["generation_top_k"]
    for entry in recorded["stage1_qa"]:
        pairs = prompts.question_pairs(entry["questions"], entry["answers"])
        assert prompts.render(prompts.questions(k), pairs) == entry["text"]
    assert prompts.num_paraphrase_instructions == len(recorded["stage1_paraphrase"])
    for entry in recorded["stage1_paraphrase"]:
        turn = prompts.paraphrase(entry["instruction_index"], k)
        assert prompts.render(turn) == entry["prompt_only"]
        assert prompts.render(turn, entry["answer"]) == entry["text"]
    for name in ("stage1_2", "stage2"):
        turn = prompts.answer(recorded[name]["question"], k)
        assert prompts.render(turn) == recorded[name]["prompt_only"]
        ids, prompt_length = case.model.text.exchange(prompts, turn, recorded[name]["answer"])
        assert prompts.render(turn, recorded[name]["answer"]) == recorded[name]["text"]
        assert prompt_length == recorded[name]["prompt_len"] < len(ids)


def test_token_ids(case):
    recording, text = case.recording, case.model.text
    m = case.model.config.num_memory
    questions = [row["question"] for row in recording.inputs["open_qa"]]
    documents = [document for group in recording.info["batch"]["docs"] for document in group]
    tokens = recording.tokens
    for name, texts in (("docs/", recording.inputs["docs"]), ("queries/", questions), ("batch/enc_", documents)):
        rows = zip(tokens[f"{name}input_ids"], tokens[f"{name}attention_mask"], strict=True)
        assert text.documents(texts)[0] == [ids[mask > 0][:-m].tolist() for ids, mask in rows]
    rows = zip(tokens["batch/dec_input_ids"], tokens["batch/dec_attention_mask"], tokens["batch/labels"], strict=True)
    for (ids, prompt_length), (recorded, mask, labels) in zip(exchanges(recording, case.model), rows, strict=True):
        assert ids == recorded[mask > 0].tolist()
        assert [-100] * prompt_length + ids[prompt_length:] == labels[mask > 0].tolist()


def test_memories(case):
    with pytest.warns(UserWarning, match="2 of 12 texts were cut to doc_max_length"):
        memory = case.model.compress(case.recording.inputs["docs"])
    assert relative(memory, case.recording.number("compress/memory")) < TENSOR
    with torch.no_grad():
        _, mse = case.model.encode(case.model.pack(case.recording.inputs["docs"]), "compressor")
    assert relative(mse.mean(), case.recording.number("compress/mse_loss")) < LOSS


def test_query_memories(case):
    if "query/reps" not in case.recording.numbers:
        pytest.skip("stage 1 has no query reasoner")
    queries = case.model.encode_queries([row["question"] for row in case.recording.inputs["open_qa"]])
    assert relative(queries.flatten(1), case.recording.number("query/reps")) < TENSOR


def test_training_losses(stepped):
    r, output = stepped.recording, stepped.output
    assert relative(output.lm_loss, r.number(f"{stepped.name}/loss")) < LOSS
    assert relative(output.mse_loss, r.number(f"{stepped.name}/mse_loss")) < LOSS
    assert relative(output.memory, r.number(f"{stepped.name}/memory")) < TENSOR


def test_answer_logits(stepped):
    r, model = stepped.recording, stepped.model
    with torch.no_grad():
        output = stepped.output
        filling = output.memory
        if output.indices is not None:
            rows = stepped.inputs["candidates"].gather(1, output.indices)
            filling = output.memory[rows]
        logits, _ = model.answer_logits(stepped.inputs["prompts"], filling.flatten(0, -2))
    # Recorded for the first answer tokens of every row: find ours by counting through the rows' answers.
    counts = [int((torch.from_numpy(labels) != -100).sum()) for labels in r.tokens["batch/labels"]]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    seen = dict.fromkeys(range(len(counts)), 0)
    mine = []
    for row, _ in r.numbers[f"{stepped.name}/answer_logits_at"].astype(int).tolist():
        mine.append(starts[row] + seen[row])
        seen[row] += 1
    assert relative(logits[mine], r.number(f"{stepped.name}/answer_logits")) < TENSOR


def test_selection(stepped):
    if stepped.recording.stage != "stage2":
        pytest.skip("stage 1 selects nothing")
    r, output = stepped.recording, stepped.output
    assert relative(output.query.flatten(1), r.number("train/query_reps")) < TENSOR
    assert float((output.scores.detach() - r.number("train/scores")).abs().max()) < SCORE
    assert output.indices.tolist() == r.number("train/topk_idx").tolist()


def test_training_gradients(stepped):
    r, model = stepped.recording, stepped.model
    recorded_norms = r.expected["grad_norms"][stepped.name]
    checked = 0
    for role in model.roles:
        parameters = roles.role_parameters(model.lm, role)
        for name, parameter in parameters.items():
            key = f"{ADAPTER_OF_ROLE[role]}/{name.removesuffix('.weight')}"
            norm = recorded_norms[key]
            if norm is None:
                assert parameter.grad is None, f"{key} is frozen, but got a gradient"
                continue
            assert abs(float(parameter.grad.norm()) - norm) < GRADIENT * norm, key
            whole = f"{stepped.name}/grad/{key}"
            if whole in r.numbers:
                expected = r.number(whole)
                assert float((parameter.grad - expected).norm()) < GRADIENT * float(expected.norm()), key
                checked += 1
    assert checked == 12
    expected = r.number(f"{stepped.name}/grad/embed_tokens.mem_rows")
    assert float((model.memory_embeddings.grad - expected).norm()) < GRADIENT * float(expected.norm())


@pytest.mark.parametrize("name", STAGE_1_CASES)
def test_gradients_of_the_language_model_loss_alone(name):
    recording = Recording(name)
    model = recording.model()
    training_forward(recording, model, training_batch(recording, model)).lm_loss.backward()
    for role in model.roles:
        for key, parameter in roles.role_parameters(model.lm, role).items():
            norm = recording.expected["grad_norms"]["train_lm"][
                f"{ADAPTER_OF_ROLE[role]}/{key.removesuffix('.weight')}"
            ]
            assert abs(float(parameter.grad.norm()) - norm) < GRADIENT * norm, key


@pytest.mark.parametrize("name", CASES)
def test_training_trajectory(name):
    """Four AdamW steps on the training batch lose what the reference's four steps lost."""
    recording = Recording(name)
    model = recording.model()
    inputs = training_batch(recording, model)
    adapters = [p for role in model.roles for p in roles.role_parameters(model.lm, role).values()]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for expected in recording.number("trajectory/losses"):
        output = training_forward(recording, model, inputs)
        assert relative(output.lm_loss, expected) < TRAJECTORY
        (output.lm_loss + mse_weight(recording) * output.mse_loss).backward()
        torch.nn.utils.clip_grad_norm_([p for p in adapters if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", STAGE_2_CASES)
def test_contrastive_loss_over_candidates(name):
    """The supervised retriever's loss is a function of our scores and the recorded positives."""
    recording = Recording(name)
    model = recording.model()
    batch = recording.info["batch"]
    inputs = training_batch(recording, model)
    model.train_only("query_reasoner", "memory_tokens")
    memory, _ = model.encode(inputs["documents"], "compressor")
    query, _ = model.encode(inputs["queries"], "query_reasoner")
    candidates = memory[inputs["candidates"]].flatten(2)
    scores = torch.nn.functional.cosine_similarity(query.flatten(1)[:, None], candidates, dim=-1)
    assert float((scores.detach() - recording.number("retrieval/scores")).abs().max()) < SCORE
    logits = scores / 0.02
    losses = [
        row.logsumexp(0) - row[positives].logsumexp(0)
        for row, positives in zip(logits, batch["pos_index"], strict=True)
    ]
    loss = torch.stack(losses).mean()
    assert relative(loss, recording.number("retrieval/loss")) < 10 * LOSS
    loss.backward()
    for key, parameter in roles.role_parameters(model.lm, "query_reasoner").items():
        recorded = f"retrieval/grad_reactivated/query_reasoner_adapter/{key.removesuffix('.weight')}"
        if recorded in recording.numbers:
            expected = recording.number(recorded)
            assert float((parameter.grad - expected).norm()) < GRADIENT * float(expected.norm()), key


def test_generated_ids(case):
    recording, model = case.recording, case.model
    prompts, inputs = model.prompts, recording.inputs
    k = model.config.top_k
    with pytest.warns(UserWarning, match="were cut"):
        memory = model.compress(inputs["docs"])

    def ask(question, rows):
        return model.text.prompt(prompts, prompts.answer(question, len(rows))), memory[rows]

    def retell(rows, instruction):
        return model.text.prompt(prompts, prompts.paraphrase(instruction, len(rows))), memory[rows]

    open_qa = inputs["open_qa"]
    for run, recorded in recording.expected["generation"].items():
        if run == "paraphrase_1doc":
            tasks = [retell([document], instruction) for document, instruction in ((0, 0), (4, 5), (3, 12))]
        elif run == "paraphrase_3docs":
            tasks = [retell([0, 1, 2], 3)]
        elif run == "questions":
            tasks = []
            n = recording.info["case"]["n_docs"]
            for row, chosen in zip(open_qa, recorded["topk_idx"], strict=False):
                indices, _ = model.rerank(row["question"], [inputs["docs"][d] for d in row["docs"][:n]], top_k=k)
                assert indices.tolist() == chosen
                tasks.append(ask(row["question"], [row["docs"][i] for i in chosen]))
        else:
            tasks = [ask(row["question"], row["docs"][:k]) for row in open_qa[: len(recorded["texts"])]]
        ids = generate_ids(model, [t[0] for t in tasks], [t[1] for t in tasks], max_new_tokens=24)
        for mine, row in zip(ids.tolist(), recorded["rows"], strict=True):
            assert mine[: len(row["token_ids"])] == row["token_ids"], run


def test_written_back_in_the_reference_format(case, tmp_path):
    """A checkpoint of ours has the reference's files, keys and shapes, and the same numbers."""
    case.model.save_pretrained(tmp_path / "out", format="ml-clara")
    original = case.recording.folder / "checkpoint"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in original.iterdir()}
    name = "decoder_first_last_layers.pth"
    mine, theirs = (torch.load(f / name, weights_only=True) for f in (tmp_path / "out", original))
    assert_equal_tensors(mine, theirs)
    mine, theirs = (torch.load(f / "adapters.pth", weights_only=True) for f in (tmp_path / "out", original))
    assert mine.keys() == theirs.keys()
    for adapter, tensors in mine.items():
        lora = {key: tensor for key, tensor in theirs[adapter].items() if "lora_" in key}
        assert_equal_tensors(tensors, lora)
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", original))
    deciding = ("doc_max_length", "compr_rate", "lora_r", "sep", "different_mem_tokens", "generation_top_k")
    assert {key: mine[key] for key in deciding} == {key: theirs[key] for key in deciding}
    again = Clara.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert again.fingerprint == case.model.fingerprint


def assert_equal_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", ["nosys/stage1_2"])
def test_every_adapter_is_loaded_whatever_the_training_stage_says(name):
    """The reference starts a new generator when it reads this file; the trained one must be used."""
    recording = Recording(name)
    assert json.loads((recording.folder / "checkpoint" / "config.json").read_text())["training_stage"] == "stage1_2"
    stored = torch.load(recording.folder / "checkpoint" / "adapters.pth", weights_only=True)["decoder_adapter"]
    generator = roles.role_parameters(recording.model().lm, "generator")
    assert all(torch.equal(parameter, stored[key].float()) for key, parameter in generator.items())


def test_internal_base_path_is_remapped():
    from clara_fast.modeling.ml_clara import PUBLIC_BASE, read_settings

    settings = read_settings({"decoder_model_name": "/mnt/somewhere/mistral", "doc_max_length": 256}, ROOT, None)
    assert settings.base_model == PUBLIC_BASE

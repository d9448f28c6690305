"""Against `transformers serve` with a real, if tiny, model, which has learnt by heart what to say of two passages."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clara_fast import Clara, ScpTrainer
from clara_fast.cli import main
from clara_fast.data import read_scp
from clara_fast.training import ScpTrainingArguments
from tests.modeling.tiny import make_tokenizer

pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")

WELL, MILL = "Ann dug the well in May.", "Bob built the mill."
YES, NO = '{"reason": "so", "accept": true}', '{"reason": "not so", "accept": false}'
# Of each prompt, all that it asks; ours would be too long to learn by heart.
PROMPTS = {
    "simple": "$passage S",
    "complex": "$passage C",
    "answer": "$passage $question A",
    "judge_simple": "$passage $question J",
    "judge_complex": "$passage $question J",
    "missing": "$passage M",
    "paraphrase": "$passage P",
    "judge_paraphrase": "$passage V",
    "simple_again": "$passage T",
    "complex_again": "$passage D",
}
LEARNT = {
    f"{WELL} S": '```json\n{"question": "Who dug?"}\n```',
    f"{WELL} C": '{"questions": [{"facts": ["a", "b"], "question": "Who in May?"}]}',
    f"{WELL} Who dug? A": '{"answer": "Ann"}',
    f"{WELL} Who in May? A": '{"answer": "Ann"}',
    f"{WELL} Who dug? J": YES,
    f"{WELL} Who in May? J": NO,
    f"{WELL} M": '{"missing": []}',
    f"{WELL} P": '{"paraphrase": "In May Ann dug it."}',
    f"{WELL} V": YES,
    f"{MILL} S": "I know no question.",
    f"{MILL} C": "I know no question.",
    f"{MILL} P": '{"paraphrase": "The mill is by Bob."}',
    f"{MILL} V": NO,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a model of two layers that has learnt the above."""
    folder, tokenizer = tmp_path_factory.mktemp("served"), make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape, **ids))
    rows = []
    for asked, said in LEARNT.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
        )
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        rows.append((before, [*tokenizer(said, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    length = max(len(before) + len(after) for before, after in rows)
    padded = [b + a + [0] * (length - len(b) - len(a)) for b, a in rows]
    labels = [[-100] * len(b) + a + [-100] * (length - len(b) - len(a)) for b, a in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(torch.tensor(padded), labels=torch.tensor(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.02
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model):
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(model), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    started = time.monotonic()
    while not server.server.started:  # Serve returns before it listens
        assert time.monotonic() - started < 60, "transformers serve does not start"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill_server()


def test_a_real_model_behind_a_real_server_and_training_on_what_it_wrote(tmp_path, model, url, capsys):
    (tmp_path / "prompts").mkdir()
    for name, text in PROMPTS.items():
        (tmp_path / "prompts" / f"{name}.yaml").write_text(json.dumps({"user": text, "max_tokens": 60}))
    passages, out = tmp_path / "passages.jsonl", tmp_path / "scp.jsonl"
    passages.write_text("".join(json.dumps({"text": text}) + "\n" for text in (WELL, MILL)))
    command = ["synthesize", passages, "--endpoint", url, "--model", model, "--out", out, "--concurrency", 2]
    command = [str(part) for part in [*command, "--prompts", tmp_path / "prompts", "--rounds", 2, "--json"]]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accepted"] == {"paraphrase": 1, "simple": 1}
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["docs"], row["question"], row["answers"]) for row in found] == [
        ([WELL], ["Who dug?"], ["Ann"]),
        ([WELL], [], ["In May Ann dug it."]),
    ]
    rejected = [json.loads(line) for line in (tmp_path / "scp.rejected.jsonl").read_text().splitlines()]
    assert Counter((row["step"], row["reason"]) for row in rejected) == {
        ("complex", "judge: not so"): 1,
        ("simple", "no usable answer in 3 attempts: no JSON in it"): 1,
        ("complex", "no usable answer in 3 attempts: no JSON in it"): 1,
        ("paraphrase", "judge: not so"): 2,
    }
    journal = [json.loads(line) for line in (tmp_path / "scp.journal.jsonl").read_text().splitlines()]
    counts = Counter(record["kind"] for record in journal)
    assert counts == {"settings": 1, "answer": report["requests"], "done": 2}
    assert report["completion_tokens"] == sum(
        r["answer"]["completion_tokens"] for r in journal if r["kind"] == "answer"
    )
    assert report["completion_tokens"] > report["requests"]
    assert (tmp_path / "scp.report.png").stat().st_size > 1000

    assert main(command) == 0  # once more: the journal answers
    assert json.loads(capsys.readouterr().out)["this_run"]["requests"] == 0

    clara = Clara.from_base(model, doc_max_length=32, compression_rate=16, lora={"r": 2, "alpha": 4}, device="cpu")
    arguments = ScpTrainingArguments(output_dir=str(tmp_path / "trained"), max_steps=1, report_to=[], use_cpu=True)
    losses = ScpTrainer(clara, arguments, read_scp(out)).train()
    assert losses.global_step == 1
    assert 0 < losses.training_loss < 100


def test_a_model_that_the_server_does_not_have(tmp_path, model, url, capsys):
    passages = tmp_path / "passages.jsonl"
    passages.write_text(json.dumps({"text": WELL}))
    out = tmp_path / "new" / "scp.jsonl"
    assert main(["synthesize", str(passages), "--endpoint", url, "--model", "other", "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "refuses model 'other'" in said
    assert f"Its models: {model}" in said
    assert list(out.parent.iterdir()) == []

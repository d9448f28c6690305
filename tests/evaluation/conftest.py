from __future__ import annotations

import json

import pytest
import torch

from clara_fast import Clara
from clara_fast.modeling import roles
from tests.modeling.tiny import DOCUMENTS, make_base

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny joint model whose three adapters do something."""
    base = make_base(tmp_path_factory.mktemp("evaluation") / "base")
    clara = Clara.from_base(base, doc_max_length=64, lora=LORA, top_k=2, device="cpu")
    clara.add_role("query_reasoner")
    generator = torch.Generator().manual_seed(1)
    for role in sorted(clara.roles):
        for parameter in roles.role_parameters(clara.lm, role).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return clara


@pytest.fixture
def write(tmp_path):
    """Writes rows to a JSONL file."""

    def call(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return call


@pytest.fixture
def scp(write):
    """Four passages, one question each."""
    return write(
        "scp.jsonl",
        [
            {
                "data_type": "qa",
                "docs": [text[:90]],
                "question": ["What is this about?"],
                "answers": [text[:12]],
                "id": i,
            }
            for i, text in enumerate(DOCUMENTS[:4])
        ],
    )


@pytest.fixture
def multidoc(write):
    """Five questions with four candidates each, none shared; the second is the positive one."""
    rows = []
    for i in range(5):
        docs = [f"Passage {i}{j}. {DOCUMENTS[(4 * i + j) % len(DOCUMENTS)]}" for j in range(4)]
        rows.append({"question": f"What is said in {i}?", "docs": docs, "answers": ["tea", "a tea"], "pos_index": [1]})
    return write("asked.jsonl", rows)

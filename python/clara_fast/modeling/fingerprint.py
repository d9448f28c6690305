"""What tells whether two models write interchangeable memories."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from clara_fast.modeling import roles
from clara_fast.modeling.sharding import whole

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara


def fingerprint(model: Clara) -> str:
    """16 hexadecimal digits of everything that determines a memory; see :attr:`Clara.fingerprint`.

    Weights count in bfloat16, so that the dtype a model was loaded in does not. Of the base model a few embeddings
    stand for all of it.
    """
    c = model.config
    facts: list[Any] = [
        c.doc_max_length,
        c.compression_rate,
        c.memory_positions,
        c.distinct_memory_tokens,
        c.hidden_size,
    ]
    if c.quantization_config:
        names = ("load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type")
        facts += [c.quantization_config.get(name) for name in names]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    table = whole(model.lm.get_input_embeddings().weight)
    parts = [table[:64], table[model.text.added_ids], model.memory_embeddings]
    parts += [parameter for _, parameter in sorted(roles.role_parameters(model.lm, "compressor").items())]
    parts += list(model.connector.parameters()) if model.connector is not None else []
    for part in parts:
        digest.update(whole(part.detach()).to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

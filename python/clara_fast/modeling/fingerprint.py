"""What tells whether two models write interchangeable memories."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clara_fast.modeling import roles
from clara_fast.modeling.sharding import whole

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara

_SAMPLES = 64  # numbers of each of the base model's weights


def fingerprint(model: Clara) -> str:
    """16 hexadecimal digits of everything that determines a memory; see :attr:`Clara.fingerprint`.

    Weights count in bfloat16, so that the dtype a model was loaded in does not. Of the base model a few embeddings and
    a few numbers of every other weight stand for all of it.
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
    parts.append(torch.cat([_sample(parameter) for parameter in _base_parameters(model.lm)]))
    for part in parts:
        digest.update(whole(part.detach()).to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _base_parameters(lm: nn.Module) -> list[nn.Parameter]:
    """What the base model's layers compute with, in an order of names; numbers of bitsandbytes are left out."""
    model: Any = lm
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(end.weight) for end in ends if end is not None}
    found = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in lm.named_parameters()
        if ".lora_" not in name and parameter.is_floating_point() and id(parameter) not in tables
    }
    return [found[name] for name in sorted(found)]


def _sample(parameter: nn.Parameter) -> Tensor:
    flat = whole(parameter.detach()).flatten()
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to(torch.bfloat16).cpu()

"""The reference implementation's checkpoint format, read and written as it is; and PISCO's, which it came from.

A folder with ``config.json``, ``adapters.pth`` (``{adapter: {tensor name: tensor}}``) and
``decoder_first_last_layers.pth`` (embedding table and LM head, added rows included). ``training_stage`` is never
followed: every adapter that is present is loaded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clara_fast.modeling.config import CONFIG_FILE, ClaraConfig, LoraSettings
from clara_fast.modeling.roles import Role
from clara_fast.modeling.sharding import whole

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara

MODEL_TYPE = "CLaRa"
# PISCO's checkpoints (naver/pisco-*) have the same files, prompt and token order, and no query reasoner.
PISCO_TYPE = "COCOM"
ADAPTERS_FILE = "adapters.pth"
TABLES_FILE = "decoder_first_last_layers.pth"
ROLE_OF_ADAPTER: dict[str, Role] = {
    "encoder_adapter": "compressor",
    "query_reasoner_adapter": "query_reasoner",
    "decoder_adapter": "generator",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Some published configurations name their base by a path on the machine they were trained on.
INTERNAL_PATH, PUBLIC_BASE = "/mnt/", "mistralai/Mistral-7B-Instruct-v0.2"


def load(
    cls: type[Clara],
    folder: Path,
    content: dict[str, Any],
    base_model: str | Path | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
) -> Clara:
    """Build a model from a checkpoint folder whose ``config.json`` holds ``content``."""
    from clara_fast.modeling.checkpoint import load_adapter, load_base

    config = read_settings(content, folder, base_model)
    adapters = _read(folder / ADAPTERS_FILE)
    tables = _read(folder / TABLES_FILE)
    unknown = sorted(set(adapters) - set(ROLE_OF_ADAPTER))
    if unknown:
        raise ValueError(f"{folder / ADAPTERS_FILE} holds an unknown adapter: {unknown[0]}")
    if not adapters:
        raise ValueError(f"{folder / ADAPTERS_FILE} holds no adapter")
    lm, tokenizer = load_base(config, dtype, device)
    model = cls(config, lm, tokenizer)
    _load_tables(model, tables, folder / TABLES_FILE)
    for adapter, tensors in adapters.items():
        role = ROLE_OF_ADAPTER[adapter]
        model.add_role(role)
        # Some adapters carry the tables along, because the library that wrote them saw a resized embedding.
        lora = {name: tensor for name, tensor in tensors.items() if name not in (EMBEDDING, HEAD)}
        load_adapter(model, role, lora, source=str(folder / ADAPTERS_FILE))
    return model


def read_settings(content: dict[str, Any], folder: Path, base_model: str | Path | None) -> ClaraConfig:
    """Our configuration for theirs. What the file leaves out has the reference's own default, which is PISCO's.

    Raises ``ValueError`` for relatives of PISCO that do not compress with the base model and an adapter of its own.
    """
    if content.get("model_type") == PISCO_TYPE:
        for name, needed in (("compr_model_name", None), ("lora", True), ("training_form", "both_separately")):
            if content.get(name) != needed:
                raise ValueError(
                    f"{name} ({content.get(name)!r}) in {folder / CONFIG_FILE} must be {needed!r}: of this format only "
                    "PISCO's checkpoints can be read, whose compressor is an adapter on the generator's base"
                )
    base = str(base_model or content.get("decoder_model_name") or "")
    if not base:
        raise ValueError(f"{folder / CONFIG_FILE} names no decoder_model_name; give base_model")
    if base.startswith(INTERNAL_PATH) and not Path(base).exists():
        base = PUBLIC_BASE
    r = content.get("lora_r", 16)
    return ClaraConfig(
        base_model=base,
        doc_max_length=content.get("doc_max_length", 128),
        compression_rate=content.get("compr_rate", 64),
        lora=LoraSettings(r=r, alpha=2 * r, dropout=0.1),
        distinct_memory_tokens=content.get("different_mem_tokens", False),
        separator=content.get("sep", False),
        top_k=content.get("generation_top_k", 1),
    )


def content(model: Clara, adapter_dtype: torch.dtype) -> Callable[[Path], None]:
    """Collects a model; what is returned writes the reference's three files.

    Raises ``ValueError`` for options that the format has no place for.
    """
    from clara_fast.modeling.checkpoint import adapter_state

    c = model.config
    if c.connector or c.memory_positions != "after":
        raise ValueError("ml-clara's format knows no connector and no spread memory positions")
    if c.lora.alpha != 2 * c.lora.r:
        raise ValueError(f"ml-clara's format takes lora.alpha ({c.lora.alpha}) to be twice lora.r ({c.lora.r})")
    stage = "stage2" if "query_reasoner" in model.roles else "stage1"
    settings = {
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
        "decoder_model_name": c.base_model,
        "doc_max_length": c.doc_max_length,
        "compr_rate": c.compression_rate,
        "compr_model_name": None,
        "compr_base_model_name": c.base_model,
        "lora": True,
        "lora_compressor": False,
        "lora_r": c.lora.r,
        "lora_r_compressor": c.lora.r,
        "load_adapters": True,
        "sep": c.separator,
        "different_mem_tokens": c.distinct_memory_tokens,
        "optimize_mem_tokens": True,
        "generation_top_k": c.top_k,
        "training_form": "both_separately",
        "training_stage": stage,
        "quantization": "no",
        "attn_implementation": None,
        "device_map": None,
        "kbtc_training": False,
        "max_new_tokens": 128,
        "pure_inference": False,
        "stage2_retrieval_top_n": 1,
    }
    adapters = {
        adapter: adapter_state(model, role, adapter_dtype)
        for adapter, role in ROLE_OF_ADAPTER.items()
        if role in model.roles
    }
    embedding = whole(model.lm.get_input_embeddings().weight.detach()).clone()
    ids = model.text.memory_ids[: model.memory_embeddings.shape[0]]
    embedding[ids] = whole(model.memory_embeddings.detach()).to(embedding)
    head = whole(model.lm.get_output_embeddings().weight.detach())
    tables = {name: t.to("cpu", torch.bfloat16) for name, t in ((EMBEDDING, embedding), (HEAD, head))}

    def write(folder: Path) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        torch.save(adapters, folder / ADAPTERS_FILE)
        torch.save(tables, folder / TABLES_FILE)

    return write


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing from the checkpoint")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends too early"
        raise ValueError(f"{file} is damaged or no checkpoint file: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a dictionary, not {type(content).__name__}")
    return content


def _load_tables(model: Clara, tables: dict[str, Tensor], file: Path) -> None:
    layers = {EMBEDDING: model.lm.get_input_embeddings(), HEAD: model.lm.get_output_embeddings()}
    for name, layer in layers.items():
        if name not in tables:
            raise ValueError(f"{file} lacks the tensor {name}")
        if tables[name].shape != layer.weight.shape:
            raise ValueError(
                f"{name} in {file} has shape {tuple(tables[name].shape)}, the base model with its added tokens "
                f"{tuple(layer.weight.shape)}: another base or other memory tokens?"
            )
        base = layer.weight.data[: model.text.added_ids[0]]
        if not torch.equal(tables[name][: len(base)].to(base), base):
            model.own_tables = True
        layer.weight.data.copy_(tables[name])
    ids = model.text.memory_ids[: model.memory_embeddings.shape[0]]
    model.memory_embeddings.data.copy_(tables[EMBEDDING][ids])

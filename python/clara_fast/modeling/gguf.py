"""GGUF files (llama.cpp's format) made into ordinary checkpoints that every loader here can read."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

_MAGIC = b"GGUF"


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> Path:
    """Dequantise a GGUF language model into a folder of safetensors (float32), configuration and tokenizer.

    The folder appears whole by a rename; if it is there already, nothing is done.

    Args:
        gguf_path: the file, of an architecture that transformers knows.
        out_dir: the folder to make.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package ``gguf`` is missing.
        ValueError: the file is no GGUF, damaged, or lacks a chat template or an end-of-sequence token.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if (out_dir / "config.json").is_file():
        return out_dir
    if not gguf_path.is_file():
        raise FileNotFoundError(f"gguf_path ({gguf_path}) does not exist")
    with open(gguf_path, "rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"gguf_path ({gguf_path}) is not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'clara-fast[gguf]'")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        model, tokenizer = _read(gguf_path)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            os.rename(temporary, out_dir)
        except OSError:
            if not (out_dir / "config.json").is_file():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _read(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        _name_special_tokens(tokenizer, path)
    except Exception as error:  # the parser of a damaged file fails in whatever it happens to touch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a language model: {reason}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"{path} holds no chat template: it is not an instruction-tuned model")
    if tokenizer.eos_token is None:
        raise ValueError(f"{path} names no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The weights are plain numbers by now; what still calls them quantised would stop save_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def _name_special_tokens(tokenizer: Any, path: Path) -> None:
    """Take first and last token from the file: transformers 5.17 takes the one for the other."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name in ("bos", "eos"):
        field = fields.get(f"tokenizer.ggml.{name}_token_id")
        if field is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0]))
            setattr(tokenizer, f"{name}_token", token)

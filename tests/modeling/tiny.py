"""Tiny bases of several architectures with a real tokenizer, made on the spot."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DOCUMENTS = [
    json.loads(line)["text"]
    for line in (files("clara_fast") / "assets/demo/passages.jsonl").read_text().splitlines()[:12]
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": False},
    ),
    # More rows than tokens, as Qwen's tables have; no BOS token.
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True, "spare_rows": 64}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}),
    "phi": (PhiConfig, PhiForCausalLM, {"tie_word_embeddings": False}),
}


def make_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        DOCUMENTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"bos_token": "<|im_start|>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE, **names
    )


def make_base(folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random base model with its tokenizer to ``folder``."""
    config_class, model_class, options = ARCHITECTURES[architecture]
    options = dict(options)
    tokenizer = make_tokenizer(bos=not architecture.startswith("qwen"))
    size = len(tokenizer) + options.pop("spare_rows", 0)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = model_class(config_class(vocab_size=size, initializer_range=0.2, **SHAPE, **ids, **options))
    if not model.config.tie_word_embeddings:
        # A random head this narrow could not make any token likely.
        model.lm_head.weight.data.mul_(4)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""What the model benchmarks work on: a base model, documents of many lengths, questions."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clara_fast import Clara
from clara_fast.data.scp import ScpSample
from clara_fast.modeling import roles

SMOLLM2_LAYERS, SMOLLM2_VOCABULARY = 30, 49152
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def demo(name: str) -> list[dict[str, Any]]:
    """Rows of one file of the demo corpus."""
    text = (files("clara_fast") / "assets" / "demo" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the demo corpus, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in demo("passages.jsonl")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], chat_template=CHAT_TEMPLATE
    )


def write_random_base(folder: Path, layers: int, *, tiny: bool) -> str:
    """A random Llama with a tokenizer of its own; returns what it is.

    It has SmolLM2-135M's widths, and its vocabulary shrinks with its layers, so that logits weigh as much as there.
    """
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        layers, vocabulary = 2, 1200
    else:
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        vocabulary = max(SMOLLM2_VOCABULARY * layers // SMOLLM2_LAYERS, 4500)
    tokenizer = make_tokenizer(min(4096, vocabulary - 64))
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
        **shape,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    width = "tiny" if tiny else "of SmolLM2-135M's width"
    return (
        f"a random Llama {width}: {layers} layers, vocabulary {vocabulary}, byte-level BPE trained on the demo corpus"
    )


def load_model(
    base: Path, *, doc_max_length: int, dtype: torch.dtype, device: torch.device, compression_rate: int = 16
) -> Clara:
    """A model on ``base`` with all three roles, whose adapters do something; without dropout, so it can be checked."""
    model = Clara.from_base(
        base,
        doc_max_length=doc_max_length,
        compression_rate=compression_rate,
        lora={"dropout": 0.0},
        dtype=dtype,
        device=device,
    )
    model.add_role("query_reasoner", copy_of="compressor")
    generator = torch.Generator().manual_seed(1)
    for role in ("compressor", "query_reasoner", "generator"):
        for name, parameter in roles.role_parameters(model.lm, role).items():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator).to(device) * 0.01)
    tokens = model.memory_embeddings
    tokens.data.add_(torch.randn(tokens.shape, generator=generator).to(device) * tokens.std())
    return model


def documents(count: int) -> list[str]:
    """Demo passages, alone and joined by twos and threes: lengths as they vary in a corpus."""
    passages = [row["text"] for row in demo("passages.jsonl")]
    return [" ".join(passages[(3 * i + j) % len(passages)] for j in range(1 + i % 3)) for i in range(count)]


def full_documents(count: int) -> list[str]:
    """Documents that fill every token the compressor reads."""
    passages = [row["text"] for row in demo("passages.jsonl")]
    return [" ".join(passages[(5 * i + j) % len(passages)] for j in range(5)) for i in range(count)]


def samples(passages: int, questions: int) -> list[ScpSample]:
    """Passages with several questions each."""
    asked = demo("questions.jsonl")
    found = []
    for i, row in enumerate(demo("passages.jsonl")[:passages]):
        own = [q for q in asked if q["gold_ids"][0] == row["id"]]
        others = [q for q in asked if q not in own]
        chosen = (own + others[i * questions :])[:questions]
        found.append(
            ScpSample(row["id"], row["text"], [q["answers"][0] for q in chosen], [q["question"] for q in chosen])
        )
    return found

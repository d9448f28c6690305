"""A task on which only the answer's loss can teach retrieval, and a base model that learns to read in seconds.

A document says which value a thing has; its memory is made by hand: the thing's key, then the embedding of the value.
A question names a thing; of its candidates, about other things and with other values, one holds the answer.
"""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clara_fast import Clara, MemoryStore
from clara_fast.data import QuestionSample
from tests.modeling.tiny import make_tokenizer

THINGS = ["door", "boat", "lamp", "coat", "tree", "bell"]
VALUES = list("abcdefghij")
SIZE, KEY_SIZE = 64, 16
# No more than what is needed: the shorter the prompt, the more of what is attended to is memory.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def make_reader(folder):
    """A model of one layer that attends to everything alike and says the value it saw: it can read from the start.

    Keys lie in dimensions of their own, which attention does not carry on.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    lm = LlamaForCausalLM(config)
    read = (torch.arange(SIZE) < SIZE - KEY_SIZE).float()
    table = torch.nn.functional.normalize(torch.randn(len(tokenizer), SIZE) * read, dim=1)
    said = torch.zeros(len(tokenizer), 1)
    said[[token_of(tokenizer, value) for value in VALUES]] = 3
    attention, mlp = lm.model.layers[0].self_attn, lm.model.layers[0].mlp
    with torch.no_grad():
        lm.model.embed_tokens.weight.copy_(table)
        lm.lm_head.weight.copy_(said * table)
        for layer in (attention.q_proj, attention.k_proj, mlp.down_proj):
            layer.weight.zero_()
        attention.v_proj.weight.copy_(torch.diag(read))
        attention.o_proj.weight.copy_(3 * torch.eye(SIZE))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lora = {"r": 8, "alpha": 16, "dropout": 0.0}
    model = Clara.from_base(folder, doc_max_length=32, compression_rate=16, lora=lora, device="cpu", top_k=1)
    model.prompts.strings["answer"] = {"system": "", "user": "{memory}{question}"}
    return model


def token_of(tokenizer, value):
    return tokenizer(value, add_special_tokens=False)["input_ids"][0]


def text_of(thing, value):
    return f"The {thing} is {value}."


def make_memories(folder, model):
    """A store of every thing with every value."""
    keys = torch.zeros(len(THINGS), SIZE)
    keys[:, -KEY_SIZE:] = 3 * torch.nn.functional.normalize(torch.randn(len(THINGS), KEY_SIZE), dim=1)
    table = model.lm.get_input_embeddings().weight.detach()
    pairs = [(thing, value) for thing in THINGS for value in VALUES]
    values = {value: table[token_of(model.tokenizer, value)] for value in VALUES}
    memory = torch.stack([torch.stack([keys[THINGS.index(t)], values[v]]) for t, v in pairs])
    with MemoryStore.create(folder, model, dtype="float32") as store:
        store.add([f"{t}-{v}" for t, v in pairs], [text_of(t, v) for t, v in pairs], memory)
    return store


def make_questions(count, num_candidates, seed):
    """Questions whose candidates differ in thing and in value; one is about the thing that is asked for."""
    draw = random.Random(seed)
    samples = []
    for i in range(count):
        things, values = draw.sample(THINGS, num_candidates), draw.sample(VALUES, num_candidates)
        gold = draw.randrange(num_candidates)
        documents = [text_of(t, v) for t, v in zip(things, values, strict=True)]
        samples.append(QuestionSample(f"q{i}", things[gold], documents, [values[gold]], positives=[gold]))
    return samples

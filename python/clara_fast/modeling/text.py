"""Added tokens and tokenisation of documents, questions and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import AddedToken, PreTrainedTokenizerBase

from clara_fast.modeling.config import ClaraConfig
from clara_fast.modeling.prompts import Prompts, Turn

AUTO_ENCODE, ENCODE, SEPARATOR = "<AE>", "<ENC>", "<SEP>"


class TextEncoder:
    """Turns text into the token sequences of the compressor and the generator.

    A document reads ``<ENC>`` BOS text EOS and then its memory tokens; everything before those is cut to
    ``doc_max_length + 3`` tokens (the format of the published checkpoints).
    """

    def __init__(self, config: ClaraConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        m = config.num_memory
        names = [f"<MEM{i}>" for i in range(m)] if config.distinct_memory_tokens else ["<MEM>"]
        self.added_tokens = [*names, AUTO_ENCODE, ENCODE, SEPARATOR]
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in self.added_tokens])
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
        self.tokenizer = tokenizer
        self.max_length = config.doc_max_length + 3
        vocabulary = tokenizer.get_vocab()
        self.added_ids = [vocabulary[token] for token in self.added_tokens]
        slots = names if config.distinct_memory_tokens else names * m
        self.memory_ids = [vocabulary[token] for token in slots]
        self.memory_block = "".join(slots) + (SEPARATOR if config.separator else "")

    def documents(self, texts: Sequence[str], *, max_length: int | None = None) -> tuple[list[list[int]], int]:
        """Token ids of documents or questions without their memory tokens, and how many texts were cut.

        Raises:
            ValueError: a text is empty or only white space, or no text at all; its index is named.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"documents[{i}] must be a string, not {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"documents[{i}] must hold text, but is empty: {text!r}")
        if not texts:
            return [], 0
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        ids = self._encode([f"{ENCODE}{bos}{self.defuse(text)}{eos}" for text in texts])
        limit = max_length or self.max_length
        return [row[:limit] for row in ids], sum(len(row) > limit for row in ids)

    def readable(self, text: str) -> str:
        """The beginning of a text that the compressor reads: its first ``doc_max_length`` tokens, as text again."""
        ids = self._encode([self.defuse(text)])[0]
        limit = self.max_length - self.num_around
        return text if len(ids) <= limit else str(self.tokenizer.decode(ids[:limit]))

    @property
    def num_around(self) -> int:
        """Tokens that every document has around its own."""
        return 1 + bool(self.tokenizer.bos_token) + bool(self.tokenizer.eos_token)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The range of characters of each token of ``text``; needs one of transformers' fast tokenizers."""
        for token in self._special_strings:
            # As :meth:`defuse`, but of the same length, so that the ranges are those of ``text``.
            text = text.replace(token, f"{token[0]}{' ' * (len(token) - 1)}" if len(token) > 1 else " ")
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not say where its tokens stand: use a fast tokenizer"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(start, end) for start, end in encoded["offset_mapping"]]

    def prompt(self, prompts: Prompts, turn: Turn) -> list[int]:
        """Token ids of a prompt that the generator goes on from."""
        return self._encode([prompts.render(turn)])[0]

    def exchange(self, prompts: Prompts, turn: Turn, reply: str) -> tuple[list[int], int]:
        """Token ids of prompt and reply together, and how many of them are the prompt."""
        whole, prompt = self._encode([prompts.render(turn, self.defuse(reply)), prompts.render(turn)])
        return whole, len(prompt)

    def defuse(self, text: str) -> str:
        """Break up special-token strings inside a user's text, so that ``</s>`` or ``<MEM0>`` there is only text."""
        for token in self._special_strings:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
        return text

    @cached_property
    def _special_strings(self) -> list[str]:
        return sorted(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

"""One model's work on the same documents, read as memories or as text: what end_to_end.py times, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast import Clara, ops
from clara_fast.benchmarks import inputs
from clara_fast.benchmarks.harness import OURS, Disagreement, require_close
from clara_fast.modeling import answering, roles
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.modeling.packing import PromptGroup, pack_prompts

TEXT = "full text"


@dataclass(frozen=True)
class Size:
    """How much work is done."""

    documents: int = 12
    stored: int = 2000
    passages: int = 2
    questions: int = 4
    candidates: int = 20
    top_k: int = 5
    new_tokens: int = 32
    doc_max_length: int = 256


QUICK = Size(documents=3, stored=20, passages=2, questions=2, candidates=4, top_k=2, new_tokens=4, doc_max_length=64)


class Scene:
    """The work at one rate, with memories (:data:`OURS`) or with text."""

    def __init__(self, model: Clara, size: Size) -> None:
        self.model, self.size = model, size
        self.documents = inputs.documents(size.documents)
        self.samples = inputs.samples(size.passages, size.questions)
        self.question, self.reply = self.samples[0].questions[0], self.samples[0].answers[0]
        self.candidates = [model.text.readable(text) for text in inputs.documents(size.candidates)]
        self.memory = model.compress(self.candidates)
        self.nothing = self.memory[:0].flatten(0, 1)
        self.keys = self._stored()

    def _stored(self) -> Tensor:
        """Keys of as many documents as a store holds: the candidates', each time a little different."""
        draw = torch.Generator().manual_seed(2)
        flat = self.memory.flatten(1).float().cpu()
        rows = flat[torch.arange(self.size.stored) % len(flat)]
        noise = torch.randn(rows.shape, generator=draw) * flat.std() * 0.3
        return (rows + noise).to(self.model.device, torch.bfloat16)

    # What is timed

    def compress(self) -> Tensor:
        return self.model.compress(self.documents)

    def search(self) -> tuple[Tensor, Tensor]:
        query = self.model.encode_queries(self.question)
        return ops.cosine_topk(query.flatten(1).to(self.keys.dtype), self.keys, self.size.top_k)

    def answer(self, side: str) -> Tensor:
        """Token ids ``[1, new tokens]``."""
        prompt, memory, role = self.prompt(side)
        count = self.size.new_tokens
        return answering.generate_ids(
            self.model, [prompt], [memory], role=role, max_new_tokens=count, min_new_tokens=count
        )

    def scp_step(self, side: str) -> Tensor:
        """Passages with their questions: compressor and generator on memories, or the generator on text."""
        parts = ("compressor", "generator", "memory_tokens") if side == OURS else ("generator",)
        groups = [self._group(side, s.pairs, [s.document]) for s in self.samples]
        prompts = pack_groups(self.model, groups).to(self.model.device)
        self._train(*parts)
        if side == OURS:
            packed = self.model.pack([s.document for s in self.samples]).to(self.model.device)
            memory, mse = self.model.encode(packed, "compressor")
            loss = self.model.answer_loss(prompts, memory.flatten(0, 1))
            (loss + 0.1 * mse.mean()).backward()
        else:
            loss = self.model.answer_loss(prompts, self.nothing)
            loss.backward()
        return loss.detach()

    def joint_step(self, side: str) -> Tensor:
        """One question: retriever and generator on memories from a store, or the generator on the documents' text."""
        group = self._group(side, [(self.question, self.reply)], self.candidates[: self.size.top_k])
        prompts = pack_groups(self.model, [group]).to(self.model.device)
        if side == OURS:
            self._train("query_reasoner", "generator")
            query, _ = self.model.encode(self.model.pack([self.question]).to(self.model.device), "query_reasoner")
            options = self.memory[None]
            chosen, _, _ = ops.select_memory(query.flatten(1), options.flatten(2), options, self.size.top_k)
            loss = self.model.answer_loss(prompts, chosen.flatten(0, 2))
        else:
            self._train("generator")
            loss = self.model.answer_loss(prompts, self.nothing)
        loss.backward()
        return loss.detach()

    # What it is checked against

    def check_compress(self, limit: float) -> float:
        alone = torch.cat([self.model.compress([document]) for document in self.documents])
        return require_close("memories packed and one by one", self.compress(), alone, limit)

    def check_search(self, limit: float) -> float:
        scores, rows = self.search()
        query = self.model.encode_queries(self.question).flatten(1).to(self.keys.dtype)
        exact = F.cosine_similarity(query.double(), self.keys.double())
        require_close("scores of the rows found", scores[0], exact[rows[0]], limit)
        return require_close("scores", scores[0], exact.topk(self.size.top_k).values, limit)

    def check_answer(self, side: str, slack: float) -> float:
        """Every token that was generated is the likeliest one after all before it, seen at once."""
        prompt, memory, role = self.prompt(side)
        reply = self.answer(side)[0].tolist()
        slots = frozenset(self.model.text.memory_ids)
        packed = pack_prompts([PromptGroup(prompt[:-1], [(prompt[-1:], reply)])], slots).to(self.model.device)
        with self.model.inference():
            logits, labels = self.model.answer_logits(packed, memory.flatten(0, 1), role=role)
        # Ending was ruled out, so that every answer is as long.
        logits[:, self.model.lm.generation_config.eos_token_id] = -torch.inf
        behind = logits.float().max(1).values - logits.float().gather(1, labels[:, None])[:, 0]
        worst = float(behind.max())
        if not worst <= slack:
            raise Disagreement(f"answer from {side}: a token is {worst:.2g} behind the likeliest one")
        return worst

    def check_step(self, method: str, side: str, limit: float) -> float:
        """The loss of the packed step is the mean over questions that are asked one by one, of fresh memories."""
        model, total, tokens = self.model, 0.0, 0
        loss = getattr(self, method)(side)
        with model.inference():
            for documents, pairs in self._asked(method, side):
                memory = model.compress(documents).flatten(0, 1) if side == OURS else self.nothing
                for pair in pairs:
                    prompts = pack_groups(model, [self._group(side, [pair], documents)]).to(model.device)
                    count = int((prompts.labels != -100).sum())
                    total += float(model.answer_loss(prompts, memory)) * count
                    tokens += count
        return require_close(f"loss of {method} on {side}", loss.cpu(), torch.tensor(total / tokens), limit)

    def _asked(self, method: str, side: str) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """Documents with what is asked of them."""
        if method == "scp_step":
            return [([s.document], s.pairs) for s in self.samples]
        rows = list(range(self.size.top_k))
        if side == OURS:
            query = self.model.encode_queries(self.question)
            rows = answering.nearest(self.model, query, self.memory, self.size.top_k)[0].tolist()
        return [([self.candidates[i] for i in rows], [(self.question, self.reply)])]

    # Prompts

    def prompt(self, side: str) -> tuple[list[int], Tensor, str]:
        """Token ids, what fills their slots, and who answers."""
        text, prompts = self.model.text, self.model.prompts
        question = text.defuse(self.question)
        if side == OURS:
            turn = prompts.answer(question, self.size.top_k)
            return text.prompt(prompts, turn), self.memory[: self.size.top_k], "generator"
        turn = prompts.answer_from_text(question, [text.defuse(d) for d in self.candidates[: self.size.top_k]])
        return text.prompt(prompts, turn), self.memory[:0], roles.NO_ROLE

    def _group(self, side: str, pairs: Sequence[tuple[str, str]], documents: list[str]) -> Any:
        given = {"num_documents": len(documents)} if side == OURS else {"documents": documents}
        return question_branches(self.model, pairs, **given)

    def _train(self, *parts: str) -> None:
        self.model.train_only(*parts)
        self.model.zero_grad()

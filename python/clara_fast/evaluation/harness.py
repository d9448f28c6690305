"""Runs methods on questions: documents chosen, prompts filled, answers written, their loss taken, all of it kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from clara_fast.evaluation.encoding import Bill, Encoder, now
from clara_fast.evaluation.journal import Journal, Key, Prediction
from clara_fast.evaluation.methods import METHODS, Method, Reading, Tools, make_method
from clara_fast.evaluation.protocol import EvalProtocol, EvalSample, EvalSet, another
from clara_fast.modeling import answering
from clara_fast.modeling.branches import pack_groups
from clara_fast.modeling.packing import batches_by_tokens, group_prompts
from clara_fast.modeling.roles import NO_ROLE, role_parameters

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

# Longest answers, as the paper has them: of joint models, and of those before joint training.
JOINT_TOKENS, COMPRESSOR_TOKENS = 64, 128
# Tokens that go through the model at once where only the loss is wanted.
LOSS_TOKENS = 8192


class Outcome(NamedTuple):
    """A batch's answers, the loss and tokens of the accepted ones, and the seconds that answering took."""

    texts: list[str]
    losses: list[tuple[float, int]]
    seconds: float


def longest_answer(model: Clara) -> int:
    """New tokens in an answer, at most, if nobody says."""
    return JOINT_TOKENS if "query_reasoner" in model.roles else COMPRESSOR_TOKENS


def identity(model: Clara) -> str:
    """16 hexadecimal digits that are equal for models that answer alike: fingerprint, and every role's adapter."""
    digest = hashlib.sha256(model.fingerprint.encode())
    for role in sorted(model.roles):
        for name, parameter in sorted(role_parameters(model.lm, role).items()):
            digest.update(f"{role}/{name}".encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def facts(model: Clara) -> dict[str, Any]:
    """What a report says of a model."""
    config = model.config
    return {
        "identity": identity(model),
        "base": config.base_model,
        "compression_rate": config.compression_rate,
        "memory_tokens": config.num_memory,
        "top_k": config.top_k,
        "roles": sorted(model.roles),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def run(
    label: str,
    model: Clara,
    questions: EvalSet,
    protocol: EvalProtocol,
    methods: Sequence[str],
    journal: Journal,
    *,
    tools: Mapping[str, Any] | None = None,
    of_base: dict[Hashable, Outcome] | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Every method's answer to every question; what the journal holds already is not done again.

    A batch is done again as a whole, so that an interrupted run makes the predictions of an unbroken one.

    Args:
        label: what the model is called in the journal.
        model: put into inference mode.
        questions: what is asked. Where each has one passage, that is read, and methods that choose are left out.
        protocol: which of the documents are read.
        methods: names; see :data:`clara_fast.evaluation.methods.METHODS`.
        journal: where predictions go.
        tools: optional fields of :class:`clara_fast.evaluation.methods.Tools`.
        of_base: what base models said, for models on the same base that get the same prompts; it is added to.
        batch_size: questions at once.
        max_new_tokens: longest answer; default :func:`longest_answer`.
        progress: called with the number of answers after each batch of each method.
    """
    length = max_new_tokens or longest_answer(model)
    samples = questions.samples
    if questions.single:
        protocol = replace(protocol, selection="gold")
        methods = [name for name in methods if not METHODS[name].chooses]
    kit = Tools(model, samples, Encoder(model), **(tools or {}))
    made: dict[str, Method] = {}
    with model.inference():
        for start in range(0, len(samples), batch_size):
            rows = range(start, min(start + batch_size, len(samples)))
            for name in methods:
                if any(Key(label, questions.name, name, samples[i].id) not in journal for i in rows):
                    if name not in made:  # loading what a method needs may take a while
                        made[name] = make_method(name, kit)
                    batch = [(samples[i], another(samples, i) if name == "other" else None) for i in rows]
                    work = _Work(label, questions.name, model, protocol, length, of_base if of_base is not None else {})
                    journal.append(work.predictions(made[name], batch))
                if progress is not None:
                    progress(len(rows))
            kit.encoder.forget()
    return journal.predictions(Key(label, questions.name, name, sample.id) for name in methods for sample in samples)


@dataclass
class _Work:
    """One model's work on one data set."""

    label: str
    dataset: str
    model: Clara
    protocol: EvalProtocol
    max_new_tokens: int
    of_base: dict[Hashable, Outcome]

    def predictions(self, method: Method, batch: Sequence[tuple[EvalSample, EvalSample | None]]) -> list[Prediction]:
        """The method's answers to a batch of questions, each with the one that stands in for it."""
        bill, model = Bill(), self.model
        readings = method.read(batch, self.protocol, self.protocol.top_k or model.config.top_k, bill)
        samples = [sample for sample, _ in batch]
        prompts = [model.text.prompt(model.prompts, reading.turn) for reading in readings]
        texts, losses, seconds = self._outcome(readings, prompts, [sample.answers[0] for sample in samples])
        bill.add("generate", seconds)
        return [
            Prediction(
                model=self.label,
                dataset=self.dataset,
                method=method.name,
                id=sample.id,
                text=text,
                answers=sample.answers,
                read=reading.read,
                ranking=reading.ranking,
                positives=sample.positives,
                absent=sample.absent,
                loss=loss,
                loss_tokens=tokens,
                **_context_tokens(model, sample, reading, len(prompt)),
                seconds={part: value / len(batch) for part, value in bill.seconds.items()},
            )
            for sample, reading, prompt, text, (loss, tokens) in zip(
                samples, readings, prompts, texts, losses, strict=True
            )
        ]

    def _outcome(self, readings: Sequence[Reading], prompts: Sequence[list[int]], answers: Sequence[str]) -> Outcome:
        model, role = self.model, readings[0].role
        if role == NO_ROLE and not model.own_tables:
            base = (model.config.base_model, model.dtype, self.max_new_tokens)
            key = (*base, tuple(map(tuple, prompts)), tuple(answers))
            if key not in self.of_base:
                self.of_base[key] = self._generate(readings, prompts, answers, role)
            return self.of_base[key]
        return self._generate(readings, prompts, answers, role)

    def _generate(
        self, readings: Sequence[Reading], prompts: Sequence[list[int]], answers: Sequence[str], role: str
    ) -> Outcome:
        model, length = self.model, self.max_new_tokens
        started = now(model.device)
        memories = [reading.memory for reading in readings]
        texts = answering.generate(model, prompts, memories, max_new_tokens=length, role=role)
        seconds = now(model.device) - started
        return Outcome(texts, reference_losses(model, readings, answers), seconds)


def reference_losses(model: Clara, readings: Sequence[Reading], answers: Sequence[str]) -> list[tuple[float, int]]:
    """Summed cross-entropy (nats) of an answer after each prompt, and its number of tokens.

    All readings must be for one role.
    """
    exchanges = [
        model.text.exchange(model.prompts, reading.turn, answer)
        for reading, answer in zip(readings, answers, strict=True)
    ]
    found: list[tuple[float, int]] = [(0.0, 0)] * len(readings)
    for rows in batches_by_tokens([len(ids) for ids, _ in exchanges], LOSS_TOKENS):
        packed = pack_groups(model, [group_prompts([exchanges[i]]) for i in rows]).to(model.device)
        memory = torch.cat([readings[i].memory.flatten(0, 1) for i in rows])
        logits, labels = model.answer_logits(packed, memory, role=readings[rows[0]].role)
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        counts = [len(exchanges[i][0]) - exchanges[i][1] for i in rows]
        for i, part in zip(rows, each.split(counts), strict=True):
            found[i] = float(part.sum()), len(part)
    return found


def _context_tokens(model: Clara, sample: EvalSample, reading: Reading, length: int) -> dict[str, int]:
    text, prompts = model.text, model.prompts
    question = text.defuse(sample.question)
    bare = len(text.prompt(prompts, prompts.answer_from_text(question, [])))
    documents = [text.defuse(text.readable(sample.documents[i])) for i in reading.read]
    written = len(text.prompt(prompts, prompts.answer_from_text(question, documents)))
    return {"context_tokens": max(0, length - bare), "text_tokens": max(0, written - bare)}

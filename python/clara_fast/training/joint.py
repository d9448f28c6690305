"""Joint training (stage 2 of the paper): the loss on the answer teaches the retriever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clara_fast.data.questions import QuestionSample
from clara_fast.evaluation.controls import Exam, even_batches
from clara_fast.evaluation.metrics import retrieval_metrics
from clara_fast.modeling import Clara
from clara_fast.modeling.answering import nearest
from clara_fast.modeling.checkpoint import read_safetensors
from clara_fast.training.candidates import (
    JointSample,
    StoreCandidates,
    index_candidates,
    own_candidates,
    with_positives,
)
from clara_fast.training.collation import answer_fields, pack_groups, question_branches
from clara_fast.training.trainer import AnswerTrainer, AnswerTrainingArguments

if TYPE_CHECKING:
    from clara_fast.store import MemoryStore

SOURCES = ("data", "search")
FOUND_FILE = "candidates.safetensors"
# Questions that are encoded and searched for at once.
SEARCH_BATCH = 256


@dataclass
class JointTrainingArguments(AnswerTrainingArguments):
    """transformers' arguments, and those of this stage."""

    learning_rate: float = 5e-6
    top_k: int | None = field(default=None, metadata={"help": "Documents selected; default the model's top_k."})
    num_candidates: int = field(default=20, metadata={"help": "Documents to select from, at most."})
    candidates: str = field(
        default="data", metadata={"help": "'data': each question's own documents; 'search': the nearest in the store."}
    )
    search_every: int = field(default=100, metadata={"help": "Optimizer steps between searches."})
    keep_positives: bool = field(default=True, metadata={"help": "Known positives are always among the candidates."})
    temperature: float = field(default=0.02, metadata={"help": "Of the straight-through softmax over cosines."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates not in SOURCES:
            raise ValueError(f"candidates ({self.candidates!r}) must be 'data' or 'search'")
        if self.search_every < 1:
            raise ValueError(f"search_every ({self.search_every}) must be at least 1")
        if self.num_candidates < max(1, self.top_k or 1):
            raise ValueError(f"num_candidates ({self.num_candidates}) must be at least 1 and top_k ({self.top_k})")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1")


class JointTrainer(AnswerTrainer):
    """Trains query reasoner and generator on the answer's cross-entropy alone, through the straight-through top-k.

    Base, compressor, memory tokens and connector are frozen: no dropout, no graph. So candidates' memories are the
    same at every step, and come from ``store`` if there is one; without, they are computed again and again.

    With ``args.candidates="search"`` a question's candidates are the nearest documents of the whole store to what the
    query reasoner makes of it, searched anew every ``args.search_every`` steps: they get harder as it learns.

    Args:
        model: gets a query reasoner that starts as a copy of the compressor, if it has none.
        args: see :class:`JointTrainingArguments`.
        train_dataset: a sequence of :class:`QuestionSample`.
        eval_dataset: held-out samples; evaluation reports Recall@1, Recall@5 and MRR@10 among the candidates (in the
            whole store, if it is searched), and the answer loss from the selected memories with its controls.
        store: memories of the candidates, written by this model.

    Raises:
        StoreMismatchError: another compressor wrote the store.
        ValueError: a question has no candidates, the store lacks one, or it is to be searched and there is none.
    """

    def __init__(
        self,
        model: Clara,
        args: JointTrainingArguments,
        train_dataset: Sequence[QuestionSample] | None = None,
        eval_dataset: Sequence[QuestionSample] | None = None,
        *,
        store: MemoryStore | None = None,
        **options: Any,
    ) -> None:
        if store is not None:
            store.check_model(model)
            if len(store) == 0:
                raise ValueError(f"the store {store.path} holds no documents")
        elif args.candidates == "search":
            raise ValueError("candidates ('search') need a store to search")
        if "query_reasoner" not in model.roles:
            model.add_role("query_reasoner", copy_of="compressor")
        model.train_only("query_reasoner", "generator")
        self.top_k = args.top_k or model.config.top_k
        if self.top_k > args.num_candidates:
            raise ValueError(f"num_candidates ({args.num_candidates}) must be at least top_k ({self.top_k})")
        self.store = store
        self._candidates = StoreCandidates(store) if store is not None else None
        self._searching = args.candidates == "search"
        self.args = args  # as the Trainer will; the samples are located by it before
        # Rows found for every training question, [Q, num_candidates], and where each question stands there.
        self._found: Tensor | None = None
        self._found_at: int | None = None
        train = self._located(train_dataset)
        self._place = {question: i for i, question in enumerate(dict.fromkeys(j.sample.question for j in train or ()))}
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=train,
            eval_dataset=self._located(eval_dataset),
            **options,
        )

    def _located(self, samples: Sequence[QuestionSample] | None) -> list[JointSample] | None:
        if samples is None or isinstance(samples, Mapping):  # which the base class refuses
            return samples  # type: ignore[return-value]
        count, keep = self.args.num_candidates, self.args.keep_positives
        if self._candidates is None:
            return own_candidates(samples, count, keep_positives=keep)
        if self._searching:
            return self._candidates.searched(samples)
        return self._candidates.given(samples, count, keep_positives=keep)

    @property
    def _num_found(self) -> int:
        """Candidates that a search brings."""
        assert self._candidates is not None
        return min(self.args.num_candidates, self._candidates.num_texts)

    # A step

    def _collate(self, samples: Sequence[JointSample]) -> dict[str, Any]:
        model = self.model
        counts = [self._num_found if self._searching else len(s.candidates) for s in samples]
        groups = [
            question_branches(model, [s.sample.exchange()], num_documents=min(self.top_k, count))
            for s, count in zip(samples, counts, strict=True)
        ]
        batch = {
            "queries": model.pack([s.sample.question for s in samples]),
            **answer_fields(pack_groups(model, groups), samples),
        }
        if self.store is None:
            texts, batch["candidates"] = index_candidates([s.candidates for s in samples])
            batch["documents"] = model.pack(texts)
        return batch

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = {name: inputs[name] for name in ("queries", "prompts")}
        batch |= {"top_k": self.top_k, "temperature": self.args.temperature}
        if self.store is None:
            return {**batch, "documents": inputs["documents"], "candidates": inputs["candidates"]}
        # Read here and not in the collator, which runs ahead of the step: a search may come in between.
        rows, candidates = index_candidates([self._rows(s) for s in inputs["samples"]])
        return {**batch, "memory": self.store.memory(rows), "candidates": candidates}

    def _rows(self, sample: JointSample) -> list[int]:
        if not self._searching:
            return sample.candidates
        if self._found is None:
            self.search()
        assert self._found is not None
        rows = self._found[self._place[sample.sample.question]].tolist()
        return with_positives(rows, sample.positives) if self.args.keep_positives else rows

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        step = self.state.global_step
        if self._searching and step % self.args.search_every == 0 and self._found_at != step:
            self.search()
        return super().training_step(model, inputs, num_items_in_batch)

    def search(self) -> None:
        """Search the store anew for the candidates of every training question; processes share the work."""
        assert self._candidates is not None
        questions = list(self._place)
        # A pass through a sharded model needs every process, so that none can have questions of its own.
        parts = 1 if self.is_fsdp_enabled else self.accelerator.num_processes
        share = -(-len(questions) // parts)
        start = share * (self.accelerator.process_index % parts)
        # The last share may be short, and what is gathered must not be.
        own = [questions[min(i, len(questions) - 1)] for i in range(start, start + share)]
        rows = torch.cat([self._search(own[i : i + SEARCH_BATCH]) for i in range(0, share, SEARCH_BATCH)])
        if parts > 1:
            rows = self.accelerator.gather(rows.to(self.args.device)).cpu()
        self._found, self._found_at = rows[: len(questions)], self.state.global_step

    def _search(self, questions: Sequence[str]) -> Tensor:
        """Rows ``[B, num_found]`` of the nearest documents, no text twice."""
        assert self._candidates is not None
        return self._candidates.search(self.model.encode_queries(questions), self._num_found)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._found is not None and self.args.should_save:
            save_file({"rows": self._found}, Path(str(output_dir or self.args.output_dir)) / FOUND_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / FOUND_FILE
        if self._searching and file.is_file():
            rows = read_safetensors(file)["rows"]
            expected = (len(self._place), self._num_found)
            if tuple(rows.shape) != expected:
                raise ValueError(f"{file} holds candidates for {tuple(rows.shape)}, this run asks for {expected}")
            self._found = rows

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Retrieval and answer loss of held-out questions.

        Recall is averaged over the questions whose positives are known; the answer loss has its
        controls (:func:`clara_fast.evaluation.controls.context_losses`): the selected memories, another question's,
        none, and the selected documents as text.
        """
        samples = self.eval_dataset if eval_dataset is None else self._located(eval_dataset)
        if samples is None:
            raise ValueError("evaluation needs an eval_dataset")
        found: list[list[Any]] = []
        wanted: list[list[Any]] = []
        metrics = self.examine(self._exams(samples, found, wanted), metric_key_prefix)
        if found:
            measured = retrieval_metrics(found, wanted)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
            if self.is_world_process_zero():
                print(", ".join(f"{name} {value:.3f}" for name, value in measured.items()), flush=True)
        return self.report(metrics)

    def _exams(
        self, samples: Sequence[JointSample], found: list[list[Any]], wanted: list[list[Any]]
    ) -> Iterable[list[Exam]]:
        """Each question on the documents selected for it; what was found and wanted goes into the lists."""
        for batch in even_batches(samples, self.args.per_device_eval_batch_size):
            exams = []
            for sample, (ranked, memory) in zip(batch, self._retrieve(batch), strict=True):
                if sample.positives:
                    found.append(ranked)
                    wanted.append(sample.positives)
                texts = [self.model.text.readable(text) for text in self._texts(ranked[: len(memory)])]
                exams.append(Exam([sample.sample.exchange()], texts, memory, [sample.sample.answers]))
            yield exams

    def _retrieve(self, samples: Sequence[JointSample]) -> Iterable[tuple[list[Any], Tensor]]:
        """Each question's best candidates (at least ten) and the memories ``[k, m, D]`` of those that are selected."""
        model = self.model
        depth = max(10, self.top_k)
        queries = model.encode_queries([s.sample.question for s in samples])
        if self._searching:
            assert self.store is not None
            assert self._candidates is not None
            for rows in self._candidates.search(queries, min(depth, self._candidates.num_texts)).tolist():
                yield rows, self.store.memory(rows[: self.top_k])
            return
        members, indices = index_candidates([s.candidates for s in samples])
        if self.store is None:
            memories = model.encode(model.pack(members).to(model.device), "compressor")[0]
        else:
            memories = self.store.memory(members).to(queries)
        for sample, query, row in zip(samples, queries, indices.to(memories.device), strict=True):
            own = memories[row[: len(sample.candidates)]]
            order, _ = nearest(model, query[None], own, min(depth, len(own)))
            yield [sample.candidates[i] for i in order.tolist()], own[order[: self.top_k]]

    def _texts(self, ranked: Sequence[Any]) -> list[str]:
        if self.store is None:
            return list(ranked)
        from clara_fast.store.documents import document_text

        return [document_text(d.title, d.text) for d in self.store.documents(ranked)]

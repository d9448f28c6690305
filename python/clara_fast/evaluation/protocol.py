"""What is asked and which documents may be read: data sets, candidates (normal, oracle), and how some are chosen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clara_fast.data.questions import QuestionSample, read_multidoc
from clara_fast.data.rows import read_rows
from clara_fast.data.scp import read_scp

DATASETS = ("nq", "hotpotqa", "musique", "2wiki")
DATA_VARIABLE = "CLARA_FAST_DATA"
PROTOCOLS = ("normal", "oracle")
SELECTIONS = ("retriever", "given", "gold")
# Where a data set's questions lie in a folder: our files, and ml-clara's, which has one for each protocol.
_PLACES = (
    "multidoc_dev_{name}.jsonl",
    "{name}.jsonl",
    "{name}/eval_processed_{positives}.jsonl",
    "stage2_eval/{name}/eval_processed_{positives}.jsonl",
)
_POSITIVES = {"normal": "no_pos", "oracle": "with_pos"}


@dataclass
class EvalSample(QuestionSample):
    """A question with its candidates as ``documents``; ``absent`` counts the positives that are not among them."""

    absent: int = 0


@dataclass(frozen=True)
class EvalProtocol:
    """Which documents a question has, and which of them are read.

    Attributes:
        name: ``"normal"``: the first ``num_candidates`` documents as the file gives them. ``"oracle"``: as many, with
            the known positives among them, in the place of the last.
        selection: ``"retriever"``: the ``top_k`` that the method ranks highest. ``"given"``: the first ``top_k`` in
            the file's order (oracle: with the positives among them), as ml-clara reads them before joint training.
            ``"gold"``: the positives, and nothing else.
        num_candidates: at most.
        top_k: documents that are read; None: as the model says.
    """

    name: str = "normal"
    selection: str = "retriever"
    num_candidates: int = 20
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise ValueError(f"protocol ({self.name!r}) must be one of {', '.join(PROTOCOLS)}")
        if self.selection not in SELECTIONS:
            raise ValueError(f"select ({self.selection!r}) must be one of {', '.join(SELECTIONS)}")
        for name, value in (("candidates", self.num_candidates), ("top_k", self.top_k)):
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")

    def candidates(self, sample: QuestionSample) -> EvalSample:
        """The sample with its candidates alone, each text once."""
        keep = self.name == "oracle" or self.selection == "gold"
        chosen = sample.chosen(self.num_candidates, keep_positives=keep)
        place: dict[str, int] = {}
        for i in chosen:
            place.setdefault(sample.documents[i], len(place))
        gold = list(dict.fromkeys(sample.documents[i] for i in sample.positives))
        positives = [place[text] for text in gold if text in place]
        return EvalSample(
            sample.id,
            sample.question,
            list(place),
            sample.answers,
            positives=positives,
            absent=len(gold) - len(positives),
        )

    def unranked(self, sample: QuestionSample, top_k: int) -> list[int] | None:
        """The documents that are read whatever a retriever says; None where it is to say."""
        if self.selection == "gold":
            return sample.positives
        if self.selection == "given":
            return sample.chosen(top_k, keep_positives=self.name == "oracle")
        return None


@dataclass
class EvalSet:
    """Questions with their candidates.

    Attributes:
        name: of the data set, for tables.
        samples: what is asked.
        single: whether every question has one passage (pretraining data), so that there is nothing to choose.
    """

    name: str
    samples: list[EvalSample]
    single: bool


def read_eval_set(
    source: str, protocol: EvalProtocol, *, folder: Path | None = None, limit: int | None = None
) -> EvalSet:
    """Questions of a file, or of a data set by name.

    Args:
        source: a ``.jsonl`` or ``.jsonl.gz`` file of questions with documents, or of passages with questions (SCP); or
            one of :data:`DATASETS`.
        protocol: candidates are chosen by it.
        folder: where data sets lie that are named; default the environment's ``CLARA_FAST_DATA``, or ``data``.
        limit: the first so many questions.

    Raises:
        FileNotFoundError: there is no such file or data set; where it was looked for is named.
        ValueError: a line breaks the format; file, line and rule are named.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1")
    file = _file_of(source, protocol, folder)
    single = _is_scp(file)
    if single:
        samples = [
            QuestionSample(f"{passage.id}/{i}", question, [passage.document], [answer], positives=[0])
            for passage in read_scp(file)
            if passage.questions
            for i, (question, answer) in enumerate(passage.pairs)
        ][:limit]
        if not samples:
            raise ValueError(f"{file} holds passages, but no question about them")
    else:
        samples = read_multidoc(file, limit=limit)
    if protocol.selection == "gold" and (blind := next((s for s in samples if not s.positives), None)):
        raise ValueError(f"select ('gold') needs pos_index, which sample {blind.id} lacks")
    name = source if source in DATASETS else file.name.removesuffix(".gz").removesuffix(".jsonl")
    return EvalSet(name, _distinct([protocol.candidates(s) for s in samples]), single)


def another(samples: Sequence[EvalSample], i: int) -> EvalSample:
    """The next question that shares no document with question ``i``, around the end.

    Raises:
        ValueError: there is none.
    """
    own = set(samples[i].documents)
    for other in (*samples[i + 1 :], *samples[:i]):
        if own.isdisjoint(other.documents):
            return other
    raise ValueError(f"method 'other' needs another question whose documents are not those of sample {samples[i].id}")


def _distinct(samples: list[EvalSample]) -> list[EvalSample]:
    """The same samples, no two with one id."""
    seen: dict[str, int] = {}
    for sample in samples:
        seen[sample.id] = count = seen.get(sample.id, 0) + 1
        if count > 1:
            sample.id = f"{sample.id}#{count}"
    return samples


def _file_of(source: str, protocol: EvalProtocol, folder: Path | None) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source not in DATASETS:
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(f"{source} does not exist")
        raise FileNotFoundError(f"{source!r} is neither a file nor a data set: those are {', '.join(DATASETS)}")
    folder = folder if folder is not None else Path(os.environ.get(DATA_VARIABLE, "data"))
    names = [place.format(name=source, positives=_POSITIVES[protocol.name]) for place in _PLACES]
    for file in (folder / f"{name}{end}" for name in names for end in ("", ".gz")):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"data set {source!r} is not in {folder}: none of {', '.join(names)} (or .gz) is there; "
        f"--data or {DATA_VARIABLE} names another folder"
    )


def _is_scp(file: Path) -> bool:
    """Whether the first line has the form of pretraining data. Raises ``ValueError`` if it holds no question."""
    for place, row in read_rows(file):
        if "question" not in row and row.get("data_type") != "paraphrase":
            held = ", ".join(list(row)[:6]) or "nothing"
            raise ValueError(
                f"{place}: holds no question, but {held}: evaluation reads questions with docs and answers"
            )
        several = isinstance(row.get("question"), list) and len(row["question"]) != 1
        return "data_type" in row or several
    return False

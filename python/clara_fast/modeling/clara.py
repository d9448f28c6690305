"""The CLaRa model: one causal language model, three LoRA roles, and the memory tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from clara_fast import ops
from clara_fast.modeling import answer_head, attention, roles
from clara_fast.modeling.config import ClaraConfig, LoraSettings, quantization_settings
from clara_fast.modeling.connector import Connector
from clara_fast.modeling.packing import PackedDocuments, PackedPrompts, batches_by_tokens, pack_documents
from clara_fast.modeling.prompts import Prompts
from clara_fast.modeling.roles import Role
from clara_fast.modeling.sharding import is_sharded
from clara_fast.modeling.text import TextEncoder

TRAINABLE_PARTS = (*roles.ROLES, "memory_tokens", "connector")


@dataclass
class ClaraOutput:
    """What a training forward pass returns.

    Attributes:
        lm_loss: scalar, cross-entropy over the answers' tokens: their mean, or their sum over ``num_items``.
        mse_loss: scalar, mean squared distance of mean memory and mean text state (paper section 3).
        memory: ``[S, m, D]`` memories of the documents, computed or as they were given.
        query: ``[B, m, D]`` memories of the questions, if there were any.
        scores: ``[B, N]`` float32 cosines of questions and candidates, if there were any.
        indices: ``[B, k]`` int64 candidates that were selected, if there were any.
    """

    lm_loss: Tensor | None = None
    mse_loss: Tensor | None = None
    memory: Tensor | None = None
    query: Tensor | None = None
    scores: Tensor | None = None
    indices: Tensor | None = None


class Clara(nn.Module):
    """A base causal language model as compressor, query reasoner and generator (arXiv 2511.18659).

    Make one with :meth:`from_base` or :meth:`from_pretrained`.

    Args:
        config: geometry and options.
        lm: a transformers causal language model loaded with ``attn_implementation="clara_fast"``.
        tokenizer: the base model's; the added tokens are appended to it.
        prompts_folder: where a checkpoint's own ``prompts.json`` lies.
    """

    # nn.Module's annotations hide what a transformers model can do.
    lm: Any

    def __init__(
        self,
        config: ClaraConfig,
        lm: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts_folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.lm = lm.requires_grad_(False)
        config.hidden_size = lm.get_input_embeddings().embedding_dim
        self.text = TextEncoder(config, tokenizer)
        self.prompts = Prompts.load(prompts_folder, tokenizer, self.text.memory_block)
        self._add_token_rows()
        rows = self.lm.get_input_embeddings().weight[self.text.memory_ids[: self._num_memory_rows]]
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self.memory_embeddings = nn.Parameter(rows.detach().to(wide, copy=True), requires_grad=False)
        self.connector = Connector(config.hidden_size, device=rows.device, dtype=wide) if config.connector else None
        if self.connector is not None:
            self.connector.requires_grad_(False)
        # Whether the base's own embedding rows were changed, as a foreign checkpoint may have it.
        self.own_tables = False
        # What FSDP shards by itself: transformers' name, read by accelerate.
        self._no_split_modules = getattr(lm, "_no_split_modules", None)
        self.roles: set[str] = set()
        self.trainable: frozenset[str] = frozenset()
        self._checkpointing = False
        self._plain_logits = answer_head.logits_are_plain(lm)

    @classmethod
    def from_base(
        cls,
        base_model: str | Path,
        *,
        doc_max_length: int = 256,
        compression_rate: int = 16,
        lora: LoraSettings | dict[str, Any] | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> Self:
        """A new model: any transformers decoder with fresh adapters for compressor and generator.

        Args:
            base_model: hub name or folder.
            doc_max_length: tokens read of each document.
            compression_rate: document tokens per memory token.
            lora: size of the adapters.
            dtype: of the base model; adapters and memory tokens are float32.
            device: default CUDA if there is one, else CPU.
            quantization_config: transformers' ``BitsAndBytesConfig``, or a dict of its settings: the base is loaded in
                8 or 4 bits, here and whenever the saved model is loaded again.
            options: further fields of :class:`ClaraConfig`.
        """
        from clara_fast.modeling.checkpoint import load_base

        config = ClaraConfig(
            base_model=str(base_model),
            doc_max_length=doc_max_length,
            compression_rate=compression_rate,
            lora=LoraSettings(**lora) if isinstance(lora, dict) else lora or LoraSettings(),
            quantization_config=quantization_settings(quantization_config),
            **options,
        )
        lm, tokenizer = load_base(config, dtype, device)
        model = cls(config, lm, tokenizer)
        model.add_role("compressor")
        model.add_role("generator")
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        base_model: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        revision: str | None = None,
        compression_rate: int | None = None,
    ) -> Self:
        """Load a saved model, ours or one of ml-clara's, from a folder or the hub.

        Every adapter that is present is loaded. ``base_model`` overrides where the base model is looked for. Another
        ``compression_rate`` than the model's gives a start for training at that rate: all weights go along, and the
        new memory tokens are copies of the old ones nearest to them.

        Raises:
            FileNotFoundError: a file of the checkpoint is missing; it is named.
            ValueError: a file is damaged or does not fit the base model.
        """
        from clara_fast.modeling.checkpoint import load_model

        return load_model(cls, name_or_path, subfolder, base_model, dtype, device, revision, compression_rate)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        format: str = "clara_fast",
        adapter_dtype: torch.dtype = torch.bfloat16,
        is_main_process: bool = True,
    ) -> None:
        """Write the model (without its base) to ``path``: a new folder appears whole, files in an old one one by one.

        ``format="clara_fast"``: one folder per role that peft can load, ``memory.safetensors``, ``config.json``,
        ``prompts.json`` and the tokenizer. ``format="ml-clara"``: the reference's files. Adapters are written in
        ``adapter_dtype``. Of several processes only the main one writes, but all must call if FSDP2 sharded the model.
        """
        from clara_fast.modeling.checkpoint import save_model

        save_model(self, Path(path), format, adapter_dtype, is_main_process)

    # Parts

    def add_role(self, role: Role, *, copy_of: Role | None = None) -> None:
        """Add a fresh adapter for ``role``, or one that starts as a copy of another role's."""
        if role in self.roles:
            raise ValueError(f"role ({role!r}) is there already")
        if copy_of is not None and copy_of not in self.roles:
            raise ValueError(f"copy_of ({copy_of!r}) must be one of the model's roles ({sorted(self.roles)})")
        roles.add_role(self.lm, role, self.config.lora)
        self.roles.add(role)
        if copy_of is not None:
            source = roles.role_parameters(self.lm, copy_of)
            for name, parameter in roles.role_parameters(self.lm, role).items():
                parameter.data.copy_(source[name].data)
        self.train_only(*self.trainable)

    def reset_role(self, role: Role) -> None:
        """Start a role's adapter afresh: random A, zero B, as :meth:`add_role` makes it."""
        if role not in self.roles:
            raise ValueError(f"role ({role!r}) must be one of the model's roles ({sorted(self.roles)})")
        roles.reset_role(self.lm, role)

    def train_only(self, *parts: str) -> None:
        """Freeze everything but ``parts``: names of roles, ``"memory_tokens"``, ``"connector"``.

        A frozen role has no dropout and builds no graph, also while the model is in training mode. So memory tokens
        learn through the roles that train alone, as in the reference.
        """
        present = {*self.roles, "memory_tokens", *(["connector"] if self.connector is not None else [])}
        for part in parts:
            if part not in present:
                raise ValueError(f"part ({part!r}) must be one of {sorted(present)}")
        self.trainable = frozenset(parts)
        for role in self.roles:
            for parameter in roles.role_parameters(self.lm, role).values():
                parameter.requires_grad_(role in self.trainable)
        self.memory_embeddings.requires_grad_("memory_tokens" in self.trainable)
        if self.connector is not None:
            self.connector.requires_grad_("connector" in self.trainable)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for role in self.roles - self.trainable:
            for dropout in roles.dropout_modules(self.lm, role):
                dropout.eval()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in backward, as transformers' models do; every layer keeps the role of its call."""
        if hasattr(self.lm, "activation_checkpointing_enable"):
            self.lm.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
        else:  # transformers before 5.24
            self.lm.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)
        self._checkpointing = True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model, and so of memories."""
        return self.lm.dtype

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer with the added tokens."""
        return self.text.tokenizer

    @property
    def query_role(self) -> Role:
        """Who encodes questions: the query reasoner, or the compressor before there is one (stage 1)."""
        return "query_reasoner" if "query_reasoner" in self.roles else "compressor"

    @property
    def fingerprint(self) -> str:
        """Identity of everything that determines a memory: 16 hexadecimal digits.

        Equal for models that write interchangeable memories: same base (in as many bits), compressor, memory tokens
        and geometry, in whatever dtype they were loaded.
        """
        from clara_fast.modeling.fingerprint import fingerprint

        return fingerprint(self)

    # Documents and questions to memories

    def pack(self, texts: Sequence[str], *, max_length: int | None = None) -> PackedDocuments:
        """Tokenise and pack documents or questions; longer ones are cut to ``max_length`` tokens."""
        return self._pack(self.text.documents(texts, max_length=max_length)[0])

    def _pack(self, ids: Sequence[Sequence[int]]) -> PackedDocuments:
        return pack_documents(ids, self.text.memory_ids, spread=self.config.memory_positions == "spread")

    def encode(self, packed: PackedDocuments, role: Role) -> tuple[Tensor, Tensor]:
        """Memories ``[S, m, D]`` and mean squared errors ``[S]`` of packed texts.

        With a graph if ``role`` trains, and behind it if the connector does.
        """
        m = self.config.num_memory
        self._check_window(packed.longest)
        with torch.set_grad_enabled(torch.is_grad_enabled() and role in self.trainable):
            embeds = self.lm.get_input_embeddings()(packed.input_ids)
            tail = torch.arange(-m, 0, device=embeds.device)
            rows = (packed.offsets[1:, None] + tail).flatten().long()
            tokens = self.memory_embeddings.expand(m, -1).repeat(len(packed), 1)
            embeds = self._entry(embeds.index_copy(0, rows, tokens.to(embeds.dtype)), role)
            hidden = roles.run_backbone(self.lm.get_decoder(), role, packed.layout, embeds, packed.position_ids)
            memory, mse = ops.pool_memory(hidden, packed.offsets, m)
        return (memory if self.connector is None else self.connector(memory)), mse

    def compress(
        self,
        documents: Sequence[str],
        *,
        max_tokens: int = 8192,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Memories ``[N, m, D]`` of documents, in their order and the model's dtype.

        Args:
            documents: texts; what goes beyond ``doc_max_length`` tokens is cut off, with one warning.
            max_tokens: tokens that go through the model at once (documents are packed, not padded).
            progress: called with the number of documents after each batch.

        Raises:
            ValueError: a document is empty; its index is named.
        """
        return self._encode_texts(documents, "compressor", max_tokens, progress)

    def encode_queries(self, questions: str | Sequence[str], *, max_tokens: int = 8192) -> Tensor:
        """Memories ``[B, m, D]`` of questions, by the query reasoner."""
        questions = [questions] if isinstance(questions, str) else questions
        return self._encode_texts(questions, self.query_role, max_tokens, None)

    def calibrate_connector(self, documents: Sequence[str]) -> None:
        """Start the connector from the statistics of these documents' memories (before any training)."""
        if self.connector is None:
            raise ValueError("the model has no connector: its configuration says connector=False")
        connector, self.connector = self.connector, None
        try:
            memory = self.compress(documents)
        finally:
            self.connector = connector
        known = self.lm.get_input_embeddings().weight[: self.text.added_ids[0]]
        connector.calibrate(memory.flatten(0, 1), known)

    def count_tokens(self, documents: Sequence[str]) -> list[int]:
        """Tokens of each document before anything is cut off."""
        ids, _ = self.text.documents(documents, max_length=2**62)
        return [len(row) - self.text.num_around for row in ids]

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """The range of characters of each token of a document: where it can be cut."""
        return self.text.spans(text)

    def _encode_texts(
        self, texts: Sequence[str], role: Role, max_tokens: int, progress: Callable[[int], None] | None
    ) -> Tensor:
        if isinstance(texts, str):
            raise TypeError("documents must be a sequence of strings, not one string")
        ids, num_cut = self.text.documents(texts)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(texts)} texts were cut to doc_max_length ({self.config.doc_max_length} tokens)",
                stacklevel=3,
            )
        m, d = self.config.num_memory, self.config.hidden_size
        memories = torch.empty(len(ids), m, d, dtype=self.dtype, device=self.device)
        with self.inference():
            for batch in batches_by_tokens([len(row) + m for row in ids], max_tokens):
                packed = self._pack([ids[i] for i in batch])
                memories[batch] = self.encode(packed.to(self.device), role)[0]
                if progress is not None:
                    progress(len(batch))
        return memories

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients and no dropout inside; the mode is put back afterwards.

        FSDP2 gathers what lies outside the decoder layers (embeddings, memory tokens, connector, head) only in
        :meth:`forward`; inside, it stays gathered, so that every method works. All processes must come along.
        """
        training = self.training
        sharded: Any = self if is_sharded(self.memory_embeddings) else None
        if training:
            self.eval()
        try:
            with torch.no_grad():
                if sharded is not None:
                    self()  # of nothing: FSDP2 sets itself up in the first forward of the whole
                    sharded.unshard()
                yield
        finally:
            if sharded is not None:
                sharded.reshard()
            if training:
                self.train()

    # Training

    def forward(
        self,
        documents: PackedDocuments | None = None,
        prompts: PackedPrompts | None = None,
        queries: PackedDocuments | None = None,
        candidates: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        top_k: int | None = None,
        num_items: Tensor | int | None = None,
        temperature: float = 0.02,
        taken_logit: float = -math.inf,
    ) -> ClaraOutput:
        """Losses of a batch: whatever can be had from what is given.

        Without ``queries`` the memories of ``documents`` fill the prompts' slots in order (stages 1 and 1_2).
        With them, each question picks ``top_k`` of its ``candidates`` (``[B, N]`` int64 rows of ``documents``, -1 for
        none) by the straight-through top-k, and their memories fill its prompt (stage 2, paper section 3.2); the
        prompt of a question with fewer candidates has slots for those only. ``queries`` alone give their memories,
        with a graph.

        Args:
            memory: ``[N, m, D]`` memories in the place of ``documents``, as a store keeps them.
            num_items: answer tokens of the whole optimizer step, if the batch is only a part of it.
            temperature: of the straight-through softmax.
            taken_logit: see :func:`clara_fast.ops.select_memory`.
        """
        if documents is not None and memory is not None:
            raise ValueError("forward() takes documents or their memory, not both")
        output = ClaraOutput()
        if queries is not None:
            output.query, _ = self.encode(queries.to(self.device), self.query_role)
        if documents is not None:
            output.memory, mse = self.encode(documents.to(self.device), "compressor")
            output.mse_loss = mse.mean()
        elif memory is not None:
            output.memory = memory.to(self.device, self.dtype)
        if output.memory is None:
            return output
        filling = output.memory
        if output.query is not None and candidates is not None:
            rows = candidates.to(self.device)
            options = output.memory[rows.clamp_min(0)]
            filling, output.indices, output.scores = ops.select_memory(
                output.query.flatten(1),
                options.flatten(2),
                options,
                top_k or self.config.top_k,
                temperature=temperature,
                valid=rows >= 0,
                taken_logit=taken_logit,
            )
            if prompts is not None and prompts.memory_slots.numel() != filling[..., 0].numel():
                # Some questions have fewer candidates than are selected, and so fewer slots.
                filling = filling[output.indices >= 0]
        if prompts is not None:
            output.lm_loss = self.answer_loss(prompts.to(self.device), filling.flatten(0, -2), num_items)
        return output

    def answer_loss(
        self,
        prompts: PackedPrompts,
        memory: Tensor,
        num_items: Tensor | int | None = None,
        *,
        role: str = "generator",
    ) -> Tensor:
        """Cross-entropy of the answers' tokens when ``memory [n * m, D]`` fills the prompts' slots.

        Only the answers' rows go through the head, and a chunk of their logits is held at a time.
        """
        if self._plain_logits:
            embeds, rows = self._answer_entry(prompts, memory, role)
            decoder, labels = self.lm.get_decoder(), prompts.labels[rows]
            hidden = roles.run_backbone(decoder, role, prompts.layout, embeds, prompts.position_ids)[rows]
            loss = answer_head.answer_cross_entropy(hidden, labels, self.lm.get_output_embeddings())
        else:
            logits, labels = self.answer_logits(prompts, memory, role=role)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        return loss / (len(labels) if num_items is None else num_items)

    def answer_logits(
        self, prompts: PackedPrompts, memory: Tensor, *, role: str = "generator"
    ) -> tuple[Tensor, Tensor]:
        """``[n, V]`` logits that predict the answers' ``n`` tokens, and those tokens ``[n]``."""
        embeds, rows = self._answer_entry(prompts, memory, role)
        output = self.lm(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=prompts.position_ids.unsqueeze(0),
            attention_mask=attention.packed_mask(embeds),
            use_cache=False,
            logits_to_keep=rows,
            clara_role=role,
            clara_layout=prompts.layout,
        )
        return output.logits[0], prompts.labels[rows]

    def _answer_entry(self, prompts: PackedPrompts, memory: Tensor, role: str) -> tuple[Tensor, Tensor]:
        """Embeddings ``[T, D]`` of prompts with their memories, and the rows ``[n]`` that predict answer tokens."""
        if memory.shape[0] != prompts.memory_slots.numel():
            raise ValueError(
                f"memory rows ({memory.shape[0]}) must equal the prompts' memory slots ({prompts.memory_slots.numel()})"
            )
        self._check_window(prompts.longest)
        embeds = self.lm.get_input_embeddings()(prompts.input_ids)
        embeds = self._entry(embeds.index_copy(0, prompts.memory_slots, memory.to(embeds.dtype)), role)
        rows = (prompts.labels != -100).nonzero().flatten()
        if rows.numel() == 0:
            raise ValueError("the batch holds no answer token to take a loss on")
        return embeds, rows

    # The system, put together

    def rerank(self, question: str, documents: Sequence[str], *, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Indices ``[k]`` and cosines ``[k]`` of the documents nearest to the question, best first (all of them)."""
        from clara_fast.modeling.answering import nearest

        return nearest(
            self, self.encode_queries(question), self.compress(documents), len(documents) if top_k is None else top_k
        )

    def answer(self, questions: str | Sequence[str], **options: Any) -> Any:
        """An :class:`Answer` for one question, a list for several, from exactly one source.

        ``options`` are those of :func:`clara_fast.modeling.answering.answer`, which says more: ``store``, ``documents``
        or ``memory`` ``[k, m, D]`` (of each question); ``top_k``, ``max_new_tokens``; the rest goes to transformers'
        ``generate``.

        Raises:
            ValueError: none or several sources, ``top_k`` above the number of documents, a store of another model.
        """
        from clara_fast.modeling.answering import answer

        return answer(self, questions, **options)

    def to_prompt_embeds(
        self, question: str, *, store: Any = None, memory: Tensor | None = None, top_k: int | None = None
    ) -> Any:
        """The prompt that :meth:`answer` generates from, as embeddings ``[T, D]``, for another engine to do so.

        The engine runs the base model with the generator's adapter (folder ``generator`` of a saved model).

        Args:
            store: the ``top_k`` nearest documents are read.
            memory: ``[k, m, D]``, read as it is and in that order.
            top_k: default the model's ``config.top_k``, or all where there are fewer.

        Returns:
            a :class:`clara_fast.modeling.prompt_embeds.PromptEmbeds`.

        Raises:
            ValueError: none or both sources, ``top_k`` above the number of documents, a store of another model.
        """
        from clara_fast.modeling.prompt_embeds import to_prompt_embeds

        return to_prompt_embeds(self, question, store=store, memory=memory, top_k=top_k)

    def paraphrase(self, memory: Tensor, *, instruction: int = 0, **generate_options: Any) -> list[str]:
        """Write out what each memory of ``[N, m, D]`` says; see :func:`clara_fast.modeling.answering.paraphrase`."""
        from clara_fast.modeling.answering import paraphrase

        return paraphrase(self, memory, instruction=instruction, **generate_options)

    def explain(self, question: str, **options: Any) -> Any:
        """An :class:`Explanation`: the question's memory in words, and what an answer teaches the retriever.

        ``options`` are those of :func:`clara_fast.modeling.explaining.explain`: ``store`` or ``documents``, ``answer``,
        ``top_k``, ``num_candidates``, ``num_tokens``.
        """
        from clara_fast.modeling.explaining import explain

        return explain(self, question, **options)

    def _entry(self, embeds: Tensor, role: str) -> Tensor:
        """What enters the first layer. Reentrant checkpointing gives gradients only where its input asks for one."""
        if role in self.trainable and torch.is_grad_enabled() and not embeds.requires_grad:
            return embeds.requires_grad_(self._checkpointing)
        return embeds

    def _check_window(self, longest: int) -> None:
        base = self.lm.config
        window = getattr(base, "sliding_window", None) if getattr(base, "use_sliding_window", True) else None
        if window is not None and longest > window:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit the base model's sliding_window ({window}): "
                "packed attention reads every document in full"
            )

    # Construction

    @property
    def _num_memory_rows(self) -> int:
        return self.config.num_memory if self.config.distinct_memory_tokens else 1

    def _add_token_rows(self) -> None:
        """Rows for the added tokens: memory tokens start at the mean embedding, markers somewhere around it."""
        size = max(self.lm.get_input_embeddings().weight.shape[0], len(self.tokenizer))
        if size != self.lm.get_input_embeddings().weight.shape[0]:
            self.lm.resize_token_embeddings(size, mean_resizing=False)
        for layer in {self.lm.get_input_embeddings(), self.lm.get_output_embeddings()}:
            table = layer.weight.detach()
            known = table[: self.text.added_ids[0]].float()
            noise = torch.randn(len(self.text.added_ids), known.shape[1], generator=torch.Generator().manual_seed(0))
            noise[: self._num_memory_rows] = 0
            table[self.text.added_ids] = (known.mean(0) + noise.to(known.device) * known.std(0)).to(table.dtype)
        self.lm.requires_grad_(False)

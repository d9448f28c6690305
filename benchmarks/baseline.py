"""The straightforward way to do the same work with transformers and peft, as a yardstick.

Every document is padded to the longest length allowed; the compressor computes logits that nobody reads and keeps every
layer's hidden states; the loss is taken on the logits of all rows; adapters are switched with ``set_adapter`` and stay
unmerged; joint training and answering compress their candidates each time. Attention is PyTorch's (sdpa).

Where a choice was open, the faster one was taken: a passage is compressed once for all its questions, prompts and
answers are padded only to the longest of the batch, frozen roles build no graph, and memory tokens are a parameter of
their own, so that no gradient of the whole embedding table arises.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from clara_fast import Clara
from clara_fast.modeling import roles


class Rows(NamedTuple):
    """Left-padded token ids, their attention mask and their positions, each ``[B, L]``."""

    ids: Tensor
    mask: Tensor
    positions: Tensor


class Baseline:
    """Computes what ``clara`` computes, with its weights (the frozen ones are shared, the trained ones copied)."""

    def __init__(self, clara: Clara) -> None:
        if clara.connector is not None or clara.config.memory_positions != "after":
            raise ValueError("the baseline knows neither connectors nor spread memory positions")
        self.text, self.prompts, self.config = clara.text, clara.prompts, clara.config
        self.lm = self._language_model(clara)
        self.memory_tokens = nn.Parameter(clara.memory_embeddings.detach().clone(), requires_grad=False)
        self.pad_id = self.text.tokenizer.pad_token_id
        self.device = clara.device
        self.memory_ids = torch.tensor(self.text.memory_ids, device=self.device)
        self.trained: frozenset[str] = frozenset()

    def _language_model(self, clara: Clara) -> Any:
        config = copy.deepcopy(clara.lm.config)
        config._attn_implementation = "sdpa"
        lm = AutoModelForCausalLM.from_config(config, dtype=clara.dtype, attn_implementation="sdpa")
        weights = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in clara.lm.state_dict().items()
            if ".lora_" not in name
        }
        lm.load_state_dict(weights, assign=True)
        lm.tie_weights()
        lm.generation_config = copy.deepcopy(clara.lm.generation_config)
        lora = clara.config.lora
        settings = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        first, *others = sorted(clara.roles)
        lm = get_peft_model(lm, settings, adapter_name=first)
        for role in others:
            lm.add_adapter(role, settings)
        for role in sorted(clara.roles):
            theirs = roles.role_parameters(clara.lm, role)
            mine = roles.role_parameters(lm.base_model.model, role)
            for name, parameter in mine.items():
                parameter.data.copy_(theirs[name].data)
        return lm.requires_grad_(False).eval()

    def train_only(self, *parts: str) -> None:
        """Choose the roles (and ``"memory_tokens"``) that learn."""
        self.trained = frozenset(parts)
        self.memory_tokens.requires_grad_("memory_tokens" in self.trained)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """A role's LoRA parameters, named as :func:`clara_fast.modeling.roles.role_parameters` names them."""
        return roles.role_parameters(self.lm.base_model.model, role)

    def zero_grad(self) -> None:
        self.lm.zero_grad()
        self.memory_tokens.grad = None

    def _use(self, role: str) -> None:
        self.lm.set_adapter(role)
        # set_adapter freezes the others and thaws this one: gradients on their way to them would be dropped.
        for name, parameter in self.lm.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(name.split(".lora_")[1].split(".")[1] in self.trained)

    def _pad_left(self, rows: Sequence[Sequence[int]], length: int) -> Rows:
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        return Rows(ids, mask, (mask.cumsum(1) - 1).clamp_min(0))

    def pad_texts(self, texts: Sequence[str]) -> Rows:
        """Documents or questions with their memory tokens, padded to the longest that is allowed."""
        rows = [ids + self.text.memory_ids for ids in self.text.documents(texts)[0]]
        return self._pad_left(rows, self.config.doc_max_length + 3 + self.config.num_memory)

    def pad_exchanges(self, exchanges: Sequence[tuple[str, str]], num_documents: int) -> tuple[Rows, Tensor]:
        """Rows of whole prompts, each with its memory slots and its answer, and their labels."""
        tokens = []
        for question, reply in exchanges:
            turn = self.prompts.answer(self.text.defuse(question), num_documents)
            tokens.append(self.text.exchange(self.prompts, turn, reply))
        rows = self._pad_left([ids for ids, _ in tokens], max(len(ids) for ids, _ in tokens))
        labels = rows.ids.clone()
        for row, (ids, prompt) in enumerate(tokens):
            labels[row, : labels.shape[1] - len(ids) + prompt] = -100
        return rows, labels

    def encode(self, rows: Rows, role: str) -> tuple[Tensor, Tensor]:
        """Memories ``[S, m, D]`` and mean squared errors ``[S]`` of one batch of texts."""
        m = self.config.num_memory
        self._use(role)
        embeds = self.lm.get_input_embeddings()(rows.ids)
        tokens = self.memory_tokens.to(embeds.dtype).expand(len(embeds), m, -1)
        output = self.lm(
            inputs_embeds=torch.cat([embeds[:, :-m], tokens], dim=1),
            attention_mask=rows.mask,
            position_ids=rows.positions,
            output_hidden_states=True,
            use_cache=False,
        )
        hidden = output.hidden_states[-1]
        memory = hidden[:, -m:]
        real = rows.mask[:, :-m].unsqueeze(-1)
        mean = (hidden[:, :-m] * real).sum(1) / real.sum(1)
        return memory, (mean - memory.mean(1)).float().square().mean(1)

    @torch.no_grad()
    def compress(self, texts: Sequence[str], batch: int) -> Tensor:
        """Memories ``[N, m, D]``, in batches of equal size."""
        batches = [texts[i : i + batch] for i in range(0, len(texts), batch)]
        return torch.cat([self.encode(self.pad_texts(part), "compressor")[0] for part in batches])

    def _answer_loss(self, rows: Rows, labels: Tensor, memory: Tensor) -> Tensor:
        """Cross-entropy of the answers; ``memory [B, n, D]`` fills each row's slots."""
        self._use("generator")
        output = self.lm(
            inputs_embeds=self._filled(rows.ids, memory),
            attention_mask=rows.mask,
            position_ids=rows.positions,
            use_cache=False,
        )
        logits = output.logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    def _filled(self, ids: Tensor, memory: Tensor) -> Tensor:
        embeds = self.lm.get_input_embeddings()(ids)
        slots = torch.isin(ids, self.memory_ids).unsqueeze(-1)
        return embeds.masked_scatter(slots, memory.to(embeds.dtype))

    def scp_loss(
        self, documents: Rows, prompts: Rows, labels: Tensor, passage_of: Sequence[int], mse_weight: float = 0.1
    ) -> Tensor:
        """Pretraining's loss; every question is a row with its own copy of the prompt and its passage's memory."""
        memory, mse = self.encode(documents, "compressor")
        return self._answer_loss(prompts, labels, memory[passage_of]) + mse_weight * mse.mean()

    def joint_loss(
        self, query: Rows, candidates: Rows, prompts: Rows, labels: Tensor, k: int, temperature: float = 0.02
    ) -> tuple[Tensor, Tensor]:
        """Joint training's loss of one question, and the indices ``[k]`` of the candidates it chose."""
        memory, _ = self.encode(candidates, "compressor")
        asked, _ = self.encode(query, "query_reasoner")
        cosines = F.cosine_similarity(asked.flatten(1), memory.flatten(1)).float()
        logits, slots, chosen = cosines / temperature, [], []
        for _ in range(k):
            soft = logits.softmax(0)
            best = soft.argmax()
            hard = F.one_hot(best, len(soft)).to(soft)
            slots.append(hard + soft - soft.detach())
            chosen.append(best)
            logits = logits.masked_fill(hard.bool(), -torch.inf)
        selected = torch.einsum("kn,nmd->kmd", torch.stack(slots).to(memory.dtype), memory)
        return self._answer_loss(prompts, labels, selected.flatten(0, 1)[None]), torch.stack(chosen)

    @torch.no_grad()
    def answer(
        self, question: str, candidates: Sequence[str], k: int, batch: int, **options: Any
    ) -> tuple[str, list[int]]:
        """The answer from the best ``k`` of the candidates, which are compressed first, and their indices."""
        memory = self.compress(candidates, batch)
        query, _ = self.encode(self.pad_texts([question]), "query_reasoner")
        found = F.cosine_similarity(query.flatten(1), memory.flatten(1)).topk(k).indices
        ids = self.text.prompt(self.prompts, self.prompts.answer(self.text.defuse(question), k))
        rows = self._pad_left([ids], len(ids))
        self._use("generator")
        sequences = self.lm.generate(
            inputs_embeds=self._filled(rows.ids, memory[found]),
            attention_mask=rows.mask,
            do_sample=False,
            pad_token_id=self.pad_id,
            **options,
        )
        text = self.text.tokenizer.batch_decode(sequences, skip_special_tokens=True)[0]
        return text.strip(), found.tolist()

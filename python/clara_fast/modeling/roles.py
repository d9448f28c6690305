"""Three LoRA roles on one base model, chosen per call.

A role travels as the keyword ``clara_role`` from the base model's ``forward`` through every decoder layer to its
attention module, whose pre-hook turns the layer's adapters to it. Nothing outside that call remembers the choice:
when gradient checkpointing runs a layer's ``forward`` again, during backward and long after another role was used, it
runs with the keywords of the first time. (peft's own ``set_adapter`` is global state, and clears ``requires_grad`` of
the adapters it leaves.)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clara_fast.modeling.config import LoraSettings
from clara_fast.modeling.lora import use_role_linears
from clara_fast.modeling.sharding import plain_name

Role = Literal["compressor", "query_reasoner", "generator"]
ROLES: tuple[Role, ...] = get_args(Role)
NO_ROLE = "base"


def lora_config(settings: LoraSettings, base_model: str | None = None) -> LoraConfig:
    """The peft configuration of every role."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        base_model_name_or_path=base_model,
    )


def add_role(lm: nn.Module, role: Role, settings: LoraSettings) -> None:
    """Inject a fresh adapter named ``role`` (its B matrices are zero, so it changes nothing yet)."""
    first = not any(isinstance(module, LoraLayer) for module in lm.modules())
    with warnings.catch_warnings():
        # peft wonders about several adapters on one model; they are the point here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(lora_config(settings), lm, adapter_name=role)
    use_role_linears(lm)
    for name, parameter in lm.named_parameters():
        if f".lora_A.{role}." in name or f".lora_B.{role}." in name:
            # Adam's steps on bfloat16 weights would round away.
            parameter.data = parameter.data.float() if parameter.dtype != torch.float64 else parameter.data
        parameter.requires_grad_(False)
    if first:
        _follow_role_keyword(lm)


def reset_role(lm: nn.Module, role: str) -> None:
    """Draw the role's adapter anew, as :func:`add_role` does."""
    for module in lm.modules():
        if isinstance(module, LoraLayer) and role in module.lora_A:
            module.reset_lora_parameters(role, init_lora_weights=True)


def role_parameters(lm: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Parameters by name without the adapter's: ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
    found = {}
    for name, parameter in lm.named_parameters():
        for matrix in ("lora_A", "lora_B"):
            if f".{matrix}.{role}." in name:
                found[plain_name(name).replace(f".{matrix}.{role}.", f".{matrix}.")] = parameter
    return found


def dropout_modules(lm: nn.Module, role: str) -> list[nn.Module]:
    """The role's dropout layers: a frozen role's stay in eval mode whatever the model around them does."""
    return [m.lora_dropout[role] for m in lm.modules() if isinstance(m, LoraLayer) and role in m.lora_dropout]


@contextmanager
def default_role(backbone: nn.Module, role: str) -> Iterator[None]:
    """Give ``role`` to every call of the base model in this block.

    For ``generate``, which lets no keyword of ours through. There is no gradient and so no recompute to confuse.
    """

    def add_keyword(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "clara_role": role}

    handle = backbone.register_forward_pre_hook(add_keyword, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _follow_role_keyword(lm: nn.Module) -> None:
    for layer in _decoder_layers(lm):
        attention = _attention_of(layer)
        if attention is None:
            raise ValueError(f"{type(layer).__name__} passes no keywords to attention, which clara_fast's roles need")
        adapters = [module for module in layer.modules() if isinstance(module, LoraLayer)]
        attention.register_forward_pre_hook(_RoleSwitch(adapters), with_kwargs=True)


class _RoleSwitch:
    """Pre-hook of an attention module. It runs inside the layer's ``forward``, hence in every recompute of it."""

    def __init__(self, adapters: Sequence[LoraLayer]) -> None:
        self.adapters = adapters

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        role = kwargs.pop("clara_role", NO_ROLE)
        for adapter in self.adapters:
            # Not set_adapter(): that would change requires_grad. An unknown name means the bare base layer.
            if adapter._active_adapter != role:
                adapter._active_adapter = role
        return args, kwargs


def _decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the longest ModuleList whose blocks hold an attention module."""
    lists = [list(m) for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [layers for layers in lists if _attention_of(layers[0]) is not None]
    if not lists:
        raise ValueError(f"{type(lm).__name__} has no stack of decoder layers with attention that clara_fast knows")
    return max(lists, key=len)


def _attention_of(layer: nn.Module) -> nn.Module | None:
    """The layer's attention module, if there is one that takes keywords."""
    for name, child in layer.named_children():
        if "attn" in name or "attention" in name:
            accepts = inspect.signature(child.forward).parameters.values()
            if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts):
                return child
    return None


def run_backbone(backbone: nn.Module, role: str, layout: Any, embeds: Tensor, position_ids: Tensor) -> Tensor:
    """Final hidden states (after the last norm) ``[T, D]`` of packed embeddings ``[T, D]`` under ``role``."""
    from clara_fast.modeling.attention import packed_mask

    output = backbone(
        inputs_embeds=embeds.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        attention_mask=packed_mask(embeds),
        use_cache=False,
        clara_role=role,
        clara_layout=layout,
    )
    return output.last_hidden_state[0]

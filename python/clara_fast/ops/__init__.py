"""The fused operators: each is a Python function and an ordinary ``torch.ops.clara_fast.*`` operator."""

from clara_fast.ops._warmup import warmup
from clara_fast.ops.compressed_context_attention import compressed_context_attention
from clara_fast.ops.cosine_topk import cosine_topk
from clara_fast.ops.layout import ContextLayout
from clara_fast.ops.pool_memory import pool_memory
from clara_fast.ops.select_memory import select_memory

__all__ = ["ContextLayout", "compressed_context_attention", "cosine_topk", "pool_memory", "select_memory", "warmup"]

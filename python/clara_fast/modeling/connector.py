"""A linear map from final hidden states to the space of input embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Connector(nn.Linear):
    """``memory [.., D] -> [.., D]``, the identity until :meth:`calibrate` is called.

    Final hidden states are several times larger than input embeddings and share a large mean. Centring and scaling
    them makes memories readable for the generator before any training. The reference has no such layer.
    """

    def __init__(self, hidden_size: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, hidden_size, device=device, dtype=dtype)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, memory: Tensor) -> Tensor:
        return super().forward(memory.to(self.weight.dtype)).to(memory.dtype)

    @torch.no_grad()
    def calibrate(self, memory: Tensor, embeddings: Tensor) -> None:
        """Centre ``memory [n, D]``, scale it to the spread of ``embeddings [V, D]`` and move it to their mean."""
        memory, embeddings = memory.double(), embeddings.double()
        centre, target = memory.mean(0), embeddings.mean(0)
        scale = (embeddings - target).pow(2).mean().sqrt() / (memory - centre).pow(2).mean().sqrt().clamp_min(1e-12)
        self.weight.copy_(torch.eye(len(centre), dtype=torch.float64, device=memory.device) * scale)
        self.bias.copy_(target - scale * centre)

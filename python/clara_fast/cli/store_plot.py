"""A picture of a store: how long its memories are, and how alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from clara_fast.store import MemoryStore

SAMPLE = 1000
FORMATS = (".png", ".svg", ".pdf")


def require_plot(path: Path) -> None:
    """Say before any work that the picture cannot be drawn.

    Raises:
        ValueError: the name ends in no known format.
        ImportError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture's name ({path.name}) must end in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("the picture needs matplotlib: pip install 'clara-fast[bench]'") from None


def measure(store: MemoryStore) -> dict[str, Tensor]:
    """Of up to ``SAMPLE`` documents spread over the store: token norms, cosines of documents, and within them.

    Returns:
        ``norms [n, m]``, ``documents``: cosines of different documents, ``tokens``: of different tokens of one.
    """
    import torch
    import torch.nn.functional as F

    count = min(SAMPLE, len(store))
    rows = torch.linspace(0, len(store) - 1, count).round().to(torch.int64)
    memory = store.memory(rows).float()
    flat, tokens = F.normalize(memory.flatten(1), dim=1), F.normalize(memory, dim=2)
    n, m = memory.shape[:2]
    apart = flat @ flat.T
    within = tokens @ tokens.transpose(1, 2)
    return {
        "norms": memory.norm(dim=2),
        "documents": apart[torch.ones(n, n, dtype=torch.bool).triu(1)],
        "tokens": within[torch.ones(m, m, dtype=torch.bool).triu(1).expand(n, m, m)],
    }


def summary(measured: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean, least and largest of each; what has no pair is left out."""
    words = {"norms": "memory_token_norms", "documents": "cosines_of_documents", "tokens": "cosines_of_tokens"}
    return {
        words[name]: {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}
        for name, values in measured.items()
        if values.numel()
    }


def draw(store: MemoryStore, measured: dict[str, Tensor], path: Path) -> None:
    """Three panels: norms by memory token, cosines between documents, cosines between the tokens of one document."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    norms, apart, within = figure.subplots(1, 3)
    stats = store.stats()
    figure.suptitle(
        f"{store.path.name}: {len(store)} documents, {stats['num_memory']} x {stats['hidden_size']} {stats['dtype']}"
    )
    values = measured["norms"]
    place = range(values.shape[1])
    low, middle, high = (values.quantile(q, dim=0).numpy() for q in (0.05, 0.5, 0.95))
    norms.fill_between(place, low, high, alpha=0.25, label="5 to 95 % of documents")
    norms.plot(place, middle, marker="o", ms=3, label="median")
    norms.set(title="norms of memory tokens", xlabel="memory token", ylabel="norm", ylim=(0, None))
    norms.legend(frameon=False)
    _histogram(apart, measured["documents"], "cosines of different documents")
    _histogram(within, measured["tokens"], "cosines of the tokens of one document")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _histogram(axes: Any, values: Tensor, title: str) -> None:
    if values.numel():
        axes.hist(values.numpy(), bins=80)
    else:
        axes.text(0.5, 0.5, "no pair", ha="center", transform=axes.transAxes)
    axes.set(title=title, xlabel="cosine", ylabel="pairs")

"""An explanation as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clara_fast.modeling.explaining import Explanation

FORMATS = (".png", ".svg", ".pdf")
IN_QUESTION, ADDED, FOUND = "#dddddd", "#f6c28b", "#8fc98f"


def draw(explanation: Explanation, file: Path) -> None:
    """See :meth:`clara_fast.modeling.explaining.Explanation.draw`."""
    if file.suffix not in FORMATS:
        raise ValueError(f"the picture's name ({file.name}) must end in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the picture needs matplotlib: pip install 'clara-fast[eval]'") from None
    candidates = explanation.candidates
    width = max(len(slot) for slot in explanation.slots)
    height = 1.5 + 0.28 * max(len(explanation.slots), len(candidates), 6)
    figure = Figure(figsize=(2 + 1.5 * width + (7 if candidates else 0), height), layout="constrained")
    figure.suptitle(_safe(explanation.question))
    if candidates:
        lens, scores = figure.subplots(1, 2, width_ratios=[2 + 1.5 * width, 7])
        _draw_gradient(scores, explanation)
    else:
        lens = figure.subplots()
    _draw_lens(lens, explanation, width)
    figure.savefig(file, dpi=120)


def _draw_lens(axes: Any, explanation: Explanation, width: int) -> None:
    from matplotlib.patches import Patch, Rectangle

    for y, slot in enumerate(explanation.slots):
        for x, token in enumerate(slot):
            colour = IN_QUESTION if token.in_question else FOUND if token.in_documents else ADDED
            alpha = 0.25 + 0.75 * min(1.0, token.probability)
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, alpha=alpha, edgecolor="white"))
            text = _safe(f"{token.text or '␣'}  {token.probability:.2f}")
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, width), ylim=(len(explanation.slots), 0), xticks=[], ylabel="memory slot")
    axes.set_yticks([y + 0.5 for y in range(len(explanation.slots))], range(len(explanation.slots)), fontsize=7)
    names = {"in the question": IN_QUESTION, "new, in a retrieved document": FOUND, "new": ADDED}
    handles = [Patch(facecolor=colour, label=name) for name, colour in names.items()]
    axes.legend(handles=handles, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _draw_gradient(axes: Any, explanation: Explanation) -> None:
    shown = explanation.candidates
    places = range(len(shown))
    # A training step goes against the gradient: to the right means raised.
    colours = ["tab:green" if one.raised else "tab:red" for one in shown]
    axes.barh(places, [-one.gradient for one in shown], color=colours)
    names = [_safe(f"{'▸ ' if one.selected else ''}{(one.document.title or one.document.text)[:40]}") for one in shown]
    axes.set_yticks(places, [" ".join(name.split()) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes.set_xlabel(f"minus gradient of the loss of {_safe(explanation.answer or '')!r} in the cosine (▸ read)")


def _safe(text: str) -> str:
    """No formulas: dollar signs in questions are only dollar signs."""
    return text.replace("$", r"\$")

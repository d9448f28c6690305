"""The roofline picture: what each case computes per byte, how fast, and under which ceilings of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clara_fast.benchmarks.harness import OURS, Result
from clara_fast.benchmarks.report import Report

FORMATS = (".png", ".svg")
COLUMNS = 2
INK, MUTED = "#222222", "#8a8a8a"
OUR_COLOUR, PEER_COLOUR = "#1f5fa8", "#c2571a"
CEILINGS = {"read": "#5b8f5b", "copy": "#8fb58f", "float32": "#8d79b8", "bfloat16": "#5b4794"}
# Where a number may stand beside its point, in points of type: right, left, then farther away.
OFFSETS = [(7, 0), (-7, 0), (7, 8), (7, -8), (-7, 8), (-7, -8), (16, 0), (-16, 0), (16, 9), (16, -9), (-16, 9),
           (-16, -9), (25, 0), (-25, 0), (25, 9), (25, -9), (-25, 9), (-25, -9)]  # fmt: skip


class NoPicture(RuntimeError):
    """The picture cannot be drawn, and why."""


def require(path: Path) -> None:
    """Say before the benchmarks run, not after, that their picture cannot be drawn.

    Raises:
        NoPicture: matplotlib is missing.
        ValueError: the name ends in no known format.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture's name ({path.name}) must end in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise NoPicture("the picture needs matplotlib: pip install 'clara-fast[bench]'") from error


def draw(report: Report, path: Path) -> None:
    """One panel for each operator whose floor is known; ours filled, the best peer hollow below or above it.

    Raises:
        NoPicture: matplotlib is missing, or there is nothing to draw.
    """
    require(path)
    from matplotlib.figure import Figure

    shown = [result for result in report.results if result.floor is not None and result.measured]
    works = list(dict.fromkeys(result.work for result in shown))
    if not works:
        raise NoPicture("no case here has bytes and operations to draw")
    columns = min(COLUMNS, len(works))
    rows = -(-len(works) // columns)
    figure = Figure(figsize=(9.9 * columns, 5.6 * rows + 1.0), facecolor="white")
    grid = figure.add_gridspec(
        rows, 2 * columns, width_ratios=[5.0, 4.9] * columns, left=0.042, right=0.99, top=1 - 1.1 / (5.6 * rows + 1),
        bottom=0.55 / (5.6 * rows + 1), wspace=0.04, hspace=0.22,
    )  # fmt: skip
    panels = []
    for i, work in enumerate(works):
        axes = figure.add_subplot(grid[i // columns, 2 * (i % columns)])
        key = figure.add_subplot(grid[i // columns, 2 * (i % columns) + 1])
        panels.append((axes, _panel(axes, key, report, work, [result for result in shown if result.work == work])))
    _head(figure, report)
    figure.canvas.draw()
    for axes, points in panels:
        _number(axes, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _head(figure: Any, report: Report) -> None:
    facts = report.facts
    machine = facts.get("gpu") or facts["cpu"]
    where = (
        machine
        if "gpu" in facts
        else f"{machine}, {facts['capability']}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    )
    height = figure.get_figheight()
    figure.text(
        0.04, 1 - 0.28 / height, "clara_fast under the roofline", size=17, weight="bold", color=INK, va="center"
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    quick = "  QUICK RUN: tiny sizes, the figures mean nothing" if facts.get("quick") else ""
    figure.text(0.04, 1 - 0.58 / height, f"{where}; {versions}; {facts['time'][:10]}{quick}", size=10, color=MUTED,
                va="center")  # fmt: skip
    for x, face, edge, text in (
        (0.72, OUR_COLOUR, OUR_COLOUR, "clara_fast"),
        (0.82, "white", PEER_COLOUR, "best peer, on the same work"),
    ):
        from matplotlib.lines import Line2D

        y = 1 - 0.3 / height
        figure.add_artist(Line2D([x], [y], marker="o", ms=8, mfc=face, mec=edge, mew=1.6, ls=""))
        figure.text(x + 0.008, y, text, size=11, color=INK, va="center")


def _panel(axes: Any, key: Any, report: Report, work: str, results: list[Result]) -> list[tuple[str, float, float]]:
    """Points, ceilings and the key of one operator; returns number and place of each point, "" for a peer's."""
    points, lines = [], []
    for number, result in enumerate(results, 1):
        floor = result.floor
        assert floor is not None
        x, y = floor.flops / floor.bytes, floor.flops / result.value(OURS)
        peer = result.best_peer()
        lines.append((number, result.case, f"{_times(result.ratio(peer))} {peer}" if peer else "no peer"))
        if peer:
            y_peer = floor.flops / result.value(peer)
            axes.plot([x, x], [y_peer, y], color=MUTED, lw=0.9, zorder=2)
            axes.plot([x], [y_peer], "o", ms=6.5, mfc="white", mec=PEER_COLOUR, mew=1.5, zorder=3)
            points.append(("", x, y_peer))
        axes.plot([x], [y], "o", ms=7.5, mfc=OUR_COLOUR, mec="white", mew=0.8, zorder=4)
        points.append((str(number), x, y))
    xs, heights = [x for _, x, _ in points], [y for _, _, y in points]
    ceilings = report.ceilings
    left, right = min(xs) / 4, max(xs) * 8
    roof = max(min(ceilings.read * right, max(ceilings.matmul.values())), max(heights))
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(heights) / 4, roof * 3))
    _roofs(axes, report, left, right)
    axes.set_title(work, loc="left", size=13, weight="bold", color=INK)
    axes.set_xlabel("operations per byte that must move (FLOP/B)", size=9.5, color=INK)
    axes.set_ylabel("FLOP/s", size=9.5, color=INK, labelpad=1)
    axes.grid(True, which="major", color="#ececec", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _key(key, lines)
    return points


def _roofs(axes: Any, report: Report, left: float, right: float) -> None:
    ceilings = report.ceilings
    matmul = max(ceilings.matmul.values())
    bottom, top = axes.get_ylim()
    axes.figure.canvas.draw()  # fixes the transform that gives slopes their angle
    for kind, rate in (("read", ceilings.read), ("copy", ceilings.copy)):
        end = min(right, matmul / rate)
        if end <= left:
            continue
        axes.plot([left, end], [left * rate, end * rate], color=CEILINGS[kind], lw=1.6, zorder=1)
    # One label for the two slopes, which lie close together: at the left, above the higher one.
    steeper = max(ceilings.read, ceilings.copy)
    x = max(left * 1.25, bottom / steeper * 1.6)
    if x < min(right, matmul / steeper):
        (x0, y0), (x1, y1) = axes.transData.transform([(x, x * steeper), (2 * x, 2 * x * steeper)])
        from math import atan2, degrees

        text = f"read {ceilings.read / 1e9:.3g} GB/s, copy {ceilings.copy / 1e9:.3g} GB/s"
        axes.annotate(text, (x, x * steeper), (0, 5), textcoords="offset points", size=8.5, color=CEILINGS["read"],
                      rotation=degrees(atan2(y1 - y0, x1 - x0)), rotation_mode="anchor", va="bottom")  # fmt: skip
    for dtype, rate in ceilings.matmul.items():
        if not bottom < rate < top:
            continue
        start = max(left, rate / max(ceilings.read, ceilings.copy))
        if start >= right:
            continue
        axes.plot([start, right], [rate, rate], color=CEILINGS[dtype], lw=1.6, zorder=1)
        axes.annotate(f"{dtype} matmul {_flops(rate)}", (right, rate), (-4, 4), textcoords="offset points", size=8.5,
                      ha="right", color=CEILINGS[dtype])  # fmt: skip


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _key(axes: Any, lines: list[tuple[int, str, str]]) -> None:
    """Number, case and ratio, two lines each; as many columns of type as the height asks for."""
    axes.axis("off")
    step = min(0.075, 1.0 / max(len(lines), 1))
    size = 9 if len(lines) <= 14 else 9 * 14 / len(lines) + 0.6
    for i, (number, case, ratio) in enumerate(lines):
        y = 1 - i * step
        axes.text(0.02, y, str(number), size=size, weight="bold", color=OUR_COLOUR, va="top", ha="left")
        axes.text(0.085, y, case, size=size, color=INK, va="top")
        axes.text(0.085, y - 0.48 * step, ratio, size=size, color=PEER_COLOUR, va="top")


def _number(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Numbers beside the points, each where it covers no point and no other number."""
    scale = axes.figure.dpi / 72
    places = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [(px, py, 5.0 * scale, 5.0 * scale) for px, py in places]
    for (number, x, y), (px, py) in zip(points, places, strict=True):
        if not number:
            continue
        half_width, half_height = (3.0 * len(number) + 1) * scale, 4.5 * scale

        def free(
            offset: tuple[int, int], px: float = px, py: float = py, w: float = half_width, h: float = half_height
        ):
            cx, cy = px + offset[0] * scale, py + offset[1] * scale
            return all(abs(cx - tx) >= w + tw or abs(cy - ty) >= h + th for tx, ty, tw, th in taken)

        offset = next(filter(free, _widened(OFFSETS, len(number))), OFFSETS[0])
        taken.append((px + offset[0] * scale, py + offset[1] * scale, half_width, half_height))
        axes.annotate(number, (x, y), offset, textcoords="offset points", size=8.5, weight="bold", color=OUR_COLOUR,
                      ha="center", va="center", zorder=5)  # fmt: skip


def _widened(offsets: list[tuple[int, int]], digits: int) -> list[tuple[int, int]]:
    """A number of two digits stands a little farther off."""
    return [(x + (3 if x > 0 else -3) * digits, y) for x, y in offsets]

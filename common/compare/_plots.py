"""Quality against cost as inline SVG: text stays text, colours follow the page, nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.compare.statistics import pareto_front

# Stand-ins that are replaced in the finished SVG, so that the page decides the colours in light and dark.
_COLOURS = {"#010203": "currentColor", "#040506": "var(--accent)", "#070809": "var(--line)", "#0a0b0c": "var(--page)"}
_INK, _ACCENT, _LINE, _PAGE = _COLOURS
_SIZE = (4.7, 3.7)  # inches; small, so that text stays readable when a phone shrinks the picture
_LABEL_HEIGHT = 13.0  # points between two labels
# Lines of methods differ by their dashes: colours are the page's.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)), (0, (8, 2, 1, 2, 1, 2)))
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "graft",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method in a plot.

    Attributes:
        name: Its label.
        cost: Where it stands from left to right; above 0.
        quality: Where it stands from bottom to top.
        reach: Lower and upper end of its error bar; None for none.
    """

    name: str
    cost: float
    quality: float
    reach: tuple[float, float] | None


def front(points: Sequence[Point], *, more_is_better: bool) -> list[Point]:
    """The points that no other point beats; see `pareto_front`.

    Args:
        points: All points.
        more_is_better: Whether higher quality is better.

    Returns:
        The front, from cheap to dear.
    """
    places = pareto_front([(point.cost, point.quality) for point in points], more_is_better=more_is_better)
    return [points[place] for place in places]


def pareto_svg(
    points: Sequence[Point],
    *,
    levels: Sequence[tuple[str, float]] = (),
    ident: str,
    title: str,
    cost_label: str,
    quality_label: str,
    more_is_better: bool,
) -> str:
    """Draw quality against cost, both as measured, with the Pareto front marked.

    Args:
        points: One for each method, at least one.
        levels: Name and quality of what has no such cost, each a line across.
        ident: A prefix for ids, unique within the page.
        title: What a screen reader says first.
        cost_label: The axis of cost, which is logarithmic.
        quality_label: The axis of quality.
        more_is_better: Whether higher quality is better.

    Returns:
        An `<svg>` element for an HTML page.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    best = front(points, more_is_better=more_is_better)
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure: Any = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(xlabel=cost_label, ylabel=quality_label)
        _draw(axes, points, best, levels)
        figure.draw_without_rendering()  # settles the layout, which labels are placed by
        edge = axes.get_xlim()[0]
        anchors = [Point(name=name, cost=edge, quality=height, reach=None) for name, height in levels]
        _label(axes, [*points, *anchors])
        figure.savefig(buffer, format="svg", transparent=True)
    told = _described(points, best, levels, cost_label, quality_label)
    return _inline(buffer.getvalue(), ident, title, told)


def curves_svg(
    curves: Mapping[str, Sequence[Point]], *, ident: str, title: str, cost_label: str, quality_label: str
) -> str:
    """Draw quality against an amount, a line for each method.

    Args:
        curves: By method its points, from few to much.
        ident: A prefix for ids, unique within the page.
        title: What a screen reader says first.
        cost_label: The axis of the amount, which is logarithmic.
        quality_label: The axis of quality.

    Returns:
        An `<svg>` element for an HTML page.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = [point for own in curves.values() for point in own]
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure: Any = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(xlabel=cost_label, ylabel=quality_label)
        _draw(axes, points, [], [])
        for place, own in enumerate(curves.values()):
            dashes = _DASHES[place % len(_DASHES)]
            costs, heights = [point.cost for point in own], [point.quality for point in own]
            axes.plot(costs, heights, color=_ACCENT, linewidth=1.2, linestyle=dashes)
        figure.draw_without_rendering()
        _label(axes, [max(own, key=lambda point: point.cost) for own in curves.values()])
        figure.savefig(buffer, format="svg", transparent=True)
    told = "; ".join(
        f"{name}: {', '.join(f'{p.quality:.3f} at {_tick(p.cost)}' for p in own)}" for name, own in curves.items()
    )
    return _inline(buffer.getvalue(), ident, title, f"{quality_label} by {cost_label}. {told}.")


def _draw(
    axes: Any,  # noqa: ANN401 (matplotlib is half typed)
    points: Sequence[Point],
    best: Sequence[Point],
    levels: Sequence[tuple[str, float]],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set(**_limits(points, [height for _, height in levels]))
    low, high = axes.get_xlim()
    # Few decades would have one tick or none at powers of ten alone.
    steps = (1.0,) if high / low > 1e3 else (1.0, 3.0) if high / low > 30 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    for _, height in levels:
        axes.axhline(height, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)))
    # A staircase: between two points of the front nothing was measured.
    if best:
        line = {"color": _ACCENT, "linewidth": 1.2, "linestyle": (0, (4, 3)), "drawstyle": "steps-post"}
        axes.plot([point.cost for point in best], [point.quality for point in best], **line)
    dot = {"fmt": "o", "markersize": 7, "color": _ACCENT, "elinewidth": 1.2, "markeredgewidth": 1.6}
    for point in points:
        low, high = point.reach or (point.quality, point.quality)
        # Percentiles need not enclose the mean, and a bar cannot point inwards.
        bar = None if point.reach is None else [[max(0.0, point.quality - low)], [max(0.0, high - point.quality)]]
        filling = _ACCENT if point in best else _PAGE
        axes.errorbar([point.cost], [point.quality], yerr=bar, markerfacecolor=filling, **dot)


def _limits(points: Sequence[Point], heights: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Leave room around the points and the lines at some heights, to the right more for the points' labels.

    The axes never zoom in below two thirds of a decade of cost and five percent of quality: differences that are small
    shall look small.
    """
    costs = [math.log10(point.cost) for point in points]
    lows = [min(point.quality, *(point.reach or ())) if point.reach else point.quality for point in points] + [*heights]
    highs = [max(point.quality, *(point.reach or ())) if point.reach else point.quality for point in points] + [
        *heights
    ]
    left, width = _stretch(min(costs), max(costs), 0.67)
    bottom, height = _stretch(min(lows), max(highs), 0.05 * max(map(abs, (*lows, *highs))) or 0.05)
    return {
        "xlim": (10 ** (left - 0.12 * width), 10 ** (left + 1.38 * width)),
        "ylim": (bottom - 0.12 * height, bottom + 1.12 * height),
    }


def _stretch(low: float, high: float, least: float) -> tuple[float, float]:
    """Return start and length of a range, widened about its middle to a least length."""
    length = max(high - low, least)
    return (low + high - length) / 2, length


def _tick(value: float, _: int | None = None) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:g}"


def _label(axes: Any, points: Sequence[Point]) -> None:  # noqa: ANN401
    """Write each name above and to the right of its point, higher where it would cover the name below."""
    scale = 72.0 / axes.figure.dpi
    placed: list[tuple[float, float, float]] = []  # left, right, height of labels, in points
    for point in sorted(points, key=lambda p: p.quality):
        x, y = (float(v) * scale for v in axes.transData.transform((point.cost, point.quality)))
        right, height = x + 8 + 6.0 * len(point.name), y + 8
        while any(x < r and left < right and abs(height - h) < _LABEL_HEIGHT for left, r, h in placed):
            height += 1.0
        placed.append((x, right, height))
        axes.annotate(point.name, (point.cost, point.quality), (8, height - y), textcoords="offset points", va="center")


def _described(
    points: Sequence[Point],
    best: Sequence[Point],
    levels: Sequence[tuple[str, float]],
    cost_label: str,
    quality_label: str,
) -> str:
    told = "; ".join(f"{p.name}: {quality_label} {p.quality:.3f}, {cost_label} {_tick(p.cost)}" for p in points)
    untrained = "; ".join(f"{name}: {quality_label} {height:.3f}, not trained" for name, height in levels)
    lines = f" Lines across: {untrained}." if untrained else ""
    return f"{told}. On the Pareto front: {', '.join(point.name for point in best)}.{lines}"


def _inline(svg: str, ident: str, title: str, description: str) -> str:
    """Make a stand-alone SVG part of a page: no header, no metadata, ids of its own, a name for screen readers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"\bid=\"", f'id="{ident}-', body)
    body = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{ident}-", body)
    for stand_in, colour in _COLOURS.items():
        body = body.replace(stand_in, colour)
    view = re.search(r'viewBox="[^"]*"', body)
    opening: dict[str, Any] = {
        "view": view[0] if view else "",
        "title": html.escape(title),
        "description": html.escape(description),
    }
    head = (
        '<svg {view} role="img" aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{title}</title>'
        '<desc id="{ident}-d">{description}</desc>'
    ).format(ident=ident, **opening)
    return head + body[body.index(">") + 1 :]

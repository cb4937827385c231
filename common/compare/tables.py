"""The results as tables: for a terminal and a README (Markdown). Quality never without cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.compare.evidence import ALPHA, Block, Comparison, Standing, Tested
from common.compare.examples import FEWEST
from common.compare.integrity import Finding
from common.compare.results import Row, Spread
from common.compare.worst import Worst

NOTHING = "–"  # noqa: RUF001 (an en dash, as tables print it)
WORST = (
    "Worst class: the lowest recall of a class (in segmentation, the lowest Dice) of each seed's run; in brackets the "
    "class that is lowest on average, and how many test examples it has. With few examples it is low by chance."
)
WORST_GROUP = (
    "Worst group: the worst result of a group of test examples (what the data calls speaker, subject or group) of each "
    f"seed's run, by the metric that decides, of groups with at least {FEWEST} examples; in brackets the group that is "
    "worst on average, and how many examples it has. With few examples, or many groups, it is bad by chance."
)
_PLAIN_WIDTH = 170


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table for people.

    Attributes:
        title: The heading.
        text: What a cell says.
        value: What a cell is sorted by; None stands last.
        words: Whether the cells are words, set to the left.
    """

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | str | None]
    words: bool = False


def quality(spread: Spread | None) -> str:
    """Write a metric with its spread, as `0.712 ± 0.011`."""
    if spread is None:
        return NOTHING
    return f"{spread.mean:.3f}" if spread.std is None else f"{spread.mean:.3f} ± {spread.std:.3f}"


def amount(value: float | None, unit: str = "") -> str:
    """Write a count or a size in thousands, millions and so on, as `22.1 M` or `88.2 MB`."""
    if value is None:
        return NOTHING
    steps = ["", "k", "M", "G", "T", "P"]
    while abs(value) >= 999.5 and len(steps) > 1:
        value, steps = value / 1000, steps[1:]
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1
    return f"{value:.{digits}f} {steps[0]}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Write a time, as `0.41 s`, `61 s` or `1 h 05 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 600:
        return f"{seconds:.3g} s" if seconds < 99.5 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: float | None) -> str:
    """Write a percentage with two significant digits, as `0.68 %`."""
    return NOTHING if value is None else f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def share(gap: float | None) -> str:
    """Write a relative gap as a signed percentage, as `-1.4 %`."""
    return NOTHING if gap is None else f"{100 * gap:+.1f} %"


def judged(tested: Tested | None) -> str:
    """Say whether two methods are told apart, as `p 0.003` or `not told apart`."""
    if tested is None:
        return "spread unknown"
    if not tested.apart:
        return "not told apart"
    return f"p {tested.p:.2g}" if tested.p >= 1e-4 else "p < 0.0001"


def columns(rows: Sequence[Row], comparison: Comparison | None, *, every_metric: bool) -> list[Column]:
    """The columns for people: method, test quality, cost.

    Args:
        rows: The rows of one recipe.
        comparison: What the tests say of them.
        every_metric: Whether intervals, full fine-tuning as the reference and test metrics beside the primary one have
            columns too (the loss never has).

    Returns:
        The columns, in order.
    """
    primary = next((row.primary for row in rows if row.primary), "")
    others = dict.fromkeys(name for row in rows for name in row.test if name not in (primary, "loss"))
    metrics = [name for name in (primary, *(others if every_metric else ())) if name]
    return [
        Column(title="Method", text=lambda row: row.method, value=lambda row: row.method, words=True),
        *(_metric(name) for name in metrics[:1]),
        *(_tests(comparison, every=every_metric) if comparison else ()),
        *([_worst("class")] if every_metric and any(row.worst for row in rows) else []),
        *([_worst("group")] if every_metric and any(row.worst_group for row in rows) else []),
        *(_metric(name) for name in metrics[1:]),
        Column(title="Seeds", text=lambda row: str(len(row.seeds)), value=lambda row: len(row.seeds)),
        Column(title="Val", text=lambda row: quality(row.val), value=lambda row: row.val.mean if row.val else None),
        Column(title="lr", text=lambda row: f"{row.lr:g}" if row.lr else NOTHING, value=lambda row: row.lr),
        *([_decay()] if any(row.decays for row in rows) else []),
        _cost("Trainable", "params_trainable", amount),
        _cost("%", "trainable_percent", percent),
        _cost("Train memory", "memory_total", lambda value: amount(value, "B")),
        _cost("FLOPs/step", "flops_per_step", amount),
        _cost("Step", "step_seconds", duration),
        _cost("Fit", "fit_seconds", duration),
        *([_prepared()] if any(row.starts for row in rows) else []),
        _cost("Adapter", "adapter_bytes", lambda value: amount(value, "B")),
        *([_failures()] if any(row.failed for row in rows) else []),
    ]


def print_table(title: str, blocks: Sequence[Block], console: Console) -> None:
    """Print one table for each recipe."""
    if not console.is_terminal:  # a log file has no width of its own; 80 columns would cut the table
        console = Console(file=console.file, width=_PLAIN_WIDTH)
    for block in blocks:
        shown = columns(block.rows, block.comparison, every_metric=False)
        heading = escape(f"{_title(title, block)} ({_name(block)})")
        table = Table(title=heading, title_justify="left", title_style="bold")
        for column in shown:
            table.add_column(column.title, justify="left" if column.words else "right")
        for row in block.rows:
            table.add_row(*(column.text(row) for column in shown))
        console.print(table)


def write_markdown(
    title: str, blocks: Sequence[Block], standing: Standing | None, findings: Sequence[Finding], path: Path
) -> None:
    """Write one Markdown table for each recipe, fit for a README, one over all of them, and what checks found."""
    parts: list[str] = []
    for block in blocks:
        shown = columns(block.rows, block.comparison, every_metric=True)
        lines = [
            f"**{_title(title, block)}** ({_name(block, '`')})",
            "",
            _line([column.title for column in shown]),
            _line("---" if column.words else "---:" for column in shown),
            *(_line(column.text(row) for column in shown) for row in block.rows),
        ]
        parts.append("\n".join(lines))
    if standing:
        parts.append("\n".join(_standing(blocks, standing)))
    parts.append(_note(blocks))
    for broken, words in ((True, "Not to be believed as it stands"), (False, "To be known")):
        lines = [f"- {finding.text}" for finding in findings if finding.broken == broken]
        parts += ["\n".join([f"**{words}**", "", *lines])] if lines else []
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _note(blocks: Sequence[Block]) -> str:
    note = (
        "Test metrics: mean ± sample standard deviation over the seeds (none for a single seed); learning rates (and "
        "weight decays, where a method has any to choose from) were chosen on the validation split. Val is the primary "
        "metric there. Times: the median of the seeds. Memory: weights, gradients, optimizer state and saved "
        "activations of a training step."
    )
    rows = [row for block in blocks for row in block.rows]
    compared = [block.comparison for block in blocks if block.comparison]
    over = dict.fromkeys(one.over for found in compared for one in found.intervals.values())
    if over:
        note += (
            f" Intervals: 95 %, bootstrap over {_listed(list(over))}. Two methods are told apart where a test paired "
            f"in the same way gives p < {ALPHA} after Holm's correction for all comparisons with the same method."
        )
    note += "".join(f" {line}" for line in worst_notes(rows))
    note += "".join(f" {line}" for line in preparing(rows))
    untrained = list(dict.fromkeys(row.method for row in rows if row.baseline))
    if untrained:
        note += f" Not trained, and so without costs of training: {', '.join(untrained)}; their Fit is all their time."
    return note


def worst_notes(rows: Sequence[Row]) -> list[str]:
    """Explain the columns of worst classes and groups, where there are any."""
    told = ((WORST, any(row.worst for row in rows)), (WORST_GROUP, any(row.worst_group for row in rows)))
    return [words for words, there in told if there]


def preparing(rows: Sequence[Row]) -> list[str]:
    """Say what was trained before the trials, from what, and at which cost; a line for each."""
    lines: list[str] = []
    for one in {start.preparation: start for row in rows for start in row.starts}.values():
        made, seen = one.preparation, one.metrics
        own = [row.method for row in rows if any(start.preparation == made for start in row.starts)]
        users = list(dict.fromkeys(own))
        if seen is None:
            lines.append(f"Prepared '{made.name}' ({made.method}, {made.recipe}) failed.")
            continue
        size = seen.data.get("train")
        told = f"{size:,} training examples of {seen.data.get('name', '')}" if isinstance(size, int) else ""
        score = "" if seen.score is None else f"validation {seen.primary.replace('_', ' ')} {seen.score:.3f}"
        costs = f"{amount(one.cost('params_trainable'))} trained parameters, {duration(one.cost('fit_seconds'))}"
        facts = ", ".join(part for part in (f"{made.method} by {made.recipe}", told, score, costs) if part)
        lines.append(
            f"Prepared '{made.name}': {facts}. {_listed(users)} {'start' if users[1:] else 'starts'} from it. It was "
            f"trained once, with seed {made.seed}, whatever their seeds; neither its spread nor its cost is in theirs."
        )
    return lines


def _standing(blocks: Sequence[Block], standing: Standing) -> list[str]:
    """Lines of a table of methods by recipes: relative gaps to full fine-tuning, and average ranks."""
    ranks = standing.ranking.ranks if standing.ranking else {}
    names = [*ranks, *(name for name in standing.gaps if name not in ranks)]
    labels = [block.label for block in blocks]
    lines = [
        "**Over all of them**: gap to full fine-tuning, relative (above 0 is better)",
        "",
        _line(["Method", "Average rank", *labels]),
        _line(["---", *("---:" for _ in range(len(labels) + 1))]),
    ]
    for name in names:
        rank = f"{ranks[name]:.2f}" if name in ranks else NOTHING
        lines.append(_line([name, rank, *(share(standing.gaps.get(name, {}).get(label)) for label in labels)]))
    if standing.ranking and standing.ranking.p is not None and standing.ranking.critical is not None:
        lines += ["", ranked(standing)]
    return lines


def ranked(standing: Standing) -> str:
    """Say what the ranks prove."""
    ranking = standing.ranking
    if ranking is None or ranking.p is None or ranking.critical is None:
        return ""
    return (
        f"Ranks over {ranking.sets} sets: Friedman's test that all methods are alike gives p = {ranking.p:.2g}; "
        f"average ranks less than {ranking.critical:.2f} apart are not told apart (Nemenyi, 5 %)."
    )


def _tests(comparison: Comparison, *, every: bool) -> list[Column]:
    """The columns of what the tests say."""

    def bounds(row: Row) -> str:
        found = comparison.intervals.get(row.method)
        return f"{found.low:.3f} to {found.high:.3f}" if found else NOTHING

    def against(row: Row, other: str, tests: Mapping[str, Tested], word: str) -> str:
        if row.method not in comparison.means or not other:
            return NOTHING
        return word if row.method == other else judged(tests.get(row.method))

    def to_best(row: Row) -> str:
        return against(row, comparison.best, comparison.to_best, "best")

    def to_full(row: Row) -> str:
        told = against(row, comparison.full, comparison.to_full, "the reference")
        gap = comparison.gaps.get(row.method)
        return told if gap is None else f"{share(gap)}, {told}"

    def low(row: Row) -> float | None:
        found = comparison.intervals.get(row.method)
        return found.low if found else None

    best = Column(title="Against the best", text=to_best, value=to_best, words=True)
    if not every:
        return [best]
    full = Column(title="Against full", text=to_full, value=lambda row: comparison.gaps.get(row.method), words=True)
    return [Column(title="95 % interval", text=bounds, value=low), best, *([full] if comparison.full else [])]


def _metric(name: str) -> Column:
    def value(row: Row) -> float | None:
        return row.test[name].mean if name in row.test else None

    return Column(title=name.replace("_", " "), text=lambda row: quality(row.test.get(name)), value=value)


def _cost(title: str, key: str, write: Callable[[float | None], str]) -> Column:
    return Column(title=title, text=lambda row: write(row.cost.get(key)), value=lambda row: row.cost.get(key))


def _worst(kind: Literal["class", "group"]) -> Column:
    def of(row: Row) -> Worst | None:
        return row.worst if kind == "class" else row.worst_group

    def text(row: Row) -> str:
        worst = of(row)
        if worst is None:
            return NOTHING
        count = "" if worst.examples is None else f", {worst.examples}"
        return f"{quality(Spread.of(worst.values))} ({worst.name}{count})"

    def value(row: Row) -> float | None:
        worst = of(row)
        return Spread.of(worst.values).mean if worst else None

    return Column(title=f"Worst {kind}", text=text, value=value)


def _prepared() -> Column:
    """The time of the fits before, beside that of a method's own."""

    def value(row: Row) -> float | None:
        return row.prepared_cost("fit_seconds")

    return Column(title="Prepared", text=lambda row: duration(value(row)), value=value)


def _decay() -> Column:
    def text(row: Row) -> str:
        return NOTHING if row.weight_decay is None else f"{row.weight_decay:g}"

    return Column(title="Weight decay", text=text, value=lambda row: row.weight_decay)


def _failures() -> Column:
    return Column(title="Failed", text=lambda row: str(row.failed), value=lambda row: row.failed)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _title(title: str, block: Block) -> str:
    return block.title if block.study.part else title


def _name(block: Block, quote: str = "") -> str:
    """Name a block by its recipe, and by its label where that says more."""
    told = f"{quote}{block.recipe}{quote}"
    return told if block.label in block.recipe.replace("/", "-") else f"{told}, {block.label}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

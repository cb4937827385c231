"""The report of a study: one HTML file that needs nothing else, to be read on a screen, a phone or a train."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from common.compare._plots import Point, curves_svg, pareto_svg
from common.compare._samples import Example, Group, pictured_examples, sample_groups
from common.compare.environment import environment_of
from common.compare.evidence import COSTS, Block, Standing
from common.compare.integrity import CHECKS, Finding
from common.compare.results import MEMORY_PARTS, Metrics, Row, Run, by_setting, tuning_runs, tuning_score
from common.compare.study import Setting, Study, Trial
from common.compare.summary import Summary, offered, overview, summarise
from common.compare.tables import NOTHING, amount, columns, preparing, share, worst_notes

_TEMPLATE = "report.html.j2"
_UNITS = {"B": "bytes", "s": "seconds"}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing and the words under it."""

    caption: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One method's training memory: the total and its parts as (name, size in words, percent of the longest bar)."""

    method: str
    total: str
    parts: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting of a method's grid and what came of it (`word` says it, `kind` is its looks)."""

    setting: str
    word: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything the report shows about one recipe."""

    ident: str
    title: str
    question: str
    label: str
    recipe: str
    facts: str
    primary: str
    tuned: str
    worst: str
    prepared: tuple[str, ...]
    seed: int
    untrained: str
    summary: Summary
    head: tuple[tuple[str, bool], ...]
    cells: tuple[tuple[tuple[str, object, bool], ...], ...]
    plots: tuple[Plot, ...]
    bars: tuple[Bar, ...]
    tuning: tuple[tuple[str, tuple[Tried, ...]], ...]
    failed: tuple[Run, ...]
    groups: tuple[Group, ...]
    examples: tuple[Example, ...]
    commands: str


@dataclass(frozen=True, kw_only=True)
class Together:
    """What several recipes say together: sentences, and a table of (method, rank, gap on each recipe)."""

    lines: tuple[str, ...]
    labels: tuple[str, ...]
    rows: tuple[tuple[str, float | None, tuple[tuple[str, float | None], ...]], ...]


def write_report(
    study: Study, blocks: Sequence[Block], standing: Standing | None, findings: Sequence[Finding], path: Path
) -> None:
    """Write the report.

    Args:
        study: The study that gives it title and question.
        blocks: The results, one for each recipe.
        standing: What they say together; None where there is one alone.
        findings: What the checks found.
        path: The HTML file.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Class names, paths and logs are other people's text: escape everything that is not our own drawing.
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = page.get_template(_TEMPLATE).render(
        nothing=NOTHING,
        title=study.title,
        question=study.question,
        checks=CHECKS,
        findings=findings,
        curves=_curves(blocks),
        together=_together(blocks, standing) if standing else None,
        sections=[_section(block, f"set{index}") for index, block in enumerate(blocks)],
        parts=MEMORY_PARTS,
        environment=environment_of([run for block in blocks for run in block.runs]),
    )
    path.write_text(text, encoding="utf-8")


def _together(blocks: Sequence[Block], standing: Standing) -> Together:
    ranks = standing.ranking.ranks if standing.ranking else {}
    labels = tuple(block.label for block in blocks)
    names = [*ranks, *(name for name in standing.gaps if name not in ranks)]

    def cells(name: str) -> tuple[tuple[str, float | None], ...]:
        gaps = [standing.gaps.get(name, {}).get(label) for label in labels]
        return tuple((share(gap), gap) for gap in gaps)

    rows = tuple((name, ranks.get(name), cells(name)) for name in names)
    return Together(lines=tuple(overview(standing)), labels=labels, rows=rows)


def _section(block: Block, ident: str) -> Section:
    study, rows, runs = block.study, block.rows, block.runs
    shown = columns(rows, block.comparison, every_metric=True)
    seen = [run.metrics for run in runs if run.metrics]
    pictured = [run for run in runs if run.chosen and run.trial.seed == study.seeds[0] and not run.failure]
    return Section(
        ident=ident,
        title=block.title,
        question=study.part.question if study.part else "",
        label=block.label,
        recipe=block.recipe,
        facts=_facts(seen),
        primary=next((row.primary.replace("_", " ") for row in rows if row.primary), ""),
        tuned=_protocol(study, rows),
        worst=" ".join(worst_notes(rows)),
        prepared=tuple(preparing(rows)),
        seed=study.seeds[0],
        untrained=", ".join(row.method for row in rows if row.baseline),
        summary=summarise(rows, runs, block.comparison),
        head=tuple((column.title, column.words) for column in shown),
        cells=tuple(tuple((c.text(row), c.value(row), c.words) for c in shown) for row in rows),
        plots=tuple(_plots(block, ident)),
        bars=tuple(_bars(rows)),
        tuning=tuple(_tuning(study, runs)),
        failed=tuple(run for run in runs if run.failure),
        groups=tuple(sample_groups(pictured)),
        examples=tuple(pictured_examples(pictured)),
        commands=_commands(study, runs),
    )


def _facts(seen: Sequence[Metrics]) -> str:
    """Describe data and backbone in a line, from the first run that has them; a baseline may have no backbone."""
    if not seen:
        return ""
    data, backbone = seen[0].data, next((metrics.backbone for metrics in seen if metrics.backbone), "")
    classes = data.get("classes")
    sizes = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test") if isinstance(data.get(split), int))
    words = [
        str(data.get("name", "")),
        f"{len(classes)} classes" if isinstance(classes, list) else "",
        f"{sizes} examples (train / val / test)" if sizes else "",
        f"backbone {backbone}" if backbone else "",
    ]
    return ", ".join(word for word in words if word)


def _plots(block: Block, ident: str) -> list[Plot]:
    rows, plots = block.rows, list[Plot]()
    intervals = block.comparison.intervals if block.comparison else {}
    levels = [(row.method, row.quality.mean) for row in rows if row.baseline and row.quality is not None]
    for key, words, unit in COSTS:
        known = [(row, row.quality) for row in rows if row.quality is not None and row.cost.get(key, 0) > 0]
        if not known or all(row.baseline for row, _ in known):
            continue
        known = [(row, spread) for row, spread in known if not row.baseline]
        first, name = known[0][0], known[0][0].primary.replace("_", " ")
        points: list[Point] = []
        for row, spread in known:
            found = intervals.get(row.method)
            reach = (found.low, found.high) if found else None
            points.append(Point(name=row.method, cost=row.cost[key], quality=spread.mean, reach=reach))
        svg = pareto_svg(
            points,
            levels=levels,
            ident=f"{ident}-{key}",
            title=f"Test {name} against {words}",
            cost_label=f"{words} ({_UNITS[unit]})" if unit else words,
            quality_label=f"test {name}",
            more_is_better=first.mode == "max",
        )
        caption = f"Test {name} against {words}. Filled and joined: no other method is both better and cheaper."
        caption += " Bars: 95 % intervals." if intervals else ""
        caption += " Dotted across: not trained." if levels else ""
        # The drawing is ours and its text escaped; everything else on the page goes through autoescape.
        plots.append(Plot(caption=caption, svg=Markup(svg)))
    return plots


def _curves(blocks: Sequence[Block]) -> list[Plot]:
    """Draw quality against the number of training examples, where one recipe was run with several."""
    plots: list[Plot] = []
    for index, source in enumerate(dict.fromkeys(block.source for block in blocks)):
        sized = [(size, block) for block in blocks if block.source == source and (size := _train_size(block))]
        if len({size for size, _ in sized}) < 2:
            continue
        curves: dict[str, list[Point]] = {}
        for size, block in sorted(sized, key=lambda pair: pair[0]):
            for row in block.rows:
                if row.quality is not None and not row.baseline:
                    found = block.comparison.intervals.get(row.method) if block.comparison else None
                    reach = (found.low, found.high) if found else None
                    point = Point(name=row.method, cost=float(size), quality=row.quality.mean, reach=reach)
                    curves.setdefault(row.method, []).append(point)
        name = next((row.primary.replace("_", " ") for _, block in sized for row in block.rows if row.primary), "")
        labels = {"cost_label": "training examples", "quality_label": f"test {name}"}
        svg = curves_svg(curves, ident=f"curve{index}", title=f"Test {name} by training examples", **labels)
        caption = f"{source[1]}: test {name} against the number of training examples. Bars: 95 % intervals."
        plots.append(Plot(caption=caption, svg=Markup(svg)))
    return plots


def _train_size(block: Block) -> int | None:
    sizes = {run.metrics.data.get("train") for run in block.runs if run.metrics}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _bars(rows: Sequence[Row]) -> list[Bar]:
    known = [row for row in rows if row.cost.get("memory_total", 0) > 0]
    longest = max((row.cost["memory_total"] for row in known), default=1.0)
    return [
        Bar(
            method=row.method,
            total=amount(row.cost["memory_total"], "B"),
            parts=tuple(
                (part, amount(size, "B"), round(100 * size / longest, 2))
                for part in MEMORY_PARTS
                if (size := row.cost.get(f"memory_{part}", 0)) > 0
            ),
        )
        for row in known
    ]


def _tuning(study: Study, runs: Sequence[Run]) -> list[tuple[str, tuple[Tried, ...]]]:
    """Every setting that was tried for each method, losers and failures included."""
    lists: list[tuple[str, tuple[Tried, ...]]] = []
    for method in study.methods:
        own = [run for run in runs if run.trial.method == method.name]
        winners = {run.trial.setting for run in own if run.chosen}
        groups = by_setting(tuning_runs(study, method, own))
        lists.append((method.name, tuple(_tried(one, runs, one in winners) for one, runs in groups.items())))
    return lists


def _protocol(study: Study, rows: Sequence[Row]) -> str:
    """Say how settings were chosen, and whether every method had as many to choose from."""
    trained = [row for row in rows if not row.baseline]
    name = next((row.primary.replace("_", " ") for row in rows if row.primary), "primary metric")
    counts = sorted({row.settings for row in trained})
    words = offered(trained)
    if len(counts) == 1:
        fair = f"Every method had the same number of {words} to choose from: {counts[0]}."
    else:
        told = ", ".join(f"{row.method} {row.settings}" for row in trained)
        fair = f"The methods had different numbers of {words} to choose from, and more are an advantage: {told}."
    several = len(study.tune_seeds) > 1
    seeds = f"seed{'s' * several} {' and '.join(map(str, study.tune_seeds))}"
    mean = "mean " * several
    return (
        f"{fair} Each was tried with {seeds}; the best {mean}{name} on the validation split was chosen. "
        "The test split was touched by the chosen runs only."
    )


def _tried(setting: Setting, runs: Sequence[Run], winner: bool) -> Tried:
    """Say what a setting came to: the mean over the seeds it was tried with, and each where they are several."""
    score, words = tuning_score(runs), [_came_to(run) for run in runs]
    if score is None:
        return Tried(setting=setting.words, word=", ".join(words), kind="failed")
    each = f" ({', '.join(words)})" if len(runs) > 1 else ""
    word = f"{score:.3f}{each}{', chosen' if winner else ''}"
    return Tried(setting=setting.words, word=word, kind="chosen" if winner else "lost")


def _came_to(run: Run) -> str:
    if run.metrics is None or not run.metrics.fitted:
        return f"failed, exit code {run.failure.code}" if run.failure else "failed"
    return "diverged" if run.metrics.score is None else f"{run.metrics.score:.3f}"


def _commands(study: Study, runs: Sequence[Run]) -> str:
    def line(words: Sequence[str]) -> str:
        return "graft " + shlex.join(words)

    def lines(trial: Trial, chosen: bool) -> list[str]:
        return [line(trial.fit), *([line(trial.test)] if chosen and not trial.baseline else [])]

    before = [line(words) for one in study.needed() for words in (one.fit, one.export)]
    return "\n".join([*before, *(text for run in runs for text in lines(run.trial, run.chosen))])

"""`graft reproduce`: run what the cards need, and say of each claim whether it holds here.

Trials are those of `graft compare`, in the studies' own folders of runs, and of a study only those of the methods that
the claim speaks of: what is finished is not run again, and a reproduction that was stopped goes on.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from common import __version__
from common.compare.claims import Card, Scale, ScaleName
from common.compare.environment import environment_of
from common.compare.evidence import Block
from common.compare.outlook import asked_of, lacking, own_folder
from common.compare.stages import GRAFT, STOPPED, Options, run_studies
from common.compare.study import Study
from common.compare.verdicts import decide
from common.errors import GraftError

NOT_RUNNABLE = "not runnable here"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a claim.

    Attributes:
        card: The card's id.
        scale: The scale at which it was asked.
        verdict: `holds`, `does not hold`, `inconclusive` or `not runnable here`.
        figures: What the verdict rests on, or why there is none.
        runs: The run folders that it rests on.
        statement: The claim.
        published: The published figure.
        source: Paper and table.
        differs: How the protocol differs from the published one.
        at_an_end: The methods whose rate is the lowest or highest that was tried, with the rate: a better one may lie
            beyond.
        environment: What the runs ran on; the precision is the machine's where the recipes leave it `auto`.
        date: When, UTC.
        commit: Graft's commit, or its version where there is none.
    """

    card: str
    scale: str
    verdict: str
    figures: str
    runs: tuple[str, ...]
    statement: str
    published: str
    source: str
    differs: str
    at_an_end: tuple[str, ...]
    environment: Mapping[str, str]
    date: str
    commit: str


class _StudiesStopped(KeyboardInterrupt):
    """Studies were stopped, and have said so."""


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """Runs studies, each once however many cards need it."""

    jobs: int | None
    command: tuple[str, ...]
    console: Console
    options: Options
    done: dict[str, list[Block]]

    def run(self, key: str, studies: Callable[[], Sequence[Study]]) -> list[Block]:
        """Run studies, or return what came of them before.

        Raises:
            _StudiesStopped: They were stopped.
        """
        if key not in self.done:
            code, blocks = run_studies(
                studies(), self.jobs, command=self.command, console=self.console, options=self.options
            )
            if code == STOPPED:
                raise _StudiesStopped
            self.done[key] = blocks
        return self.done[key]


def reproduce(
    cards: Sequence[Card],
    scale: ScaleName,
    out: Path,
    jobs: int | None = None,
    *,
    command: Sequence[str] = GRAFT,
    console: Console | None = None,
    imports: Sequence[str] = (),
) -> int:
    """Decide claims, and write `verdicts.json` and `verdicts.md` after each of them.

    Args:
        cards: The claims.
        scale: The size at which they are asked.
        out: The folder of the verdicts, and of what is reported of each claim's studies; their runs are where they say.
        jobs: How many trials run side by side; by default half the processors.
        command: What stands before `fit`, `test` and `baseline` on each command line.
        console: Where progress goes; by default standard output.
        imports: Names of modules that trials need, which forked ones find imported.

    Returns:
        0 where each claim was asked, whatever the verdict; 130 where it was stopped.
    """
    console = console or Console()
    runner = _Runner(
        jobs=jobs, command=tuple(command), console=console, options=Options(imports=tuple(imports)), done={}
    )
    out.mkdir(parents=True, exist_ok=True)
    verdicts: list[Verdict] = []
    try:
        for card in cards:
            verdicts.append(_verdict(card, scale, out, runner))
            _write(verdicts, out)
            last = verdicts[-1]
            console.print(f"{last.card}: {last.verdict}. {last.figures}", markup=False, highlight=False, soft_wrap=True)
    except _StudiesStopped:
        return STOPPED
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return STOPPED
    console.print(f"Verdicts: {out / 'verdicts.md'}", highlight=False, soft_wrap=True)
    return 0


def _verdict(card: Card, scale: ScaleName, out: Path, runner: _Runner) -> Verdict:
    own = card.scales[scale]
    reason, blocks = own.not_runnable or lacking(own.needs), list[Block]()
    if not reason:
        try:
            blocks = _blocks(own, own_folder(card, scale, out), runner)
            reason = _all_failed(blocks)
        except GraftError as error:
            reason = " ".join(str(error).split())
    outcome = None if reason else decide(own.tests, blocks)
    return Verdict(
        card=card.id,
        scale=scale,
        verdict=outcome.answer if outcome else NOT_RUNNABLE,
        figures=outcome.figures if outcome else reason,
        runs=tuple(run.trial.folder.as_posix() for block in blocks for run in block.runs if run.chosen),
        statement=card.statement,
        published=f"{card.figure} ({card.protocol})",
        source=f"{card.paper}, {card.table}",
        differs=own.differs,
        at_an_end=tuple(
            f"{block.label}: {row.method} ({row.lr:g})" for block in blocks for row in block.rows if row.at_an_end
        ),
        environment=environment_of([run for block in blocks for run in block.runs]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
    )


def _blocks(scale: Scale, out: Path, runner: _Runner) -> list[Block]:
    """Run a scale's studies; each set is labelled by its study file, or its recipe."""
    blocks: list[Block] = []
    for asked in asked_of(scale, out):
        own = runner.run(asked.key, asked.load)
        alone = asked.name and len(own) == 1
        prefix = f"{asked.name}:" if asked.name else ""
        blocks += [replace(one, label=asked.name if alone else f"{prefix}{one.label}") for one in own]
    return blocks


def _all_failed(blocks: Sequence[Block]) -> str:
    """Say why nothing ran, where nothing did."""
    runs = [run for block in blocks for run in block.runs]
    if any(run.metrics is not None for run in runs):
        return ""
    failure = next((run.failure for run in runs if run.failure), None)
    last = failure.tail.strip().splitlines()[-1:] if failure else []
    return f"every run failed, the first with: {last[0] if last else 'no word'}"


def _commit() -> str:
    """Return the commit of this code, with a mark where files differ from it; the version where git knows nothing."""
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return __version__  # an installation has no repository
    return found.stdout.strip()


def _write(verdicts: Sequence[Verdict], out: Path) -> None:
    records = [asdict(verdict) for verdict in verdicts]
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    (out / "verdicts.json").write_text(text, encoding="utf-8")
    (out / "verdicts.md").write_text(_markdown(verdicts), encoding="utf-8")


def _machines(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """Return the claims that were asked, by what their runs ran on."""
    found: dict[str, list[str]] = {}
    for one in verdicts:
        if one.environment:
            words = ", ".join(f"{name} {text}" for name, text in one.environment.items())
            found.setdefault(words, []).append(one.card)
    return found


def _markdown(verdicts: Sequence[Verdict]) -> str:
    counts: Mapping[str, int] = {}
    for verdict in verdicts:
        counts = {**counts, verdict.verdict: counts.get(verdict.verdict, 0) + 1}
    dates, commits = sorted({v.date[:10] for v in verdicts}), sorted({v.commit for v in verdicts})
    lines = [
        f"**{len(verdicts)} claims**: {', '.join(f'{count} {name}' for name, count in counts.items())}. "
        f"Scale {verdicts[0].scale}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}.",
        "",
        "| claim | verdict | measured here | published |",
        "|---|---|---|---|",
    ]
    for v in verdicts:
        cells = (f"{v.statement} (`{v.card}`)", v.verdict, v.figures, f"{v.published}; {v.source}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    below = {
        "What the runs ran on": {words: ", ".join(of) for words, of in _machines(verdicts).items()},
        "Runs": {v.card: ", ".join(f"`{run}`" for run in v.runs) for v in verdicts},
        "How the protocols differ from the published ones": {v.card: v.differs for v in verdicts},
        "Learning rates at an end of those that were tried, so that a better one may lie beyond": {
            v.card: "; ".join(v.at_an_end) for v in verdicts
        },
    }
    for title, told in below.items():
        items = [f"- `{card}`: {text}" for card, text in told.items() if text]
        lines += ["", f"{title}:", "", *items] if items else []
    return "\n".join(lines) + "\n"

"""Whether results can be believed: how they were chosen, on what data and seeds, and whether they were edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.compare.evidence import Block
from common.compare.examples import contradicts, read_rows
from common.compare.ledger import Ledger, digests_of
from common.compare.results import Run, choose, tuning_runs

CHECKS = (
    "the validation split alone chose each learning rate and weight decay",
    "the test split was read once for each run in the results, and for no other",
    "no seed or rate that was tested is left out",
    "no test or validation example stands in another split",
    "all methods of a seed saw the same data",
    "no result was edited after it was measured, and predictions give the recorded numbers",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a check found.

    Attributes:
        broken: Whether the results must not be believed as they stand; else it is to be known when reading them.
        text: What it is, in a sentence.
    """

    broken: bool
    text: str


def check(blocks: Sequence[Block], ledgers: Mapping[Path, Ledger]) -> list[Finding]:
    """Check the results of studies.

    Args:
        blocks: The results, one for each recipe.
        ledgers: The ledger of each folder of runs.

    Returns:
        What was found; nothing where all is well.
    """
    found: list[Finding] = []
    for folder, ledger in ledgers.items():
        if ledger.broken:
            found.append(_broken(f"'{ledger.path}' was changed: its lines do not follow on from each other"))
        early = sum(entry.event == "found" for entry in ledger.entries)
        if early:
            found.append(
                _noted(f"{early} results in '{folder}' were there before the ledger, which vouches only since")
            )
    found += _test_splits(blocks)
    for block in blocks:
        ledger = ledgers[block.study.runs]
        for one in (_selection, _seeds, _data):
            found += one(block)
        for other in (_reading, _left_out, _edits, _starts):
            found += other(block, ledger)
    return list({finding.text: finding for finding in found}.values())  # parts may start from the same


def _broken(text: str) -> Finding:
    return Finding(broken=True, text=f"{text}.")


def _noted(text: str) -> Finding:
    return Finding(broken=False, text=f"{text}.")


def _selection(block: Block) -> Iterator[Finding]:
    """Choose again by the validation results, and compare."""
    for method in block.study.methods:
        own = [run for run in block.runs if run.trial.method == method.name]
        best = choose(tuning_runs(block.study, method, own))
        chosen = {run.trial.setting for run in own if run.chosen}
        if best is not None and chosen and chosen != {best}:
            told = " and ".join(sorted(setting.words for setting in chosen if setting is not None))
            yield _broken(
                f"{block.label}, {method.name}: the results are of rate {told}, the validation split chooses "
                f"{best.words}"
            )


def _seeds(block: Block) -> Iterator[Finding]:
    """Every method in the results must have every seed, or a run that failed and is shown to have."""
    for row in block.rows:
        failed = {run.trial.seed for run in block.runs if run.trial.method == row.method and run.failure}
        missing = [seed for seed in block.study.seeds if seed not in row.seeds]
        if row.seeds and missing:
            text = f"{block.label}, {row.method}: no result of seed {', '.join(map(str, missing))}"
            yield _noted(f"{text}, which failed") if set(missing) <= failed else _broken(text)


def _data(block: Block) -> Iterator[Finding]:
    """Equal data for all methods of a seed, and no example in two splits."""
    digests: dict[int, set[str]] = {}
    leaks: dict[str, int] = {}
    for run in block.runs:
        if run.metrics is None:
            continue
        digests.setdefault(run.trial.seed, set()).add(str(run.metrics.data.get("digest")))
        for pair, count in (run.metrics.data.get("shared") or {}).items():
            leaks[pair] = max(leaks.get(pair, 0), count)
    if any(len(found) > 1 for found in digests.values()):
        yield _broken(f"{block.label}: the runs of one seed did not all see the same data (their digests differ)")
    for pair, count in leaks.items():
        if count:
            yield _broken(f"{block.label}: {count} examples stand in two splits, {pair}, with the same content")


def _test_splits(blocks: Sequence[Block]) -> Iterator[Finding]:
    """The same recipe with more or less training data must be tested on the same examples."""
    digests: dict[tuple[tuple[str, str], int], set[str]] = {}
    for block in blocks:
        for run in block.runs:
            split = (run.metrics.data.get("splits") or {}).get("test") if run.metrics else None
            if split is not None:
                digests.setdefault((block.source, run.trial.seed), set()).add(split)
    for _, recipe in dict.fromkeys(source for (source, _), found in digests.items() if len(found) > 1):
        yield _broken(f"{recipe}: runs of one seed were tested on different examples")


def _reading(block: Block, ledger: Ledger) -> Iterator[Finding]:
    """The test split is read once for a run in the results, and for no other."""
    for run in block.runs:
        tests = [entry.digests.get("test") for entry in ledger.of(run.trial.folder) if entry.event == "test"]
        if len(tests) > 1:
            text = f"{_title(block, run)}: the test split was read {len(tests)} times"
            yield _broken(f"{text}, with different results") if len(set(tests)) > 1 else _noted(text)
        if run.metrics and run.metrics.test is not None and not run.chosen and not run.trial.baseline:
            yield _noted(f"{_title(block, run)}: the test split was read, and the run is not in the results")


def _left_out(block: Block, ledger: Ledger) -> Iterator[Finding]:
    """Look on disk and in the ledger for tested runs of the study's methods that the study no longer has."""
    possible = {trial.folder for trial in block.study.possible()}
    for name in (*block.study.baselines, *(method.name for method in block.study.methods)):
        folder = block.study.runs / block.label / name
        tested = {path.parent for path in folder.glob("*/metrics.json") if "test" in digests_of(path.parent)}
        tested |= {
            ledger.folder / entry.run
            for entry in ledger.entries
            if "test" in entry.digests and (ledger.folder / entry.run).parent == folder
        }
        for one in sorted(tested - possible):
            yield _broken(f"{block.label}, {name}: '{one.name}' was tested, and the study leaves it out")


def _edits(block: Block, ledger: Ledger) -> Iterator[Finding]:
    """Compare what runs say now with what was noted, and with what their predictions give."""
    for run in block.runs:
        if run.metrics is None:
            continue
        changed = _changed(run.trial.folder, ledger)
        if changed:
            yield _broken(f"{_title(block, run)}: {' and '.join(changed)} changed after it was measured")
        if run.chosen and run.metrics.test is not None:
            yield from _contradictions(block, run, run.metrics.test)


def _starts(block: Block, ledger: Ledger) -> Iterator[Finding]:
    """Compare what methods started from with what was noted of it."""
    for one in block.study.needed():
        changed = _changed(one.folder, ledger)
        if changed:
            yield _broken(f"prepared '{one.name}': {' and '.join(changed)} changed after it was prepared")


def _changed(folder: Path, ledger: Ledger) -> list[str]:
    """Name the parts of a run's record that are not what they were noted as last."""
    now = digests_of(folder)
    noted = {key: digest for entry in ledger.of(folder) for key, digest in entry.digests.items()}
    return [key for key, digest in noted.items() if now.get(key) != digest]


def _contradictions(block: Block, run: Run, test: Mapping[str, float]) -> Iterator[Finding]:
    primary = run.metrics.primary if run.metrics else ""
    if primary not in test:
        return
    given = contradicts(read_rows(run.trial.folder), primary, test[primary])
    if given is not None:
        yield _broken(
            f"{_title(block, run)}: {primary} is recorded as {test[primary]:.4f}, its predictions give {given:.4f}"
        )


def _title(block: Block, run: Run) -> str:
    return f"{block.label}, {run.trial.method}, '{run.trial.folder.name}'"

"""The course of a study: prepare, baselines, tune, choose, repeat over seeds, test what was chosen, write the results.

Methods do not wait for each other: one that is tuned goes on with further seeds. Tests wait until all are tuned.

Every step is a command that a person can run again: it is written to `command.txt` in the run folder. A study that
was stopped goes on where it was; a run folder that came from another command is refused, never overwritten.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from common.compare.evidence import Block, make_blocks, stand
from common.compare.forked_runner import local_runner
from common.compare.integrity import Finding, check
from common.compare.ledger import Ledger
from common.compare.origin import record_of, refuse_foreign_folders
from common.compare.prepared import ADAPTER, Preparation
from common.compare.records import write_csv, write_parquet
from common.compare.report import write_report
from common.compare.results import Failure, Metrics, Run, choose, read_metrics
from common.compare.runner import Finished, Job, Runner, cpu_count, run_jobs
from common.compare.study import Study, Trial
from common.compare.study_file import load_studies
from common.compare.tables import print_table, write_markdown
from common.errors import GraftError, unknown
from common.parquet import need_parquet

GRAFT = (sys.executable, "-m", "domains")
STOPPED = 130
LOCAL, RAY = RUNNERS = ("local", "ray")
_TRACES = ("last.ckpt", "metrics.json")  # of a run that was begun


@dataclass(frozen=True, kw_only=True)
class Options:
    """How studies are run, apart from what they say.

    Attributes:
        runner: Where trials run: one of `RUNNERS`.
        parquet: Whether `results.parquet` is written beside `results.csv`.
        imports: Names of modules that trials need, which forked ones find imported: those of the domains.
    """

    runner: str = LOCAL
    parquet: bool = False
    imports: tuple[str, ...] = ()


def compare(
    study_path: Path,
    out: Path | None = None,
    jobs: int | None = None,
    *,
    command: Sequence[str] = GRAFT,
    console: Console | None = None,
    options: Options = Options(),
) -> int:
    """Run the study of a file and write its results.

    Args:
        study_path: The study file.
        out: The folder to write to, in place of the study's own.
        jobs: How many trials run side by side; by default half the processors.
        command: What stands before `fit`, `test` and `baseline` on each command line.
        console: Where progress and the table go; by default standard output.
        options: Where trials run and what else is written.

    Returns:
        The exit code; see `run_studies`.

    Raises:
        GraftError: If the study file is wrong, a run folder holds the result of another command, or an option needs a
            package that is not installed.
    """
    return run_studies(load_studies(study_path, out), jobs, command=command, console=console, options=options)[0]


def run_studies(
    studies: Sequence[Study],
    jobs: int | None = None,
    *,
    command: Sequence[str] = GRAFT,
    console: Console | None = None,
    options: Options = Options(),
) -> tuple[int, list[Block]]:
    """Run studies and write their results into the first one's output folder, as one report.

    Args:
        studies: The studies, at least one; title and question of the report are the first one's.
        jobs: How many trials run side by side; by default half the processors.
        command: What stands before `fit`, `test` and `baseline` on each command line.
        console: Where progress and the table go; by default standard output.
        options: Where trials run and what else is written.

    Returns:
        The exit code (0 where every run succeeded, 1 where one failed or a check found a fault, 130 where the studies
        were stopped) and the results, none where they were stopped.

    Raises:
        GraftError: If a run folder holds the result of another command, another comparison is running there, or an
            option needs a package that is not installed.
    """
    if jobs is not None and jobs < 1:
        raise GraftError(f"--jobs {jobs} is not possible. Give 1 or more.")
    console, first = console or Console(), studies[0]
    width = min(jobs or max(1, cpu_count() // 2), max(len(study.tuning()) for study in studies))
    for study in studies:
        refuse_foreign_folders(study)
    if options.parquet:
        need_parquet("--parquet")
    runner = _runner(options, width, command)
    folders = sorted({folder for study in studies for folder in (first.out, study.runs)})
    try:
        with contextlib.ExitStack() as stack:
            for folder in folders:
                stack.enter_context(_sole_use(folder))
            ledgers = {study.runs: Ledger(study.runs) for study in studies}
            blocks: list[Block] = []
            for study in studies:
                session = _Session(
                    study=study,
                    command=tuple(command),
                    width=width,
                    console=console,
                    ledger=ledgers[study.runs],
                    runner=runner,
                )
                blocks += make_blocks(study, session.run())
            findings = check(blocks, ledgers)
            if options.parquet:
                write_parquet(blocks, first.out / "results.parquet")
            return _write(first, blocks, findings, console), blocks
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return STOPPED, []


def _runner(options: Options, width: int, command: Sequence[str]) -> Runner:
    if options.runner not in RUNNERS:
        raise unknown("runner", options.runner, RUNNERS)
    if options.runner == LOCAL:
        return local_runner(command, options.imports)
    from common.compare.ray_runner import RayRunner

    return RayRunner(width)


@contextlib.contextmanager
def _sole_use(folder: Path) -> Generator[None]:
    """Keep other comparisons out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise GraftError(f"Another study is running in '{folder}'. Wait for it, or give another --out.") from error
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A process of a study: `prepare`, `export`, `baseline`, `fit` or `test`, and of what."""

    verb: str
    made: Trial | Preparation


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One call of `compare`: the study, how its processes run, and how far it is.

    Attributes:
        begun: What was handed to the runner.
        underway: Of it what has not ended, by run folder: the verb.
        chosen: By recipe and method the runs with the chosen settings: the tuned ones and the further seeds.
        failures: By run folder how a process failed.
    """

    study: Study
    command: tuple[str, ...]
    width: int
    console: Console
    ledger: Ledger
    runner: Runner
    begun: set[_Step] = field(default_factory=set["_Step"])
    underway: dict[Path, str] = field(default_factory=dict[Path, str])
    chosen: dict[tuple[str, str], list[Trial]] = field(default_factory=dict[tuple[str, str], list[Trial]])
    failures: dict[Path, Failure] = field(default_factory=dict[Path, Failure])

    def run(self) -> list[Run]:
        """Take the study through its course; return every run of it."""
        study = self.study
        self.ledger.adopt([made.folder for made in (*study.needed(), *study.possible())])
        self._prepare()
        untrained, tuning = study.untrained(), study.tuning()
        for stage, trials in (("baselines", untrained), ("tuning", tuning)):
            if trials:
                self._announce(stage, len(trials), sum(_fitted(self._read(trial)) for trial in trials))
        self._run(self._due)
        repeated = [trial for trial in self._winners() if trial.seed not in study.tune_seeds]
        kept = {trial.folder for trial in (*self._tested(), *untrained)}
        runs = [self._read(trial) for trial in (*untrained, *tuning, *repeated)]
        return [replace(run, chosen=run.trial.folder in kept) for run in runs]

    def _prepare(self) -> None:
        """Fit and export what methods start from; what starts from something that failed fails with its words."""
        needed = self.study.needed()
        if not needed:
            return
        self._announce("preparing", len(needed), sum(one.adapter.is_dir() for one in needed), "adapters")

        def due() -> list[_Step]:
            todo = [one for one in needed if not one.adapter.is_dir() and one.folder not in self.failures]
            fits = [_Step(verb="prepare", made=one) for one in todo]
            return [_Step(verb="export", made=fit.made) if self._fit_is_over(fit) else fit for fit in fits]

        self._run(due)
        refuse_foreign_folders(self.study)  # now that the adapters are there to be compared

    def _due(self) -> list[_Step]:
        """What can run now: baselines and tuning, the further seeds of a method that is tuned, and then the tests.

        No test split is read before the settings of every method are chosen, and a choice is made once.
        """
        baselines = self._todo("baseline", self.study.untrained())
        tuning = self._todo("fit", self.study.tuning())
        self._announce_choices(self._choose_where_tuned({step.made.folder for step in tuning}))
        fits = list(dict.fromkeys((*tuning, *self._todo("fit", self._winners()))))
        if len(self.chosen) < len(self.study.recipes) * len(self.study.methods):
            return [*baselines, *fits]
        busy = {*self.underway, *(step.made.folder for step in fits)}
        runs = [self._read(trial) for trial in self._tested() if trial.folder not in busy]
        tests = [_Step(verb="test", made=run.trial) for run in runs if _fitted(run) and not _measured(run)]
        return [*baselines, *fits, *tests]

    def _todo(self, verb: str, trials: Sequence[Trial]) -> list[_Step]:
        """Those that are neither fitted nor failed; one that starts from what failed fails now, with its words."""
        todo: list[_Step] = []
        for trial in trials:
            step = _Step(verb=verb, made=trial)
            if trial.folder in self.failures or self._fit_is_over(step):
                continue
            lost = next((self.failures[one.folder] for one in trial.prepared if one.folder in self.failures), None)
            if lost:
                self.failures[trial.folder] = lost
            else:
                todo.append(step)
        return todo

    def _fit_is_over(self, step: _Step) -> bool:
        """Whether a fit left its result, and its process ended; a record that may be half written is not read."""
        verb = self.underway.get(step.made.folder)
        if verb is not None:
            return verb != step.verb
        return _has_fit(step.made.folder) if isinstance(step.made, Preparation) else _fitted(self._read(step.made))

    def _choose_where_tuned(self, untuned: Collection[Path]) -> list[tuple[str, str]]:
        """Choose the settings of each method of which no tuning run is left to do; return the recipes and methods."""
        study, tuning, chosen = self.study, self.study.tuning(), list[tuple[str, str]]()
        for recipe, method in itertools.product(study.recipes, study.methods):
            key = recipe, method.name
            own = [trial for trial in tuning if (trial.recipe, trial.method) == key]
            if key in self.chosen or any(trial.folder in untuned for trial in own):
                continue
            setting = choose([self._read(trial) for trial in own])
            seeds = dict.fromkeys((*study.tune_seeds, *study.seeds))
            self.chosen[key] = [study.trial(recipe, method, setting, seed) for seed in seeds] if setting else []
            chosen.append(key)
        return chosen

    def _announce_choices(self, chosen: Sequence[tuple[str, str]]) -> None:
        """Say what was chosen and how many further seeds that takes; after the last choice, how many tests."""
        for recipe, method in chosen:
            trials = self.chosen[recipe, method]
            setting = trials[0].setting if trials else None
            further = [trial for trial in trials if trial.seed not in self.study.tune_seeds]
            there = sum(self._fit_is_over(_Step(verb="fit", made=trial)) for trial in further)
            words = "none, since each failed" if setting is None else f"lr {setting.words}"
            self._announce(f"chosen  {self.study.labels[recipe]} {method} {words}; further seeds", len(further), there)
        if chosen and len(self.chosen) == len(self.study.recipes) * len(self.study.methods):
            idle = [trial for trial in self._tested() if trial.folder not in self.underway]
            self._announce("testing", len(self._tested()), sum(_measured(self._read(trial)) for trial in idle))

    def _winners(self) -> list[Trial]:
        """The runs with the settings chosen so far: the tuned ones and the further seeds."""
        keys = itertools.product(self.study.recipes, (method.name for method in self.study.methods))
        return [trial for key in keys for trial in self.chosen.get(key, ())]

    def _tested(self) -> list[Trial]:
        return [trial for trial in self._winners() if trial.seed in self.study.seeds]

    def _run(self, due: Callable[[], Sequence[_Step]]) -> None:
        """Run what is due until nothing new is."""
        steps: dict[Job, _Step] = {}

        def possible() -> list[Job]:
            new = [step for step in due() if step not in self.begun]
            self.begun.update(new)
            self.underway.update((step.made.folder, step.verb) for step in new)
            jobs = [self._job(step) for step in new]
            steps.update(zip(jobs, new, strict=True))
            return jobs

        run_jobs(
            possible,
            width=self.width,
            threads=max(1, cpu_count() // self.width),
            console=self.console,
            describe=lambda finished: self._ended(finished, steps[finished.job]),
            runner=self.runner,
        )

    def _job(self, step: _Step) -> Job:
        made, verb, log = step.made, step.verb, step.made.folder / "log.txt"
        if verb in ("prepare", "baseline", "fit"):
            # Decided first: writing our own files must not look like the traces of a run.
            resume = verb != "baseline" and any((made.folder / name).exists() for name in _TRACES)
            self._write_record(made)
            self._write_commands(made, [made.fit, *([made.export] if isinstance(made, Preparation) else [])])
            title = f"prepare {made.name}" if isinstance(made, Preparation) else self._title(made)
            line = (*self.command, *made.fit, *(("--resume",) if resume else ()))
            return Job(title=title, command=line, log=log, append=resume)
        if isinstance(made, Preparation):
            return Job(title=f"export {made.name}", command=(*self.command, *made.export), log=log, append=True)
        self._write_commands(made, [made.fit, made.test])
        return Job(title=f"test {self._title(made)}", command=(*self.command, *made.test), log=log, append=True)

    def _ended(self, finished: Finished, step: _Step) -> str:
        """Note how a process ended and word it; a good exit code without the result that belongs to it is a failure."""
        del self.underway[step.made.folder]
        folder, title, log_tail = step.made.folder, finished.job.title, finished.tail or "(the log is empty)"
        result, damage = _left(folder, step.verb, self.study.metric)
        if finished.code == 0 and result:
            self.ledger.note(step.verb, folder)
            return f"done    {title}  {result}  {finished.seconds:.0f} s"
        if finished.code == 0:
            log_tail += f"\n{step.verb} ended with exit code 0 but left no result{damage}"
        self.failures[folder] = Failure(verb=step.verb, code=finished.code, tail=log_tail)
        indented = "\n".join(f"        {line}" for line in log_tail.splitlines())
        return f"FAILED  {title}  exit code {finished.code}, log: {finished.job.log}\n{indented}"

    def _read(self, trial: Trial) -> Run:
        failure = self.failures.get(trial.folder)
        folder, metric = trial.folder, self.study.metric
        metrics = _readable(folder, metric)[0] if failure else read_metrics(folder, metric)
        return Run(trial=trial, metrics=metrics, chosen=False, failure=failure)

    def _write_commands(self, made: Trial | Preparation, lines: Sequence[Sequence[str]]) -> None:
        made.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(shlex.join((*self.command, *line)) + "\n" for line in lines)
        (made.folder / "command.txt").write_text(text, encoding="utf-8")

    def _write_record(self, made: Trial | Preparation) -> None:
        made.folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps({**record_of(made), "side_by_side": self.width}, indent=2)
        (made.folder / "trial.json").write_text(record + "\n", encoding="utf-8")

    def _title(self, trial: Trial) -> str:
        rate = "" if trial.setting is None else f" lr {trial.setting.words}"
        return f"{self.study.labels[trial.recipe]} {trial.method}{rate} seed {trial.seed}"

    def _announce(self, stage: str, number: int, there: int, what: str = "runs") -> None:
        line = f"{stage}: {number} {what}, {there} of them there already"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _left(folder: Path, verb: str, metric: str) -> tuple[str, str]:
    """Word what a process left, "" where it is not what it was to leave; and why, where a record cannot be read."""
    if verb == "export":
        return (f"as {folder / ADAPTER}" if (folder / ADAPTER).is_dir() else ""), ""
    # A preparation is of another task than the study's, which need not know the study's metric.
    metrics, damage = _readable(folder, "" if verb == "prepare" else metric)
    if metrics is None or not metrics.fitted:
        return "", f" in metrics.json{damage}"
    split, numbers = ("val", metrics.val) if verb in ("prepare", "fit") else ("test", metrics.test or {})
    score = f"{split} {metrics.primary} {numbers.get(metrics.primary, float('nan')):.4f}"
    return (score if numbers else ""), " in metrics.json"


def _readable(folder: Path, metric: str) -> tuple[Metrics | None, str]:
    """Read what a process left: None and why where it left no record that can be read."""
    try:
        return read_metrics(folder, metric), ""
    except GraftError as error:
        return None, f": {error}"


def _has_fit(folder: Path) -> bool:
    metrics = read_metrics(folder)
    return metrics is not None and metrics.fitted


def _fitted(run: Run) -> bool:
    return run.metrics is not None and run.metrics.fitted and run.failure is None


def _measured(run: Run) -> bool:
    return run.metrics is not None and run.metrics.test is not None


def _write(study: Study, blocks: Sequence[Block], findings: Sequence[Finding], console: Console) -> int:
    standing, out = stand(blocks), study.out
    write_csv(blocks, out / "results.csv")
    write_markdown(study.title, blocks, standing, findings, out / "results.md")
    write_report(study, blocks, standing, findings, out / "report.html")
    print_table(study.title, blocks, console)
    runs = [run for block in blocks for run in block.runs]
    failed = sum(run.failure is not None for run in runs)
    if failed:
        console.print(f"{failed} of {len(runs)} runs failed: see above and the report.", highlight=False)
    for finding in findings:
        line = f"{'NOT TO BE BELIEVED' if finding.broken else 'Note'}: {finding.text}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return 1 if failed or any(finding.broken for finding in findings) else 0

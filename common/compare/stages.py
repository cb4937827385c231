"""The course of a study: prepare, baselines, tune, choose, repeat over seeds, test what was chosen, write the results.

Every step is a command that a person can run again: it is written to `command.txt` in the run folder. A study that
was stopped goes on where it was; a run folder that came from another command is refused, never overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from common._yaml import load_yaml
from common.compare.evidence import Block, make_blocks, stand
from common.compare.forked_runner import local_runner
from common.compare.integrity import Finding, check
from common.compare.ledger import Ledger
from common.compare.prepared import ADAPTER, Preparation, adapter_digest
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
    """

    runner: str = LOCAL
    parquet: bool = False


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
        _refuse_foreign_folders(study)
    if options.parquet:
        need_parquet("--parquet")
    runner = _runner(options.runner, width, command)
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


def _runner(name: str, width: int, command: Sequence[str]) -> Runner:
    if name not in RUNNERS:
        raise unknown("runner", name, RUNNERS)
    if name == LOCAL:
        return local_runner(command)
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
class _Session:
    """One call of `compare`: the study, how its processes run, and what failed so far."""

    study: Study
    command: tuple[str, ...]
    width: int
    console: Console
    ledger: Ledger
    runner: Runner
    failures: dict[Path, Failure] = field(default_factory=dict[Path, Failure])

    def run(self) -> list[Run]:
        """Take the study through its stages; return every run of it."""
        self.ledger.adopt([made.folder for made in (*self.study.needed(), *self.study.possible())])
        self._prepare()
        untrained = self._fit(self.study.untrained(), "baselines") if self.study.baselines else []
        tuned = self._fit(self.study.tuning(), "tuning")
        winners = self._winners(tuned)
        fitted = self._fit([trial for trial in winners if trial.seed not in self.study.tune_seeds], "repeating")
        chosen = [trial for trial in winners if trial.seed in self.study.seeds]
        self._test(chosen)
        folders = {trial.folder for trial in (*chosen, *self.study.untrained())}
        runs = [self._read(run.trial) for run in (*untrained, *tuned, *fitted)]
        return [replace(run, chosen=run.trial.folder in folders) for run in runs]

    def _prepare(self) -> None:
        """Fit and export what methods start from; what starts from something that failed fails with its words."""
        needed = self.study.needed()
        todo = [one for one in needed if not one.adapter.is_dir()]
        if not needed:
            return
        self._say(f"preparing: {len(needed)} adapters, {len(needed) - len(todo)} of them there already")
        jobs: dict[Path, Job] = {}
        for one in todo:
            if not _has_fit(one.folder):
                jobs[one.folder] = self._fit_job(one, f"prepare {one.name}")
        self._run(jobs, "prepare")
        exports: dict[Path, Job] = {}
        for one in todo:
            if one.folder not in self.failures:
                line, log = (*self.command, *one.export), one.folder / "log.txt"
                exports[one.folder] = Job(title=f"export {one.name}", command=line, log=log, append=True)
        self._run(exports, "export")
        _refuse_foreign_folders(self.study)  # now that the adapters are there to be compared

    def _winners(self, tuned: Sequence[Run]) -> list[Trial]:
        """The runs with the chosen settings: the tuned ones and the seeds still to fit."""
        winners: list[Trial] = []
        for recipe in self.study.recipes:
            for method in self.study.methods:
                own = [run for run in tuned if (run.trial.recipe, run.trial.method) == (recipe, method.name)]
                setting = choose(own)
                if setting is None:
                    continue
                seeds = dict.fromkeys((*self.study.tune_seeds, *self.study.seeds))
                winners += [self.study.trial(recipe, method, setting, seed) for seed in seeds]
        return winners

    def _fit(self, trials: Sequence[Trial], stage: str) -> list[Run]:
        runs = {trial.folder: self._read(trial) for trial in trials}
        todo = [trial for trial in trials if not _fitted(runs[trial.folder])]
        self._say(f"{stage}: {len(trials)} runs, {len(trials) - len(todo)} of them there already")
        jobs: dict[Path, Job] = {}
        for trial in todo:
            lost = next((self.failures[one.folder] for one in trial.prepared if one.folder in self.failures), None)
            if lost:
                self.failures[trial.folder] = lost
            else:
                jobs[trial.folder] = self._fit_job(trial, self._title(trial), resumes=not trial.baseline)
        self._run(jobs, "baseline" if stage == "baselines" else "fit")
        return [self._read(trial) for trial in trials]

    def _fit_job(self, made: Trial | Preparation, title: str, *, resumes: bool = True) -> Job:
        # Decided first: writing our own files must not look like the traces of a run.
        resume = resumes and any((made.folder / name).exists() for name in _TRACES)
        self._write_commands(made, [made.fit, *([made.export] if isinstance(made, Preparation) else [])])
        line = (*self.command, *made.fit, *(("--resume",) if resume else ()))
        return Job(title=title, command=line, log=made.folder / "log.txt", append=resume)

    def _test(self, trials: Sequence[Trial]) -> None:
        fitted = [run for run in map(self._read, trials) if _fitted(run)]
        todo = [run.trial for run in fitted if run.metrics is not None and run.metrics.test is None]
        self._say(f"testing: {len(fitted)} runs, {len(fitted) - len(todo)} of them there already")
        jobs: dict[Path, Job] = {}
        for trial in todo:
            self._write_commands(trial, [trial.fit, trial.test])
            title, line = f"test {self._title(trial)}", (*self.command, *trial.test)
            jobs[trial.folder] = Job(title=title, command=line, log=trial.folder / "log.txt", append=True)
        self._run(jobs, "test")

    def _run(self, jobs: Mapping[Path, Job], verb: str) -> None:
        """Run jobs and note which failed; a good exit code without the result that belongs to it is a failure."""
        if not jobs:
            return
        folders = {id(job): folder for folder, job in jobs.items()}

        def describe(finished: Finished) -> str:
            folder, title = folders[id(finished.job)], finished.job.title
            result, damage = _left(folder, verb, self.study.metric)
            if finished.code == 0 and result:
                self.ledger.note(verb, folder)
                return f"done    {title}  {result}  {finished.seconds:.0f} s"
            log_tail = finished.tail or "(the log is empty)"
            if finished.code == 0:
                log_tail += f"\n{verb} ended with exit code 0 but left no result{damage}"
            self.failures[folder] = Failure(verb=verb, code=finished.code, tail=log_tail)
            indented = "\n".join(f"        {line}" for line in log_tail.splitlines())
            return f"FAILED  {title}  exit code {finished.code}, log: {finished.job.log}\n{indented}"

        threads = max(1, cpu_count() // self.width)
        run_jobs(
            list(jobs.values()),
            width=self.width,
            threads=threads,
            console=self.console,
            describe=describe,
            runner=self.runner,
        )

    def _read(self, trial: Trial) -> Run:
        failure = self.failures.get(trial.folder)
        folder, metric = trial.folder, self.study.metric
        metrics = _readable(folder, metric)[0] if failure else read_metrics(folder, metric)
        return Run(trial=trial, metrics=metrics, chosen=False, failure=failure)

    def _write_commands(self, made: Trial | Preparation, lines: Sequence[Sequence[str]]) -> None:
        made.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(shlex.join((*self.command, *line)) + "\n" for line in lines)
        (made.folder / "command.txt").write_text(text, encoding="utf-8")
        if lines[-1][0] != "test":
            record = json.dumps({**_record(made), "side_by_side": self.width}, indent=2)
            (made.folder / "trial.json").write_text(record + "\n", encoding="utf-8")

    def _title(self, trial: Trial) -> str:
        rate = "" if trial.setting is None else f" lr {trial.setting.words}"
        return f"{self.study.labels[trial.recipe]} {trial.method}{rate} seed {trial.seed}"

    def _say(self, line: str) -> None:
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


def _refuse_foreign_folders(study: Study) -> None:
    """Raise one error for every run folder that came from another command than this study's."""
    problems: list[str] = []
    digest = functools.cache(adapter_digest)  # of many trials that start from one adapter
    for made in (*study.needed(), *study.possible()):
        stored = made.folder / "trial.json"
        if stored.exists():
            problem = _foreign(json.loads(stored.read_text(encoding="utf-8")), _record(made, digest))
            problems += [f"'{made.folder}' {problem}"] if problem else []
        elif (made.folder / "metrics.json").exists():
            problems.append(f"'{made.folder}' holds a run that this study did not start")
    if problems:
        lines = "".join(f"\n- {problem}." for problem in problems)
        raise GraftError(f"Results of different commands cannot be mixed. Delete these or give another --out:{lines}")


def _record(made: Trial | Preparation, digest: Callable[[Path], str] = adapter_digest) -> dict[str, Any]:
    """What trial.json says: the command without its folder, which may move, the recipe, and what it starts from."""
    recipe = json.dumps(load_yaml(Path(made.recipe)), sort_keys=True, default=str)
    record = {"arguments": list(made.stated), "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest()}
    starts = {one.name: {**_record(one), "adapter": digest(one.folder)} for one in made.prepared}
    return record | ({"prepared": starts} if starts else {})


def _foreign(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in what a stored trial is another one; how many ran side by side makes none."""
    if any(stored.get(key) != now[key] for key in ("arguments", "recipe_sha256")):
        return "was made by another command or an earlier text of its recipe"
    before, starts = stored.get("prepared", {}), now.get("prepared", {})
    for name in {**before, **starts}:
        one, other = dict(before.get(name, {})), dict(starts.get(name, {}))
        if not other.get("adapter"):  # which is not there at the moment
            one["adapter"] = other["adapter"] = ""
        if one != other:
            return f"started from another '{name}' than the study's"
    return ""


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

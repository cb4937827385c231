"""`graft fit`, `validate`, `test` and `baseline`: a recipe, read by LightningCLI, run in a folder."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from common import run as runs
from common._record import CONFIG
from common._yaml import Loader
from common.cli._explain import check_recipe, explain, own_error
from common.domain import Domain
from common.errors import GraftError, unknown
from common.methods import METHODS, MethodSpec
from common.task import AdaptedTask

Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"]

# YAML 1.1 reads the key `on:` of every recipe as the boolean true; see common/_yaml.py.
jsonargparse.set_loader("yaml12", lambda text: yaml.load(text, Loader=Loader), exceptions=(yaml.YAMLError,))
jsonargparse.set_dumper("yaml12", lambda data: yaml.safe_dump(data, sort_keys=False, default_flow_style=False))


# What libraries warn of although it is meant so, or is none of the user's business.
_NOISE = (
    ".*does not have many workers.*",
    ".*eval mode at the start.*",
    ".*GPU available but not used.*",
    ".*callbacks used to create the checkpoint.*",  # costs are measured while fitting only
    ".*Specified to not save vera_A.*",  # they are drawn again from the seed
    r".*isinstance\(treespec, LeafSpec\).*",
)


class RecipeTrainer(L.Trainer):
    """The trainer's arguments as a recipe may give them; the trainer itself is built by `common.run`.

    Args:
        precision: `auto` computes in bfloat16 where the machine does so in hardware, else in single precision.
        **kwargs: As `lightning.Trainer` takes them.
    """

    def __init__(self, *, precision: Precision = "auto", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(precision=precision, **kwargs)  # ty: ignore[invalid-argument-type]


class RecipeCLI(LightningCLI):
    """LightningCLI with a top-level `peft:` block, a run folder, and no verbs of its own."""

    trainer_options: dict[str, Any]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a recipe says beside model, data and trainer."""
        parser.add_subclass_arguments(MethodSpec, "peft", required=True, help="The PEFT method and its settings.")
        parser.link_arguments("peft", "model.init_args.peft", apply_on="instantiate")
        parser.add_argument("--run", type=Path | None, default=None, help="The run's folder (default runs/<recipe>).")
        parser.add_argument("--resume", action="store_true", help="Go on from the folder's last.ckpt, if there is one.")
        parser.add_argument("--save_every", type=int, default=0, help="Also save after this many steps in an epoch.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse, and check the seed, which Lightning sets before anything else."""
        super().parse_arguments(parser, args)
        seed = int(self.config.seed_everything)
        if not 0 <= seed < 2**32:
            raise GraftError(f"seed_everything is {seed}; give a whole number from 0 to 2^32 - 1.")

    def before_instantiate_classes(self) -> None:
        """Give the one seed of the recipe to task and data."""
        for part in ("model", "data"):
            arguments = self.config[part].init_args
            if "seed" in arguments:
                arguments.seed = int(self.config.seed_everything)

    def instantiate_trainer(self, **kwargs: Any) -> Any:  # noqa: ANN401
        """Keep the trainer's arguments for `common.run`, which adds Graft's callbacks and plugins."""
        self.trainer_options = dict(self._get(self.config_init, "trainer", default={}))
        return None

    def dump(self) -> str:
        """Return the complete configuration as YAML, without what belongs to one call alone."""
        config = self.config.clone()
        for key in ("config", "resume", "run"):
            config.pop(key, None)
        return self.parser.dump(config, skip_validation=True)


def run(verb: str, argv: Sequence[str], domains: Mapping[str, Domain]) -> int:
    """Run one of the verbs `fit`, `preview`, `validate`, `test`, `baseline`.

    Raises:
        GraftError: The recipe, the data or the run cannot be used as asked.
        KeyboardInterrupt: The user stopped it.
    """
    try:
        return _run(verb, argv, domains)
    except MisconfigurationException as error:
        raise GraftError(f"The trainer refuses this recipe: {' '.join(str(error).split())}") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into an exit of its own
            raise error.__context__ from None
        raise


def _run(verb: str, argv: Sequence[str], domains: Mapping[str, Domain]) -> int:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for noise in _NOISE:
            warnings.filterwarnings("ignore", message=noise)
        for domain in domains.values():
            domain.load_all()
        if verb == "fit":
            return _fit(argv)
        if verb == "baseline":
            return _baseline(argv, domains)
        if verb == "preview":
            from common.cli import preview

            return preview.run(argv)
        cli = _parse(verb, _saved_arguments(argv))
        action = runs.test if verb == "test" else runs.validate
        record = action(cli.model, cli.datamodule, cli.config.run, **_place(cli))
        return _report(cli.config.run, "test" if verb == "test" else "val", record)


def _fit(argv: Sequence[str]) -> int:
    resumed = "--resume" in argv and not _given(argv, "--config", "-c")
    cli = _parse("fit", _saved_arguments(argv) if resumed else argv)
    folder = cli.config.run or Path("runs") / _recipe(cli).stem
    options = {"resume": cli.config.resume, "save_every": cli.config.save_every, "recipe": str(_recipe(cli))}
    record = runs.fit(cli.model, cli.datamodule, folder, config=cli.dump(), **options, **cli.trainer_options)
    return _report(folder, "val", record)


def _baseline(argv: Sequence[str], domains: Mapping[str, Domain]) -> int:
    """Run `graft baseline NAME --config RECIPE`; only a call for help may go without the name."""
    if argv and argv[0] in ("--help", "-h"):
        _parse("baseline", argv)
    if not argv or argv[0].startswith("-"):
        raise GraftError(
            "Say which baseline: graft baseline NAME --config RECIPE --run FOLDER. `graft list baselines` names them."
        )
    name = argv[0]
    cli = _parse("baseline", argv[1:])
    if cli.config.resume:
        raise GraftError("A baseline runs in one go and cannot be resumed. Leave --resume out.")
    domain = cli.model.domain
    if domain not in domains:
        raise unknown("domain", domain, domains)
    function = domains[domain].load_baseline(name)
    folder = cli.config.run or Path("runs") / f"{_recipe(cli).stem}-{name}"
    options = {"config": cli.dump(), "recipe": str(_recipe(cli))}
    record = runs.baseline(cli.model, cli.datamodule, folder, name, function, **options, **_place(cli))
    console = Console(highlight=False, soft_wrap=True)
    for stage in ("val", "test") if record["val"] else ("test",):
        console.print(_quality(folder, stage, record))
    console.print(f"{name} is not trained  {record['cost']['fit_seconds']:.1f} s")
    return 0


def _place(cli: RecipeCLI) -> dict[str, Any]:
    """Return the trainer's arguments that say where and how exactly to compute, not how to train."""
    return {k: v for k, v in cli.trainer_options.items() if k in ("accelerator", "devices", "precision")}


def _report(folder: Path, stage: str, record: Mapping[str, Any]) -> int:
    cost = record["cost"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(_quality(folder, stage, record))
    console.print(
        f"trainable {cost['params_trainable']:,} ({cost['trainable_percent']:.3f} %)  "
        f"training memory {cost['train_memory']['total'] / 1e6:.1f} MB  "
        f"{cost['fit_seconds']:.1f} s  adapter {cost['adapter_bytes']:,} bytes"
    )
    return 0


def _quality(folder: Path, stage: str, record: Mapping[str, Any]) -> str:
    return f"{folder}: {stage}  " + "  ".join(f"{name} {value:.4f}" for name, value in record[stage].items())


def _recipe(cli: RecipeCLI) -> Path:
    given = cli.config.get("config") or []
    return Path(str(given[-1])) if given else Path("recipe")


def _saved_arguments(argv: Sequence[str]) -> list[str]:
    """Put a run's own configuration before the arguments of `validate` and `test`."""
    if "--help" in argv or "-h" in argv:
        return list(argv)
    given = _given(argv, "--run")
    if not given:
        raise GraftError("Say which run: add --run runs/NAME.")
    folder = Path(given[-1])
    config = folder / CONFIG
    if not config.is_file():
        raise GraftError(f"{folder} is not the folder of a run ({CONFIG} is missing). Start it with `graft fit`.")
    return ["--config", str(config), *argv]


def _given(argv: Sequence[str], *flags: str) -> list[str]:
    """Return the values of a flag, written as `--flag value` or `--flag=value`."""
    after = [value for flag, value in itertools.pairwise(argv) if flag in flags]
    return after + [text.partition("=")[2] for text in argv if text.partition("=")[0] in flags and "=" in text]


def _whole_methods(argv: Sequence[str]) -> list[str]:
    """Write out every setting of a method that `--peft` gives.

    jsonargparse would keep those of the recipe's method that the new one has too, such as `on`, and another method
    would be measured than the one that was named.
    """
    words = list(argv)
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag != "--peft" or (not equals and place + 1 == len(words)):
            continue
        whole = _whole_method(value if equals else words[place + 1])
        if equals:
            words[place] = f"--peft={whole}"
        else:
            words[place + 1] = whole
    return words


def _whole_method(text: str) -> str:
    """Return a method with all its settings as JSON; what is none is returned as it is, for the parser to refuse."""
    try:
        given = yaml.load(text, Loader)
    except yaml.YAMLError:
        return text
    given = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(given, dict) or given.keys() - {"class_path", "init_args"}:
        return text
    name, settings = str(given.get("class_path", "")).rpartition(".")[2], given.get("init_args") or {}
    if name not in METHODS or not isinstance(settings, dict):
        return text
    defaults = METHODS[name]().describe()["init_args"]
    return json.dumps({"class_path": given["class_path"], "init_args": defaults | settings})


def _parse(verb: str, argv: Sequence[str]) -> RecipeCLI:
    argv = _whole_methods(argv)
    for path in _given(argv, "--config", "-c"):
        check_recipe(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            return RecipeCLI(
                AdaptedTask,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                trainer_class=RecipeTrainer,
                run=False,
                args=list(argv),
                save_config_callback=None,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                parser_kwargs={
                    "parser_mode": "yaml12",
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    "prog": f"graft {verb}",
                },
            )
    except jsonargparse.ArgumentError as error:
        raise (own_error(error) or explain(str(error))) from error
    except ValueError as error:
        if mine := own_error(error):
            raise mine from error
        raise

"""Which command a run folder came from: what its trial.json says, and which folders a study must not touch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common._yaml import load_yaml
from common.compare.prepared import Preparation, adapter_digest
from common.compare.study import Study, Trial
from common.errors import GraftError


def refuse_foreign_folders(study: Study) -> None:
    """Raise one error for every run folder that came from another command than this study's."""
    problems: list[str] = []
    digest = functools.cache(adapter_digest)  # of many trials that start from one adapter
    for made in (*study.needed(), *study.possible()):
        stored = made.folder / "trial.json"
        if stored.exists():
            problem = _foreign(json.loads(stored.read_text(encoding="utf-8")), record_of(made, digest))
            problems += [f"'{made.folder}' {problem}"] if problem else []
        elif (made.folder / "metrics.json").exists():
            problems.append(f"'{made.folder}' holds a run that this study did not start")
    if problems:
        lines = "".join(f"\n- {problem}." for problem in problems)
        raise GraftError(f"Results of different commands cannot be mixed. Delete these or give another --out:{lines}")


def record_of(made: Trial | Preparation, digest: Callable[[Path], str] = adapter_digest) -> dict[str, Any]:
    """What trial.json says: the command without its folder, which may move, the recipe, and what it starts from."""
    recipe = json.dumps(load_yaml(Path(made.recipe)), sort_keys=True, default=str)
    record = {"arguments": list(made.stated), "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest()}
    starts = {one.name: {**record_of(one), "adapter": digest(one.folder)} for one in made.prepared}
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

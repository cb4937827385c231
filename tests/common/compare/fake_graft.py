"""A stand-in for `graft`: it trains nothing and writes what `world.json`, beside its recipe, says it measured.

The world: {"val": {method: {lr: number, or {seed: number}}}, "test": {method: {seed: number}},
"fail": [[verb, method, lr, seed], ...], "silent": (the same, ending well but without a result), "sleep": seconds,
"awaits": [[verb, method, lr, seed, the run folder that it waits for to be fitted], ...],
"classes": [...], "pictures": [...], "rows": {method: [row of predictions.jsonl, ...]}, "mode": "max",
"shared": {"train-test": n}, "garbage": {method: what stands in metrics.json}, "named_splits": whether the test split is
told by `data.name`}.
The accuracy is that of the answers, where there are any; then every seed's is.
A trial with a weight decay is "lr decay" under "val". Every call is noted in calls.jsonl, beside it.
A baseline has no learning rate: it is "-" in the lists, and "val" has its number instead of rates.
An export writes the run's options as its tensors; a fit of a method with `first` needs such a folder.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    verb, *words = sys.argv[1:]
    name = words.pop(0) if verb == "baseline" else ""
    flags = {"--resume"} & set(words)
    words = [word for word in words if word not in flags]
    if verb == "export":
        words = ["--run", words[0], "--out", words[1]]
    options = dict(zip(words[::2], words[1::2], strict=True))
    run = Path(options["--run"])
    if verb in ("test", "export"):
        options = {**json.loads((run / "options.json").read_text()), **options}
    recipe_path = Path(options["--config"])
    world = json.loads((recipe_path.parent / "world.json").read_text())
    peft = json.loads(options["--peft"]) if not name else {"class_path": name, "init_args": {}}
    method, lr, seed = peft["class_path"], options.get("--model.optim.lr", "-"), options["--seed_everything"]
    with (recipe_path.parent / "calls.jsonl").open("a") as calls:
        record = {"verb": verb, "recipe": recipe_path.name, "method": method, "lr": lr, "seed": seed}
        record |= {"resume": bool(flags), "options": options, "threads": os.environ.get("OMP_NUM_THREADS")}
        record |= {"process": os.getpid()}
        calls.write(json.dumps(record) + "\n")
    run.mkdir(parents=True, exist_ok=True)
    print(f"{verb} {method} begins")  # noqa: T201
    if world.get("sleep"):
        (run / "last.ckpt").write_text("half way")
        time.sleep(world["sleep"])
    awaited = [
        Path(folder, "metrics.json") for *call, folder in world.get("awaits", []) if call == [verb, method, lr, seed]
    ]
    patience = time.monotonic() + 20
    while not all(path.exists() for path in awaited):
        if time.monotonic() > patience:
            return 5
        time.sleep(0.01)
    if [verb, method, lr, seed] in world.get("fail", []):
        print("Traceback: the loss is <not> a number", file=sys.stderr)  # noqa: T201
        return 3
    if [verb, method, lr, seed] in world.get("silent", []):
        return 0
    first = peft.get("init_args", {}).get("first")
    if first and not (Path(first) / "adapter_model.safetensors").is_file():
        return 4
    if verb == "export":
        Path(options["--out"]).mkdir()
        text = (run / "options.json").read_text() + world.get("rounding", "")
        (Path(options["--out"]) / "adapter_model.safetensors").write_text(text)
        return 0
    path = run / "metrics.json"
    rows = world.get("rows", {}).get(method)
    if rows is not None:
        (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if verb == "baseline":
        metrics = describe(world, recipe_path, peft, None, int(seed), options) | {"baseline": True, "backbone": ""}
        metrics["test"] = {"accuracy": world["test"][method][seed], "macro_f1": 0.1}
    elif verb == "fit":
        (run / "options.json").write_text(json.dumps(options))
        metrics = describe(world, recipe_path, peft, float(lr), int(seed), options)
    else:
        metrics = json.loads(path.read_text())
        metrics["test"] = {**metrics["val"], "accuracy": world["test"][method][seed]}
        if world.get("pictures"):
            lines = [predict(world, method, index) for index in range(len(world["pictures"]))]
            (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = (run / "predictions.jsonl").read_text().splitlines() if (run / "predictions.jsonl").exists() else []
    answers = [json.loads(line) for line in lines]
    if metrics["test"] and answers and all(isinstance(row.get("prediction"), str) for row in answers):
        metrics["test"]["accuracy"] = sum(row["prediction"] == row["label"] for row in answers) / len(answers)
    path.write_text(world.get("garbage", {}).get(method) or json.dumps(metrics))
    return 0


def describe(world: dict, recipe_path: Path, peft: dict, lr: float | None, seed: int, options: dict) -> dict:
    method = peft["class_path"]
    measured, decay = world["val"][method], options.get("--model.optim.weight_decay")
    score = measured if lr is None else measured[f"{lr:g}" if decay is None else f"{lr:g} {decay}"]
    score = score[str(seed)] if isinstance(score, dict) else score
    share = {"FullFineTune": 1.0, "LoRA": 0.0067, "BitFit": 0.0024, "LinearProbe": 0.00026}.get(method, 0.005)
    params = 22_056_576
    parts = {
        "weights": 4 * params,
        "gradients": int(4 * params * share),
        "optimizer": int(8 * params * share),
        "activations": 20_000_000 if method == "LinearProbe" else 310_000_000,
    }
    return {
        "schema": 1,
        "recipe": str(recipe_path),
        "domain": "vision",
        "task": "ImageClassification",
        "backbone": "vit-small-patch14-focus",
        "method": peft,
        "optim": {"lr": lr},
        "seed": seed,
        "primary": {"name": "accuracy", "mode": world.get("mode", "max")},
        "status": "fitted",
        "val": {
            "accuracy": score,
            "macro_f1": 0.5,
            **({"cer_lower": score} if world.get("characters") else {}),
            "loss": 1.0,
        },
        "test": None,
        "cost": {"params_total": None, "params_trainable": 0, "trainable_percent": 0.0, "train_memory": None}
        | {"flops_per_step": None, "step_seconds": None, "steps": 0, "fit_seconds": 7.0 + seed, "adapter_bytes": None}
        if lr is None
        else {
            "params_total": params,
            "params_trainable": int(params * share),
            "trainable_percent": 100 * share,
            "train_memory": {**parts, "total": sum(parts.values())},
            "flops_per_step": 200_000_000_000,
            "step_seconds": 0.4 + seed / 10,
            "batch_size": 32,
            "steps": 95,
            "fit_seconds": 60.0 + seed + 100 * (seed == 2),  # as if other work had run beside it
            "adapter_bytes": 600_000,
            "head_bytes": 30_000,
            "backbone_bytes": 4 * params,
            "peak_cuda_bytes": None,
        },
        "data": {
            "name": "OpenClipart",
            "digest": world.get("digests", {}).get(str(seed), "d1"),
            "train": 700,
            "val": 200,
            "test": 400,
        }
        | ({"splits": {"test": options["--data.name"]}} if world.get("named_splits") else {})
        | {"classes": world.get("classes", ["birds", "bugs"]), "shared": world.get("shared", {})},
        "environment": {"graft": "0.1.0", "device": "cpu", "precision": "32-true"},
    }


def predict(world: dict, method: str, index: int) -> dict:
    """Method number m is right on every picture whose number is not below m in turns of four."""
    classes = world["classes"]
    truth = classes[index % len(classes)]
    rank = sorted(world["val"]).index(method)
    right = (index % 4 != 3 and (index + rank) % 5 != 0) or index % 4 == 0
    answer = truth if right else classes[(index + 1 + rank) % len(classes)]
    picture = world["pictures"][index]
    return {"id": f"{index}", "label": truth, "prediction": answer, "probability": 0.61, "path": picture}


if __name__ == "__main__":
    sys.exit(main())

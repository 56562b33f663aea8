"""Makes one run, in a process of its own: `python -m experiments.worker FOLDER`, as its job.json says.

Trains as `train.py` does, which continues a run that was stopped, then evaluates as `eval.py` does, and writes what
the record needs to measured.json.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.plan import as_text, weights_files
from experiments.records import JOB, MAX_BYTES, MEASURED
from vmoe.data.config import SourceConfig
from vmoe.training.config import Config, flat_settings, flatten, with_one_length
from vmoe.utils.config import ConfigError, read_config
from vmoe.utils.files import read_json


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of train.py, or of eval.py."""
    from vmoe.cli import train
    from vmoe.cli.command import exit_code

    [folder] = map(Path, sys.argv[1:] if argv is None else argv)
    job = read_json(folder / JOB, kind=dict)
    if code := exit_code("experiments", lambda: prepare(folder, read_config(Config, with_one_length(job["train"])))):
        return code
    code = train.main(job["train"])
    if code or not (folder / "summary.json").is_file():  # 0 without a summary: a planned stop
        return code
    return exit_code("experiments", lambda: make_evaluations(folder, job["evaluate"]))


def prepare(folder: Path, config: Config) -> None:
    """Writes what is known before the run; ConfigError: it has begun with other data or weights."""
    from vmoe.evaluation.results_file import write_json

    file = folder / MEASURED
    before = read_json(file, MAX_BYTES, dict) if file.is_file() else {}
    finished = (folder / "summary.json").is_file()  # without inputs: by an older version
    found = before.get("inputs", {}) if finished else inputs_of(config)
    for key, fingerprint in before.get("inputs", found).items():
        if found.get(key) != fingerprint:
            raise ConfigError(f"{key} is not what it was when the run began; restore it, or remove {folder}")
    about = {} if finished and before else about_here(config.device)
    write_json({"evaluations": {}, "inputs": found, **before, **about}, file)


def inputs_of(config: Config) -> dict[str, str]:
    """{setting: fingerprint} of the data and the weights that a run reads."""
    from vmoe.data import build_dataset
    from vmoe.evaluation.loaded_model import weights_fingerprint
    from vmoe.models.serialization import find_weights

    found = {}
    for key, source in (("data.train", config.data.train), ("data.val", config.data.val)):
        try:
            if source.type is not None:
                found[key] = build_dataset(source).fingerprint()
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None
    for key, path in weights_files(flat_settings(config)).items():
        found[key] = weights_fingerprint(find_weights(path))
    return found


def make_evaluations(folder: Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Makes the evaluations that measured.json lacks."""
    from vmoe.evaluation.results_file import write_json

    file = folder / MEASURED
    measured = read_json(file, MAX_BYTES, dict)
    own = val_arguments(folder)
    wanted = {**({"val": {"command": "eval", "arguments": own, "digest": "val"}} if own else {}), **wanted}
    for name, one in wanted.items():
        if measured["evaluations"].get(name, {}).get("digest") == one["digest"]:
            continue
        print(f"evaluation {name}", flush=True)
        together = [str(folder), one["with"]] if "with" in one else str(folder)
        words = [*one["arguments"], "--checkpoint", as_text(together)]
        found = inspect(folder, name, words) if one["command"] == "inspect" else run_eval(folder, name, words)
        measured["evaluations"][name] = {"digest": one["digest"], **found}
        write_json(measured, file)


def run_eval(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """The results of eval.py, which images were right, and the fingerprint of the data."""
    from vmoe.cli import evaluate
    from vmoe.evaluation.config import EvaluationConfig

    output = folder / f"evaluation_{name}.json"
    report = evaluate.run(read_config(EvaluationConfig, [*words, "--output", str(output)], folder="eval"))
    samples = output.with_name(f"evaluation_{name}_samples.csv")
    correct = packed_correct(samples) if samples.is_file() else None
    return {"results": report["results"], "data": report["data"]["fingerprint"], "correct": correct}


def packed_correct(samples: Path) -> str:
    """Which images of a table of samples are right: a bit for each index (`numpy.packbits`), as base64."""
    with open(samples, encoding="utf-8", newline="") as file:
        right = {int(row["index"]): row.get("top1") == "1" for row in csv.DictReader(file)}
    bits = [right.get(index, False) for index in range(max(right, default=-1) + 1)]
    return base64.b64encode(np.packbits(bits)).decode()


def inspect(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """The mean over the layers of the numbers that vmoe-inspect has of each layer."""
    from vmoe.cli import inspect_routing

    output, values = folder / f"inspection_{name}", defaultdict(list)
    inspect_routing.run(inspect_routing.settings([*words, "--output_dir", str(output)]))
    for layer in read_json(output / "statistics.json", MAX_BYTES, dict)["layers"]:
        found = flatten({**layer["modalities"], "class_information": layer.get("class_information") or {}})
        for key, value in found.items():
            if isinstance(value, int | float):
                values[key.replace(".", "/")].append(value)
    return {"results": {key: fmean(numbers) for key, numbers in values.items()}}


def val_arguments(folder: Path) -> list[str]:
    """The command line of eval.py for the accuracy on data.val; empty if the run has none."""
    config = read_config(Config, ["--config", str(folder / "config.yaml")])
    if "top1" not in read_json(folder / "summary.json", kind=dict)["evaluation"]:
        return []
    plain = dataclasses.asdict(SourceConfig())
    data = {key: value for key, value in dataclasses.asdict(config.data.val).items() if value != plain[key]}
    settings = {"data": data, "loader.batch_size": config.evaluate.batch_size, "device": config.device}
    settings |= {"loader.on_bad": config.evaluate.on_bad, "loader.num_workers": config.data.loader.num_workers}
    settings["task"] = "classification"
    if config.task == "contrastive":
        settings |= {"task": "zero_shot", "templates": config.evaluate.templates}
    return [word for key, value in settings.items() for word in (f"--{key}", as_text(value))]


def about_here(device: str) -> dict[str, Any]:
    """The machine and the code: device, threads, torch, commit."""
    import torch

    from benchmarks.machine import device_name, revision
    from vmoe.evaluation.inference import pick_device

    name = device_name(pick_device(device))
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__), **revision()}


if __name__ == "__main__":
    sys.exit(main())

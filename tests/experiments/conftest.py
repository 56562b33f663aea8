"""An experiment in a temporary folder, and a worker that trains nothing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import yaml

from experiments import compare, launch, records, report

# As experiments.worker, but it only writes the files of a finished run; what it does besides is set by `act`.
WORKER = """
import base64, json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
name, job = folder.name, json.loads((folder / "job.json").read_text())
run, _, seed = name.rpartition("-seed")
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(name + "\\n")
exec(ACT)
top1 = round(0.5 + 0.01 * int(seed) + (0.1 if "sparse" in run else 0), 4)
summary = {"model": "m", "seed": int(seed), "steps": 20, "parameters_total": 4, "parameters_active": 2,
           "gflops_per_image": 0.5, "images_per_second": 100.0, "train_seconds": 60.0, "loss": 1.0,
           "evaluation": {"top1": top1, "ece": 0.1}}
routing = {"routing/share_dropped": 0.5, "routing/a/text/share_dropped": 0.1, "routing/b/text/share_dropped": 0.3,
           "routing/a/largest_share": 0.9, "routing/b/largest_share": 0.2}
lines = [{"step": 10, "task_loss": 3.0}, {"step": 20, "task_loss": 2.0, **routing}, {"step": 20, "evaluation/top1": 1}]
correct = base64.b64encode(bytes([255] * (20 if "sparse" in run else 10) + [0] * 20)[:30]).decode()
val = {"digest": "val", "results": {"top1": top1, "num_samples": 240}, "data": "abc", "correct": correct}
others = {key: {"digest": one["digest"], "results": {"top1_bpr_0.5": 0.25}, "data": "abc", "correct": None}
          for key, one in job["evaluate"].items()}
data = {"data.train": "abcd" * 16, "data.val": "abc"}
measured = {"device": "Some CPU, 2 cores", "threads": 2, "torch": "2.10", "commit": "c0ffee", "changed": False,
            "inputs": data, "evaluations": {"val": val, **others}}
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "measured.json").write_text(json.dumps(measured))
(folder / "summary.json").write_text(json.dumps(summary))
"""
CONTENT = {
    "question": "Does it work?",
    "source": "arXiv 2106.05974",
    "base": "vmoe_tiny_emoji_groups",
    "settings": {"train.precision": "float32"},
    "seeds": [0, 1],
    "baseline": "dense",
    "runs": {"dense": {"model.kwargs.num_experts": 0}, "sparse": {"optim.lr": 0.002}},
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """`write(**changes)` makes lab.yaml; `launch(*words)` and `report(*words)` are the commands on it."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "FEWEST_SEEDS", 2)  # runs take time
    monkeypatch.setattr(report, "draw", lambda _, file: (file.parent.mkdir(exist_ok=True), file.touch()))  # takes long
    output, file, page = tmp_path / "runs", tmp_path / "lab.yaml", tmp_path / "docs" / "results.md"

    def write(**changes):
        file.write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
        return file

    def act(code="pass"):
        script = f"ACT = {code!r}\n{WORKER}"
        monkeypatch.setattr(
            launch.Sweep, "worker", staticmethod(lambda folder: [sys.executable, "-IS", "-c", script, folder])
        )

    def calls():
        made = output / "lab" / "calls.txt"
        names = made.read_text().split() if made.exists() else []
        made.unlink(missing_ok=True)
        return names

    write()
    act()
    return SimpleNamespace(
        **{"write": write, "act": act, "calls": calls, "file": file, "runs": output / "lab", "page": page},
        records=tmp_path / "results" / "lab.jsonl",
        launch=lambda *words: launch.main([str(file), "--output_dir", str(output), *words]),
        report=lambda *words: report.main([str(file), "--output_dir", str(output), "--output", str(page), *words]),
    )

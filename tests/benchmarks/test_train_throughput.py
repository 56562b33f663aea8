"""Two checkouts in turn, on stubs of `train.py` that tell the times of their steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report, train_throughput
from benchmarks.session import read_results

TRAIN = """
import json, sys
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, seed = Path(given["--output_dir"]), int(given["--seed"])
with Path({log!r}).open("a") as log:
    log.write(f"{name} {{seed}}\\n")
# The first five are slow and do not count, nor does the one that is late; seconds of a batch of 256 images.
seconds = [9.0] * 5 + [{seconds} * (1 + seed)] * (int(given["--train.steps"]) - 6) + [7.0]
lines = [json.dumps({{"step": s, "images_per_second": 256 / t}}) for s, t in enumerate(seconds, start=1)]
(folder / "metrics.jsonl").write_text("\\n".join([*lines, json.dumps({{"step": len(seconds), "loss": 1.0}})]))
summary = {{"precision": "bf16", "evaluation": {{"top1": {top1} + seed / 100}}}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def make_checkout(folder: Path, log: Path, seconds: float, top1: float) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / train_throughput.CONFIG).write_text("data: {loader: {batch_size: 256}}\n")
    (folder / "vmoe").mkdir()
    (folder / "vmoe" / "__init__.py").touch()
    (folder / "train.py").write_text(TRAIN.format(log=str(log), name=folder.name, seconds=seconds, top1=top1))
    return folder


@pytest.fixture
def other(tmp_path, monkeypatch) -> Path:
    log = tmp_path / "log"
    monkeypatch.setattr(train_throughput, "ROOT", make_checkout(tmp_path / "new", log, 0.5, 0.62))
    return make_checkout(tmp_path / "old", log, 1.0, 0.60)


def test_both_train_in_turn_and_their_steps_are_compared(tmp_path, other, monkeypatch):
    monkeypatch.setattr("benchmarks.bars.WHOLE_RUN", 9)
    monkeypatch.setattr("benchmarks.bars.SHORT_RUN", 9)
    results = tmp_path / "results"
    train_throughput.main(["--against", str(other), "--steps", "9", "--rounds", "2", "--results", str(results)])
    assert (tmp_path / "log").read_text().split("\n")[:-1] == ["old 0", "new 0", "old 1", "new 1"]
    (file,) = results.glob("*.json")
    (section,) = read_results(file)["sections"].values()
    before, now = section["rows"]
    assert before["ms"] == {"median": 1500.0, "min": 1000.0, "max": 2000.0}
    assert now["speed_ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert now["ratios"] == {"before": {"median": 0.5, "min": 0.5, "max": 0.5}}
    assert now["images_per_second"]["max"] == 512
    assert now["top1"] == {"median": 0.625, "min": 0.62, "max": 0.63}
    assert section["command"].endswith("train_throughput --against DIR --steps 9 --rounds 2")
    assert str(tmp_path) not in file.read_text()
    assert section["notes"] == ['"before" is a checkout without git.']
    text = report.page(results)
    speed, accuracy = [line for line in text.splitlines() if line.startswith("| `configs/limoe_tiny_emoji.yaml`")]
    assert "| ≥ 1.50 | 2.000 (2.000-2.000) | met |" in speed
    assert "| not below the lowest seed | 1.033 (1.025-1.041) | met |" in accuracy
    assert "| now | bf16 | step | 750 | 384 | 2.000 (2.000-2.000) | 0.500 (0.500-0.500) |" in text
    monkeypatch.setattr("benchmarks.bars.SHORT_RUN", 10)
    assert "images per second in training | ≥ 1.50 | not measured |" in report.page(results)


def import_from_elsewhere(other: Path) -> list[str]:
    (other / "vmoe" / "__init__.py").write_text("__file__ = '/elsewhere.py'")
    return []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda other: ["--steps", "5"], "--steps must be more than 5, which are not counted, got 5"),
        (lambda other: ["--against", str(other / "vmoe")], "name the root of a checkout"),
        (import_from_elsewhere, "imports another vmoe, /elsewhere.py: uninstall it"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(tmp_path, other, capsys, change, sentence):
    words = ["--against", str(other), "--rounds", "1", "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit):
        train_throughput.main([*words, *change(other)])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_run_that_fails_is_told_with_its_error(tmp_path, other):
    (other / "train.py").write_text("raise SystemExit('the reason')")
    with pytest.raises(RuntimeError, match=r"(?s)train\.py --config .* failed in .*the reason"):
        train_throughput.main(["--against", str(other), "--rounds", "1", "--results", str(tmp_path / "results")])

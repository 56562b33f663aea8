"""Processes whose batches differ in size, or have none, train as one process does: under DDP and expert parallelism."""

from pathlib import Path


def test_processes_with_other_batch_sizes_train_as_one(forks, tmp_path):
    forks.run(Path(__file__).with_name("uneven.py"), [str(tmp_path)], tmp_path / "output.txt", seconds=120)

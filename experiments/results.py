"""An experiment together with its records."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.compare import Estimate, difference, image_test
from experiments.plan import load
from experiments.records import (
    Record,
    check_evaluations,
    check_inputs,
    check_settings,
    inputs,
    read_records,
    records_file,
)
from vmoe.training.best import LOWER_IS_BETTER
from vmoe.utils.config import ConfigError


def pattern(metric: str) -> re.Pattern:
    """What fits a metric's name, in which "*" stands for a number."""
    return re.compile(re.escape(metric).replace(r"\*", r"(\d+(?:\.\d+)?)"))


class Results:
    """An experiment with its records."""

    def __init__(self, file: Path, output: Path) -> None:
        self.file, self.name = file, file.stem
        self.experiment, cells = load(file)
        self.cells = {(cell.run, cell.seed): cell for cell in cells}
        source = records_file(self.experiment, self.name, output)
        self.records = read_records(source)
        for key, record in self.records.items():
            if key not in self.cells:
                raise ConfigError(f"{source}: run {key[0]!r}, seed {key[1]} is not in {file}; remove its line")
            check_settings(self.cells[key], record["settings"], f"its line in {source}", file)
            check_evaluations(self.cells[key], record, f"its line in {source}", file)
        check_inputs(cells, self.records, source)
        self.unknown = [
            self.cells[key].name for key, record in self.records.items() if "data.train" not in inputs(record)
        ]
        self.runs = [run for run in dict.fromkeys(cell.run for cell in cells) if self.of(run)]
        self.metrics = self.experiment.metrics
        self.higher = not self.metrics[0].endswith(LOWER_IS_BETTER)
        if self.records:
            self._check_metrics()

    def _check_metrics(self) -> None:
        """ConfigError: the table or the figure has a metric of no record."""
        experiment, records = self.experiment, self.records.values()
        known = {name for record in records for name in record["metrics"]}
        awaited = experiment.evaluate.keys() - {name for record in records for name in record["evaluations"]}
        wanted = [metric for metric in self.metrics if metric.partition("/")[0] not in awaited]
        wanted += experiment.plotted if "*" in experiment.plotted[0] else [experiment.plot.x, *experiment.plotted]
        for metric in wanted:
            if not any(pattern(metric).fullmatch(name) for name in known):
                there = ", ".join(sorted(known))
                raise ConfigError(f"{self.file}: no record has the metric {metric!r}; there are {there}")

    def of(self, run: str) -> dict[int, Record]:
        """{seed: record} of a run."""
        return {seed: record for (name, seed), record in self.records.items() if name == run}

    def values(self, run: str, metric: str) -> dict[int, float]:
        """{seed: value} of a metric, of the seeds that have it."""
        return {seed: one["metrics"][metric] for seed, one in self.of(run).items() if metric in one["metrics"]}

    def difference(self, run: str) -> Estimate | None:
        """Of the first metric to the baseline; None for the baseline itself."""
        metric, base = self.metrics[0], self.experiment.baseline
        return None if run == base else difference(self.values(run, metric), self.values(base, metric))

    def image_test(self, run: str) -> float | None:
        """p of the images, if the run and the baseline were evaluated on the same ones."""
        base = self.experiment.baseline
        if run == base or self.metrics[0] != "top1":
            return None
        own, other = ({seed: one.get("images") for seed, one in self.of(name).items()} for name in (run, base))
        if len({images and images["data"] for images in (*own.values(), *other.values())}) != 1 or None in own.values():
            return None
        try:
            return image_test(*({seed: images["correct"] for seed, images in one.items()} for one in (own, other)))
        except ValueError as error:
            raise ConfigError(f"{self.file}: runs {run!r} and {base!r} cannot be compared: {error}") from None

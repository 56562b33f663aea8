"""An experiment together with its records."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.compare import Estimate, difference, estimate, image_test
from experiments.plan import MINUS, baseline_of, load
from experiments.records import (
    Record,
    check_evaluations,
    check_inputs,
    check_settings,
    inputs,
    read_records,
    records_file,
)
from experiments.speed import read_speed
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
        source = records_file(self.experiment, cells[0].experiment, output)
        self.speed = read_speed(cells[0].experiment)
        self.records = read_records(source)
        if self.experiment.of:  # the page of the whole experiment checks the others
            self.records = {key: record for key, record in self.records.items() if key in self.cells}
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
        self.higher = MINUS in self.metrics[0] or not self.metrics[0].endswith(LOWER_IS_BETTER)
        if self.records:
            self._check_metrics()
        self.shown = any(self.values(run, self.metrics[0]) for run in self.runs)  # whether there is an answer yet

    def _check_metrics(self) -> None:
        """ConfigError: the table or the figure has a metric of no record."""
        experiment, records = self.experiment, self.records.values()
        known = {name for record in records for name in record["metrics"]}
        evaluations = {name for cell in self.cells.values() for name in cell.evaluations}
        awaited = evaluations - {name for record in records for name in record["evaluations"]}
        shown = experiment.plotted if "*" in experiment.plotted[0] else [experiment.plot.x, *experiment.plotted]
        for name in (name for metric in (*self.metrics, *shown) for name in metric.split(MINUS)):
            if name.partition("/")[0] not in awaited and not any(pattern(name).fullmatch(one) for one in known):
                there = ", ".join(sorted(known))
                raise ConfigError(f"{self.file}: no record has the metric {name!r}; there are {there}")

    def of(self, run: str) -> dict[int, Record]:
        """{seed: record} of a run."""
        return {seed: record for (name, seed), record in self.records.items() if name == run}

    def values(self, run: str, metric: str) -> dict[int, float]:
        """{seed: value} of a metric, or of "A - B", of the seeds that have it."""
        first, *others = metric.split(MINUS)
        return {
            seed: found[first] - sum(found[name] for name in others)
            for seed, found in ((seed, record["metrics"]) for seed, record in self.of(run).items())
            if found.keys() >= {first, *others}
        }

    def baseline(self, run: str) -> str | None:
        """The run that another is compared with."""
        return baseline_of(run, self.experiment.baseline, dict.fromkeys(run for run, _ in self.cells))

    def difference(self, run: str) -> Estimate | None:
        """Of the first metric to the baseline, None for the baseline itself; of a metric "A - B" that itself."""
        metric, base = self.metrics[0], self.baseline(run)
        if MINUS in metric:
            values = self.values(run, metric)
            return estimate([*values.values()]) if values else None
        return None if base in (None, run) else difference(self.values(run, metric), self.values(base, metric))

    def image_test(self, run: str) -> float | None:
        """p of the images, if the run and the baseline were evaluated on the same ones."""
        base = self.baseline(run)
        if base in (None, run) or self.metrics[0] != "top1":
            return None
        own, other = ({seed: one.get("images") for seed, one in self.of(name).items()} for name in (run, base))
        if len({images and images["data"] for images in (*own.values(), *other.values())}) != 1 or None in own.values():
            return None
        try:
            return image_test(*({seed: images["correct"] for seed, images in one.items()} for one in (own, other)))
        except ValueError as error:
            raise ConfigError(f"{self.file}: runs {run!r} and {base!r} cannot be compared: {error}") from None

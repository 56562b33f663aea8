"""The best evaluation of a run: the checkpoint that `RUN/best` names, and when to stop early."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from vmoe.distributed.process_group import from_first
from vmoe.utils.config import ConfigError

LOWER_IS_BETTER = ("ece", "error", "loss", "mce", "nll")  # ends of names


class BestWatch:
    """Takes every evaluation of a run; without a metric it does nothing.

    `state` is what a checkpoint keeps: {"metric", "value", "step", "since" (evaluations after it)}; None before the
    first value. All processes decide by the value of the first one.
    """

    def __init__(self, metric: str | None, patience: int | None, metrics: Callable[[], Sequence[str]]) -> None:
        if metric is not None and metric not in (known := metrics()):
            raise ConfigError(
                f"train.keep_best must be a metric of the evaluation ({', '.join(known)}), got {metric!r}"
            )
        self.metric, self.patience, self.state = metric, patience, None

    def load(self, state: dict[str, Any] | None) -> None:
        """Continues from a checkpoint's state, if it is of the same metric."""
        if state is not None and state["metric"] == self.metric:
            self.state = state

    def update(self, step: int, results: dict[str, float]) -> None:
        """Takes the results of an evaluation; a metric that is missing or not finite is not better."""
        if self.metric is None:
            return
        value = from_first(lambda: results.get(self.metric, math.nan))
        best = math.nan if self.state is None else self.state["value"]
        lower = self.metric.endswith(LOWER_IS_BETTER)
        if math.isfinite(value) and not (value >= best if lower else value <= best):
            self.state = {"metric": self.metric, "value": value, "step": step, "since": 0}
        elif self.state is not None:
            self.state = {**self.state, "since": self.state["since"] + 1}

    @property
    def step(self) -> int | None:
        """The step of the best evaluation."""
        return None if self.state is None else self.state["step"]

    @property
    def exhausted(self) -> bool:
        """The last `patience` evaluations were not better."""
        return self.patience is not None and self.state is not None and self.state["since"] >= self.patience

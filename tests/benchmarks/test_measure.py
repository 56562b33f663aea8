"""The measuring itself, on clocks that are told the time."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from benchmarks.measure import activation_bytes, alternate, milliseconds, ratios, spread


class Clock:
    """Time passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_calls_run_in_turn_each_round_on_its_own_input():
    clock, seen = Clock(), []

    def call(name, cost):
        def run(value):
            seen.append((name, value))
            clock.now += cost * (1 + value) if value >= 0 else 1000.0

        return run

    seconds = alternate({"a": call("a", 1.0), "b": call("b", 2.0)}, lambda number: number, 3, warmup=1, clock=clock)
    assert seen == [(name, number) for number in (-1, 0, 1, 2) for name in "ab"]
    assert seconds == {"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0]}  # without the warm-up
    assert ratios(seconds["b"], seconds["a"]) == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert milliseconds(seconds["a"]) == {"median": 2000.0, "min": 1000.0, "max": 3000.0}


def test_ratios_are_taken_round_by_round():
    # The machine is ten times slower in the second round: the ratio of the medians would be another number.
    assert ratios([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_preparation_is_not_timed_and_waiting_for_the_device_is():
    clock, log = Clock(), []

    def passes(name, seconds):
        def run(*_):
            log.append(name)
            clock.now += seconds

        return run

    seconds = alternate(
        {"a": passes("call", 1.0)},
        passes("input", 100.0),
        2,
        warmup=0,
        before=passes("before", 1000.0),
        synchronize=passes("wait", 0.25),
        clock=clock,
    )
    assert seconds == {"a": [1.25, 1.25]}
    assert log == ["input", "before", "wait", "call", "wait"] * 2


def test_no_garbage_is_collected_while_measuring_and_the_setting_comes_back():
    during = []
    alternate({"a": lambda _: during.append(gc.isenabled())}, lambda number: number, 1)
    assert not any(during)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda _: 1 / 0}, lambda number: number, 1)
    assert gc.isenabled()


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        alternate({}, lambda number: number, 0)


def test_spread_keeps_significant_digits():
    assert spread([0.000123456, 123456.0, 2.0]) == {"median": 2.0, "min": 0.0001235, "max": 123500.0}


def test_activations_count_each_storage_once_and_no_parameters():
    layer = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(5, 8, requires_grad=True)
    # The input, what GELU gets, and what the second layer gets; weights are the layer's own.
    assert activation_bytes(lambda: layer(x), [layer], x.device) == 4 * 5 * (8 + 16 + 16)
    assert activation_bytes(lambda: x * x, [], x.device) == 4 * 5 * 8  # twice the same

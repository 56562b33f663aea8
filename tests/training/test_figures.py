"""Figures of several processes."""

import pytest

from vmoe.training import logger as figures


def test_a_minimum_stays_one_over_processes(monkeypatch):
    other = {"experts_per_token_min": 0.0, "experts_per_token_max": 4.0, "z_loss": 1.0}
    monkeypatch.setattr(figures, "gather_lists", lambda own: [*own, other])
    mine = {"experts_per_token_min": 1.0, "experts_per_token_max": 3.0, "z_loss": 2.0}
    assert figures.over_processes(mine) == {
        "experts_per_token_min": 0.0,
        "experts_per_token_max": 4.0,
        "z_loss": pytest.approx(1.5),
    }

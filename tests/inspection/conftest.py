"""Fixtures of the inspection tests."""

import pytest

from tests.inspection.example import example_statistics as make_statistics


@pytest.fixture(scope="session")
def example_statistics():
    """The factory of example.py."""
    return make_statistics

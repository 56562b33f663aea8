"""Fixtures of the inspection tests."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def example_statistics():
    """The factory of example.py; loaded by its path, since the tests are not a package."""
    spec = importlib.util.spec_from_file_location("inspection_example", Path(__file__).with_name("example.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.example_statistics

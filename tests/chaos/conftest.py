"""One process from which all commands of these tests are forked, and the data that they train on."""

import pytest

from .forked import Forks
from .tiny import make_pictures, write_config


@pytest.fixture(scope="session")
def forks():
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "config.yaml", make_pictures(folder / "pictures"))

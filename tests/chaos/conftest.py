"""The data that the commands of these tests train on."""

import pytest

from .tiny import make_images, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "config.yaml", make_images(folder / "images"))

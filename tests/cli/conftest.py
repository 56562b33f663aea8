"""Fixtures of the parts that the commands put together."""

from tests.data.conftest import photo
from tests.inspection.conftest import example_statistics
from tests.training.conftest import images_dir, make_config

__all__ = ["example_statistics", "images_dir", "make_config", "photo"]

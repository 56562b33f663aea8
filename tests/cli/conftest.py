"""Fixtures of the parts that the commands put together."""

from tests.data.conftest import photo
from tests.inspection.conftest import example_statistics
from tests.training.conftest import make_config, pictures

__all__ = ["example_statistics", "make_config", "photo", "pictures"]

"""Settings that several processes cannot share; what they find together is in tests/chaos/test_start.py."""

import pytest

from vmoe.data import AugmentationConfig, LoaderConfig
from vmoe.training import run_dir
from vmoe.training.config import Config, DataConfig
from vmoe.utils.config import ConfigError


@pytest.fixture
def two_processes(monkeypatch):
    """This one, and another that has the same settings."""
    monkeypatch.setattr(run_dir, "world", lambda: (0, 2))
    monkeypatch.setattr(run_dir, "gather_lists", lambda own: own * 2)


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(
    ("batch_size", "mixup", "message"),
    [
        (8, 0.5, None),
        (6, 0.0, None),
        (7, 0.0, "must be a multiple of 2, got 7: 2 processes share each batch$"),
        (6, 0.5, "must be a multiple of 4, got 6: 2 processes share each batch, in pairs for mixup and cutmix"),
    ],
)
def test_a_batch_is_shared_evenly(batch_size, mixup, message):
    data = DataConfig(loader=LoaderConfig(batch_size=batch_size), augmentation=AugmentationConfig(mixup=mixup))
    config = Config(output_dir="run", task="classification", data=data)
    if message is None:
        run_dir.check_same_settings(config)
    else:
        with pytest.raises(ConfigError, match=message):
            run_dir.check_same_settings(config)

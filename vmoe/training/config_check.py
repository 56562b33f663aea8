"""What the processes of a job must have in common before they train together."""

from __future__ import annotations

import yaml

from vmoe.distributed.process_group import from_first, gather_lists
from vmoe.training.config import Config, flatten, to_yaml
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world


def check_same_settings(config: Config) -> None:
    """Compares the settings of all processes, which call it together; only `device` may differ.

    Raises:
        ConfigError: in all processes: some differ, or data.loader.batch_size cannot be shared among the processes.
    """
    _, processes = world()
    if processes == 1:
        return
    own = flatten(yaml.safe_load(to_yaml(config)))
    first = from_first(lambda: own)
    keys = [key for key in {**first, **own} if key != "device"]
    mine = {key: own.get(key) for key in keys if repr(first.get(key)) != repr(own.get(key))}
    found = {}
    for rank, differing in enumerate(gather_lists([mine])):
        for key, value in differing.items():
            found.setdefault(key, f"{key} is {first.get(key)!r} in process 0, {value!r} in process {rank}")
    if found:
        raise ConfigError(
            f"the processes have different settings ({'; '.join(found.values())}); start all of them with the same "
            "config and arguments"
        )
    batch_size, augmentation = config.data.loader.batch_size, config.data.augmentation
    if batch_size % processes:
        raise ConfigError(
            f"data.loader.batch_size must be a multiple of the {processes} processes that share each batch, got "
            f"{batch_size}"
        )
    if (augmentation.mixup or augmentation.cutmix) and batch_size // processes % 2:
        raise ConfigError(
            f"data.loader.batch_size must give each of the {processes} processes an even number for mixup and cutmix, "
            f"got {batch_size}"
        )

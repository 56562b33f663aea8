from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from vmoe.training import checkpoint_group as module
from vmoe.training.checkpoint_group import CheckpointError, CheckpointGroup


def test_messages_about_checkpoints_have_the_timeout_of_the_job():
    store, timeout = dist.HashStore(), timedelta(seconds=77)
    store.set_timeout(timeout)  # as `joined` does
    dist.init_process_group("gloo", store=dist.PrefixStore("job", store), rank=0, world_size=1, timeout=timeout)
    try:
        group = CheckpointGroup().group
        assert group is not dist.group.WORLD
        assert group._get_backend(torch.device("cpu")).options._timeout == timeout
    finally:
        dist.destroy_process_group()


def test_an_error_while_files_are_compared_is_raised_by_all(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(module, "find_problems", fail)
    with pytest.raises(CheckpointError, match="MemoryError: no memory"):
        CheckpointGroup().find_problems(tmp_path)

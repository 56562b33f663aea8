"""What an error means in a job of several processes."""

import pytest
import torch.distributed as dist

from vmoe.distributed.process_group import LostProcessError, _lost_process

PEER = "tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:29398."


class AllLive:
    """A watch that sees nothing wrong, unless it is certain that something is."""

    def explain(self, waiting):
        return LostProcessError("process 1 of 2 is gone") if waiting else None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot restore the image"),
        RuntimeError("no socket in the socket store; read about gloo/ and NCCL error codes"),
        ValueError("[/pytorch/third_party/gloo/gloo/transport/" + PEER),
    ],
)
def test_a_process_of_its_own_error_blames_nobody(error):
    assert _lost_process(error, AllLive()) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/" + PEER),
        RuntimeError("Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/" + PEER),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error"),
        RuntimeError("Connection reset by peer"),
        dist.DistBackendError("anything"),
        dist.DistNetworkError("anything"),
        dist.DistStoreError("anything"),
    ],
)
def test_a_failed_exchange_is_explained(error):
    assert "is gone" in str(_lost_process(error, AllLive()))

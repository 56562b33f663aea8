"""What a process knows of the others, without starting them."""

import torch.distributed as dist

from vmoe.distributed.heartbeat import Heartbeat


def test_processes_know_each_other_before_a_first_interval_is_over():
    store = dist.HashStore()
    beats = [Heartbeat(store, rank=rank, world=2, timeout=60) for rank in range(2)]
    for beat in beats:
        beat.interval = 20.0
        beat._thread.start()
    try:
        assert all(beat._wait_until(lambda beat=beat: len(beat._peers) == 2, 15.0) for beat in beats)
    finally:
        for beat in beats:
            beat._ending.set()
            beat._thread.join()

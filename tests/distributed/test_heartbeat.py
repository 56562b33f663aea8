"""What a process knows of the others, without starting them."""

import time

import torch.distributed as dist

from vmoe.distributed.heartbeat import Watch, _Peer


def test_the_processes_elsewhere_are_told_by_the_length_of_their_stay():
    watch = Watch(dist.HashStore(), rank=0, world=4, timeout=10)
    now = time.monotonic()
    for rank, seconds in enumerate([90, 5, 60, 30]):
        news = {"host": "node", "pid": rank, "place": f"vmoe/x.py:{rank} (x)", "end": "done" if rank == 3 else None}
        watch._peers[rank] = _Peer(news, since=now, place_since=now - seconds)
    first, second = watch.elsewhere(RuntimeError("Connection closed by peer")).split("; ")
    assert first == "process 2 of 4 (host node, pid 2) has been at vmoe/x.py:2 (x) for 60 s"
    assert second == "process 1 of 4 (host node, pid 1) has been at vmoe/x.py:1 (x) for 5 s"


def test_processes_know_each_other_before_a_first_interval_is_over():
    store = dist.HashStore()
    watches = [Watch(store, rank=rank, world=2, timeout=60) for rank in range(2)]
    for watch in watches:
        watch.interval = 20.0
        watch._thread.start()
    try:
        assert all(watch._wait_until(lambda watch=watch: len(watch._peers) == 2, 15.0) for watch in watches)
    finally:
        for watch in watches:
            watch._ending.set()
            watch._thread.join()

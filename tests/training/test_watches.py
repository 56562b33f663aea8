import logging

import pytest

from tests.training.test_logger import routed
from vmoe.training import watches
from vmoe.training.watches import CollapseWatch, DataWatch


@pytest.mark.parametrize(
    ("bad", "words"), [([0] * 7 + [1, 2, 3], "70% of its tokens"), ([0, 1, 2] * 3, "1 experts get no token")]
)
def test_a_collapse_is_reported_once_by_name_after_many_steps(caplog, bad, words):
    watch = CollapseWatch(after=50)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 50, 10):
            watch.update(step, {"blocks.1.mlp": routed(bad), "blocks.3.mlp": routed([0, 1, 2, 3])})
        assert not caplog.records
        for step in range(50, 100, 10):
            watch.update(step, {"blocks.1.mlp": routed(bad), "blocks.3.mlp": routed([0, 1, 2, 3])})
    assert len(caplog.records) == 1
    assert "blocks.1.mlp" in caplog.text
    assert words in caplog.text


@pytest.mark.parametrize(
    ("workers", "cores", "words"),
    [
        (1, 8, "data.loader.num_workers 1 reads 200; raise it to 3"),
        (0, 8, "data.loader.num_workers 0 reads 200; raise it to 3"),
        (1, 2, "data.loader.num_workers 1 reads 200; raise it to 2"),
        (2, 2, "data.loader.num_workers 2 reads 200; all 2 CPU cores read already"),
    ],
)
def test_waiting_for_data_is_reported_once_with_a_remedy(workers, cores, words, caplog, monkeypatch):
    monkeypatch.setattr(watches, "own_cores", lambda: cores)
    waiting, watch = {"images_per_second": 300.0, "data_wait_share": 0.5}, DataWatch(workers, can_cache=True)
    for share in (0.5, 0.5, 0.5, 0.5, 0.1):  # it passed
        watch.update({**waiting, "data_wait_share": share}, 200.0)
    assert caplog.messages == []
    for share in (*[0.5] * 20, 0.1, *[0.5] * 20):
        watch.update({**waiting, "data_wait_share": share}, 200.0)
    (message,) = caplog.messages
    assert "waits for data 50% of the time: each process could take 600 images/s" in message
    assert words in message
    assert message.endswith(", or set data.cache memory and data.cache_gb if the decoded images fit into memory")


def test_a_cache_is_no_remedy_where_it_cannot_help(caplog):
    watch = DataWatch(0, can_cache=False)
    for _ in range(5):
        watch.update({"images_per_second": 300.0, "data_wait_share": 0.5}, 200.0)
    (message,) = caplog.messages
    assert "data.cache" not in message


def test_a_layer_that_recovers_or_shares_evenly_is_not_reported(caplog):
    recovers, even = CollapseWatch(after=50), CollapseWatch(after=1)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 200, 10):
            recovers.update(step, {"blocks.1.mlp": routed([0, 0, 0, 0] if step % 40 else [0, 1, 2, 3])})
            even.update(step, {"mlp": routed([0, 1, 0, 1], num_experts=2)})
    assert not caplog.records

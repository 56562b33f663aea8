"""Jobs of several processes that do not come to their first step."""

import signal
import socket
import time

from tests.forked import free_port, printed

from .tiny import arguments


def test_processes_with_different_settings_do_not_train(forks, config, tmp_path):
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank, more in enumerate([{}, {"optim__lr": 0.5, "train__freeze": '["head.*"]', "device": "auto"}]):
        given = arguments(config, tmp_path / "run", train__steps=3, parallel__timeout=30, **more)
        env = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        processes.append(forks.start(given, tmp_path / f"out.{rank}", **env))
    assert [process.wait() for process in processes] == [2, 2]
    said = [printed(tmp_path / f"out.{rank}") for rank in range(2)]
    assert "optim.lr is 0.001 in process 0, 0.5 in process 1" in said[0]
    assert "train.freeze is [] in process 0, ['head.*'] in process 1" in said[0]
    assert "device is" not in said[0]  # may differ
    assert said[1] == ""  # told once
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared_is_a_wrong_setting(forks, config, tmp_path):
    given = arguments(config, tmp_path / "run", data__loader__batch_size=7, parallel__timeout=30)
    processes = forks.group(given, tmp_path / "out", free_port())
    assert [process.wait() for process in processes] == [2, 2]
    assert "data.loader.batch_size must be a multiple of 2, got 7: 2 processes share each batch" in printed(
        tmp_path / "out.0"
    )
    assert printed(tmp_path / "out.1") == ""


def test_a_signal_ends_a_process_that_waits_for_the_others_to_join(forks, config, tmp_path):
    port = free_port()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    waiting = forks.start(arguments(config, tmp_path / "run", parallel__timeout=120), tmp_path / "out", **env)
    end = time.monotonic() + 60
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)) and time.monotonic() < end:
            time.sleep(0.1)
    began = time.monotonic()
    waiting.signal(signal.SIGTERM)
    assert waiting.wait(100) == 130
    assert time.monotonic() - began < 30  # on a busy machine; not parallel.timeout
    assert "the same command starts or continues the run" in (tmp_path / "out").read_text()

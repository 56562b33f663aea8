"""Jobs of several processes that lose one, are told to stop, or run out of time."""

import json
import signal
import socket
import time

import pytest

from tests.forked import free_port, printed
from vmoe.models.manifest import list_checkpoints
from vmoe.training.logger import read_metrics

from .tiny import arguments, make_images

TIMEOUT = 10
ENDLESS = 1_000_000


def wait_for_steps(run, steps, processes=()):
    """Until so many steps are in metrics.jsonl."""
    end = time.monotonic() + 120
    while len(read_metrics(run / "metrics.jsonl")) < steps:
        assert time.monotonic() < end, "no steps were made"
        assert all(process.poll() is None for process in processes), "a process ended early"
        time.sleep(0.05)


def start_job(forks, config, folder, **settings):
    """The two processes of a job, in mid-training."""
    settings = {"train__steps": ENDLESS, "parallel__timeout": TIMEOUT, **settings}
    processes = forks.group(arguments(config, folder / "run", **settings), folder / "out", free_port())
    wait_for_steps(folder / "run", 2, processes)
    return processes


@pytest.fixture
def job(forks, config, tmp_path):
    """job(settings) -> its two processes; `job.said(r)` is what process r printed."""

    def start(**settings):
        return start_job(forks, config, tmp_path, **settings)

    start.run = tmp_path / "run"
    start.said = lambda rank: printed(tmp_path / f"out.{rank}")
    return start


def errors(said):
    """What was printed besides the lines of the start and of the steps."""
    usual = ("cache: ", "device: ", "data: ", "steps: ", "model: ", "weights: ", "step ", "[Gloo]")
    return [line for line in said.splitlines() if not line.startswith(usual)]


# How a process is lost, and which. Process 0 holds the job's store; a stopped one is noticed last.
LOST = [(signal.SIGSTOP, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0)]


@pytest.fixture(scope="module")
def lost(forks, config, tmp_path_factory):
    """{how and which process is lost: (processes, when, the folder)}; the others wait for it at the same time."""
    jobs = {}
    for number, rank in LOST:
        folder = tmp_path_factory.mktemp("lost")
        processes = start_job(forks, config, folder)
        processes[rank].signal(number)
        jobs[number, rank] = (processes, time.time(), folder)
    return jobs


@pytest.mark.parametrize(("number", "rank"), LOST[::-1])
def test_a_lost_process_is_named_and_ends_the_job(number, rank, lost):
    processes, began, folder = lost[number, rank]
    victim, survivor = processes[rank], processes[1 - rank]
    assert survivor.wait(3 * TIMEOUT) == 1  # on a busy machine
    victim.kill()
    file = folder / f"out.{1 - rank}"
    (error,) = errors(printed(file))
    assert f"process {1 - rank} of 2: error: " in error
    assert f"process {rank} of 2 (host" in error
    assert f"pid {victim.pid}" in error
    assert file.stat().st_mtime - began < 3 * TIMEOUT  # the error is the last that it prints


@pytest.mark.parametrize("killed", [True, pytest.param(False, marks=pytest.mark.exhaustive)])  # they wait 17 s each
def test_a_process_that_hangs_does_not_outlive_the_job(killed, forks, config, tmp_path):
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    given = arguments(config, tmp_path / "run", train__steps=ENDLESS, parallel__timeout=5)
    waits, hangs = (
        forks.start(given, tmp_path / f"out.{rank}", **job, RANK=str(rank), LOCAL_RANK=str(rank), **more)
        for rank, more in enumerate([{}, {"SLEEP_AFTER": "2"}])
    )
    wait_for_steps(tmp_path / "run", 2, (waits, hangs))
    if killed:
        waits.signal(signal.SIGKILL)
    assert waits.wait(60) == (-signal.SIGKILL if killed else 1)
    assert hangs.wait(60) == 1
    (error,) = errors(printed(tmp_path / "out.1"))
    assert "process 1 of 2: error: " in error
    if not killed:
        assert f"process 0 of 2 (host {socket.gethostname()}, pid {waits.pid}) gave up" in error
        (error,) = errors(printed(tmp_path / "out.0"))
        assert "but all processes answer" in error


def test_an_error_in_one_process_alone_is_reported_once_and_ends_the_others(forks, config, tmp_path):
    images = make_images(tmp_path / "images")
    (images / "red" / "0.png").write_bytes(b"torn")  # one process reads it, in its part of a batch
    settings = {"data__train__path": images, "data__loader__on_bad": "fail", "parallel__timeout": TIMEOUT}
    given = arguments(config, tmp_path / "run", train__steps=50, **settings)
    processes = forks.group(given, tmp_path / "out", free_port())
    assert [process.wait() for process in processes] == [1, 1]
    said = [errors(printed(tmp_path / f"out.{rank}")) for rank in range(2)]
    (error,) = said[0] + said[1]
    assert f"process {said.index([error])} of 2: error: " in error
    assert "red/0.png" in error


@pytest.mark.parametrize(
    "mesh",
    [
        {"parallel__ep": 2},
        pytest.param({}, marks=pytest.mark.exhaustive),
        pytest.param({"parallel__dp_shard": 2}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(mesh, job):
    processes = job(**mesh)
    processes[1].signal(signal.SIGUSR1)
    assert [process.wait() for process in processes] == [0, 0]
    (checkpoint,) = list_checkpoints(job.run)
    assert "the same command continues" in job.said(0)
    assert "Traceback" not in job.said(1)
    step = int(checkpoint.name.partition("_")[2])
    processes = job(train__steps=step + 2, **mesh)  # continues
    assert [process.wait() for process in processes] == [0, 0]
    assert json.loads((job.run / "summary.json").read_text())["steps"] == step + 2
    assert [line["step"] for line in read_metrics(job.run / "metrics.jsonl")] == list(range(1, step + 3))


def test_a_killed_worker_is_restarted_and_the_run_continues(forks, config, tmp_path):
    run = tmp_path / "run"
    given = arguments(config, run, train__steps=20, train__checkpoint_every=5, train__log_every=2)
    torchrun = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 1, "rdzv_backend": "c10d"}
    torchrun |= {"rdzv_endpoint": "localhost:0", "run_id": "test"}
    launcher = forks.start(given, tmp_path / "out", torchrun, PIDS=str(tmp_path), DIE_AFTER="12")
    assert launcher.wait() == 0, (tmp_path / "out").read_text()
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(2, 21, 2))
    assert "continuing after step 10" in (tmp_path / "out").read_text()


def test_a_time_budget_stops_in_time(forks, config, tmp_path):
    endless = {"train__steps": ENDLESS, "train__checkpoint_every": ENDLESS}
    given = arguments(config, tmp_path / "run", **endless, train__max_minutes=2 / 60)
    process = forks.start(given, tmp_path / "out")
    assert process.wait() == 0
    assert len(list_checkpoints(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "the same command continues" in (tmp_path / "out").read_text()

"""Runs `train.py` and other scripts many times without importing PyTorch as often: each is forked from one process.

python -m tests.forked      reads a job as a line of JSON from its input, answers with its process id
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forks:
    """The process from which commands are forked; a context manager that ends all of them."""

    def __enter__(self) -> Forks:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        self.children: list[Fork] = []
        return self

    def __exit__(self, *_: Any) -> None:
        for child in self.children:
            child.end()
        self.server.kill()  # it has nothing to lose, and the end of PyTorch takes a second
        self.server.communicate()

    def ask(self, **question: Any) -> Any:
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, arguments: list[str], output: Path, torchrun: dict[str, Any] | None = None, **env: str) -> Fork:
        """Starts `train.py ARGUMENTS`; what it prints is appended to `output`.

        Args:
            torchrun: LaunchConfig's arguments: run it in several processes under torchrun's agent; the environment
                variable PIDS names the folder where process r writes its id, to pid.r
            env: environment variables; EVALUATING names a file that is to be there during evaluations, DIE_AFTER a step
                after which process 1 under torchrun kills itself when it is started for the first time, SLEEP_AFTER
                one after which a process sleeps.
        """
        return self._start(arguments=arguments, output=str(output), torchrun=torchrun, env=env)

    def script(self, script: Path, arguments: list[str], output: Path, **env: str) -> Fork:
        """Starts `python SCRIPT ARGUMENTS`; what it prints is appended to `output`."""
        return self._start(script=str(script), arguments=arguments, output=str(output), env=env)

    def run(self, script: Path, arguments: list[str], output: Path, seconds: float = 240, **env: str) -> str:
        """Runs a script to its successful end; returns what it printed."""
        code, said = self.script(script, arguments, output, **env).wait(seconds), output.read_text()
        assert code == 0, f"exit code {code}; it printed\n{said[-4000:]}"
        return said

    def _start(self, **job: Any) -> Fork:
        self.children.append(Fork(self, self.ask(**job)))
        return self.children[-1]

    def group(self, arguments: list[str], output: Path, port: int, processes: int = 2) -> list[Fork]:
        """Starts the processes of a job without torchrun; process r prints to `output` with the ending .r"""
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return [self.start(arguments, output.with_suffix(f".{each['RANK']}"), **job, **each) for each in ranks]


class Fork:
    """A command that was started."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self.forks, self.pid, self.code = forks, pid, None

    def poll(self) -> int | None:
        """Its exit code (the negative signal if killed), None while it runs."""
        if self.code is None:
            self.code = self.forks.ask(poll=self.pid)
        return self.code

    def wait(self, seconds: float = 240) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.end()
                raise TimeoutError(f"process {self.pid} did not end within {seconds} s")
            time.sleep(0.02)
        return self.code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        """Kills it, if it still runs, and what it has started."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self.pid, signal.SIGKILL)
            self.kill()


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    from train import main  # first, as in `python train.py`  # isort: skip

    # Before the fork: what takes the time.
    import open_clip  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    from PIL import Image
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import vmoe.training.trainer  # noqa: F401

    Image.init()
    gc.collect()
    gc.freeze()  # nobody looks for garbage in the libraries

    def run(job: dict[str, Any]) -> int:
        os.setsid()
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(job["env"])
        if "EVALUATING" in os.environ:
            show_evaluations(Path(os.environ["EVALUATING"]))
        if "SLEEP_AFTER" in os.environ:
            after(int(os.environ["SLEEP_AFTER"]), lambda: time.sleep(3600))
        try:
            if "script" in job:
                sys.argv = [job["script"], *job["arguments"]]
                sys.path.insert(0, str(Path(job["script"]).parent))
                runpy.run_path(job["script"], run_name="__main__")
                return 0
            if job["torchrun"] is not None:
                config = LaunchConfig(start_method="fork", monitor_interval=0.1, **job["torchrun"])
                elastic_launch(config, worker)(job["arguments"])
                return 0
            return main(job["arguments"])
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            pid, status = os.waitpid(job["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(run(job))
        print(json.dumps(answer), flush=True)


def show_evaluations(file: Path) -> None:
    """Lets a file be there during evaluations, so that a kill can hit one."""
    from vmoe.training.objectives import Classification

    evaluate = Classification.evaluate

    def shown(*arguments: Any) -> Any:
        file.touch()
        try:
            return evaluate(*arguments)
        finally:
            file.unlink(missing_ok=True)

    Classification.evaluate = shown


def after(last: int, do: Callable[[], None]) -> None:
    """Lets this process do something in the step after step `last`."""
    from vmoe.training.watches import CollapseWatch

    look = CollapseWatch.update

    def update(self: CollapseWatch, step: int, layers: Any) -> None:
        if step > last:
            do()
        look(self, step, layers)

    CollapseWatch.update = update


def worker(arguments: list[str]) -> None:
    """What each process under torchrun's agent does."""
    from vmoe.cli.train import main

    if "DIE_AFTER" in os.environ and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        after(int(os.environ["DIE_AFTER"]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    Path(os.environ["PIDS"], f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.exit(main(arguments))


if __name__ == "__main__":
    serve()


def printed(file: Path) -> str:
    """What a process printed, without gloo's own lines, which PyTorch 2.10 prints."""
    return "".join(line for line in file.read_text().splitlines(True) if not line.startswith("[Gloo]"))

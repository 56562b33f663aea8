"""No test here may start a program, open a connection, or unpickle."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess

import pytest


class Ran(BaseException):
    """Something ran that came from a file; no `except Exception` hides it."""


@pytest.fixture(autouse=True, scope="module")
def nothing_runs():
    def refuse(name):
        def called(*arguments, **_):
            raise Ran(f"{name} was called with {arguments[:2]!r}")

        return called

    class NoUnpickler:
        def __init__(self, *_, **__):
            raise Ran("pickle.Unpickler was made")

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (pickle, ("load", "loads")),
            (os, ("system", "popen", "execv", "execve", "posix_spawn")),
            (socket.socket, ("connect",)),
            (subprocess.Popen, ("__init__",)),
        ):
            for name in names:
                patch.setattr(module, name, refuse(name))
        patch.setattr(pickle, "Unpickler", NoUnpickler)
        yield

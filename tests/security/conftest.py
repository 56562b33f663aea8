"""No test here may start a program, open a connection, or unpickle."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vmoe
from vmoe.models.factory import save_pretrained

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, "num_experts": 2}


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

    start = subprocess.Popen.__init__

    def start_python_alone(process, command, *arguments, **options):
        if command[0] != sys.executable:  # which tests themselves start
            raise Ran(f"{command!r} was started")
        start(process, command, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (pickle, ("load", "loads")),
            (os, ("system", "popen", "execv", "execve", "posix_spawn")),
            (socket.socket, ("connect",)),
        ):
            for name in names:
                patch.setattr(module, name, refuse(name))
        patch.setattr(pickle, "Unpickler", NoUnpickler)
        patch.setattr(subprocess.Popen, "__init__", start_python_alone)
        yield


@pytest.fixture
def canary(tmp_path):
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something from the file ran"


@pytest.fixture(scope="module")
def good_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_pretrained(vmoe.create_model("vmoe_base_patch16_224", moe_layers=[1], num_selected_experts=1, **TINY), file)
    return file

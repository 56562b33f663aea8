"""Starts the commands: `vmoe-train` calls `vmoe_command.train`, which is `main` of `vmoe/cli/train.py`.

It is a module of its own because `import vmoe` imports PyTorch and timm to register the models, which takes seconds.
If this module is loaded first, that waits until a command has read its arguments: `--help` and mistakes need neither.
What a command prints raises nothing, whatever reads it (`safe_output`).
"""

from collections.abc import Callable
from importlib import import_module

from vmoe.utils.printable import safe_output


def __getattr__(name: str) -> Callable[..., int]:
    missing = AttributeError(f"module 'vmoe_command' has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return safe_output()(import_module(f"vmoe.cli.{name}").main)
    except ModuleNotFoundError as error:
        if error.name == f"vmoe.cli.{name}":  # pickle asks every loaded module for a name, such as "torch"
            raise missing from None
        raise

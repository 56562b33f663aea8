"""Weights & Biases, with `train.wandb`: a continued run goes on in the same one there."""

import secrets
import sys
from pathlib import Path
from typing import Any

from vmoe.utils.config import ConfigError
from vmoe.utils.files import atomic_file
from vmoe.utils.optional import import_optional
from vmoe.utils.printable import first_line

ID_FILE = "wandb_id.txt"  # in the run's folder


def check_wandb(project: str | None) -> None:
    """ConfigError: wandb is wanted, and not installed."""
    if project is not None:
        import_optional("wandb", "wandb", "train.wandb needs", "; null logs nothing there", ConfigError)


class WandbLog:
    """A run of the project, as which the metrics of each logged step are written; WANDB_MODE=offline needs no account.

    wandb drops steps that it has already: a continued run computes the same metrics again.
    """

    def __init__(self, project: str, run: Path, settings: dict[str, Any]) -> None:
        import wandb

        file = run / ID_FILE
        number = file.read_text(encoding="utf-8") if file.is_file() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project,
                id=number,
                name=run.resolve().name,
                dir=run,
                config=settings,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # no account, no network, a name that it refuses
            reason = first_line(error).rstrip(".")
            account = "api key" in reason.lower() or "log in" in reason.lower()
            remedy = "; run `wandb login`, or set WANDB_MODE=offline" if account else ""
            raise ConfigError(f"train.wandb {project}: {reason}{remedy}") from error
        with atomic_file(file) as draft:
            draft.write_text(number, encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        error = sys.exc_info()[1]  # that ends the run
        self._run.finish(exit_code=int(error is not None and not getattr(error, "planned", False)))

"""Checkpoints of a run: atomic, checked when they are read, never unpickled (docs/checkpoints.md).

A folder that is still being written has another name (`step_000450.unfinished`), so that a process which dies leaves
nothing that looks like a checkpoint.
"""

import json
import logging
import os
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vmoe.models import manifest
from vmoe.models.factory import file_metadata
from vmoe.models.manifest import TRAINER, UNFINISHED, find_problems, list_checkpoints, newest_complete, step_of
from vmoe.models.safetensors_writer import write_tensors
from vmoe.models.serialization import SETTINGS_NAME, StoredTensors, checkpoint_weights, load_weights
from vmoe.moe.experts import has_adapters
from vmoe.training.checkpoint_group import CheckpointError, CheckpointGroup
from vmoe.training.distill import PROJECTION, without_projection
from vmoe.training.lora import merge_lora
from vmoe.training.optimizer_state import export_state, import_state

logger = logging.getLogger("vmoe.training")

MODEL, EMA, OPTIMIZER = "model", "ema", "optimizer"
ADAPTED = "adapted_"  # before the first two: the weights with adapters apart, which training continues from
BEST = "best"  # RUN/best is a link to the best checkpoint, see `link_best`
FORMAT = 2


@dataclass
class _Contents:
    tensors: dict[str, dict[str, Tensor]]  # {"model", "ema", "optimizer", "adapted_model", ...: {name: tensor}}
    metadata: dict[str, dict[str, str]]  # of their safetensors files
    trainer: str  # the text of trainer.json
    sharded: bool  # the weights are DTensors


class Checkpointer:
    """Writes the checkpoints of a run and keeps the last undamaged ones. All processes make one and call it together.

    If `asynchronous`, it copies the state to the CPU, and writes it while training goes on.
    """

    def __init__(self, run: Path, keep_last: int, asynchronous: bool = False) -> None:
        self.run, self.parent, self.keep_last = run, run / "checkpoints", keep_last
        self._group = CheckpointGroup()
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        self._complete: set[Path] = set()  # known to be undamaged without reading them again

    def save(
        self,
        step: int,
        model: nn.Module,
        ema: nn.Module | None,
        optimizer: Optimizer,
        trainer: dict,
        extra: dict,
        best: int | None = None,
    ) -> Path:
        """Writes a checkpoint, then removes those that are not to be kept; returns its folder.

        The folder exists when this returns, or if asynchronous, after `wait`. `trainer` is stored as JSON (that of
        process 0), `extra` beside the weights (class names); `best` is the step whose checkpoint is the best. A
        CheckpointError in all processes says that it, or asynchronously the one before, cannot be written; nothing is
        left of that one.
        """
        self.wait()
        final = self.parent / f"step_{step:06d}"
        weights = {MODEL: model} | ({} if ema is None else {EMA: ema})
        (contents,) = self._group.run(lambda: self._collect(weights, optimizer, trainer, extra), final, collect=False)
        if self._thread is not None:
            self._writing = self._thread.submit(self._write, contents, final, best)
        else:
            self._write(contents, final, best)
        return final

    def wait(self) -> None:
        """Waits until the last checkpoint is written; raises CheckpointError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for the last checkpoint, also after another error; logs if it could not be written."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
        if self._thread is not None:
            self._thread.shutdown()

    def _collect(
        self, weights: dict[str, nn.Module], optimizer: Optimizer, trainer: dict[str, Any], extra: dict[str, Any]
    ) -> _Contents:
        """The state to write: the tensors themselves, or if asynchronous, copies."""
        tensors, metadata = {}, {}
        tensors[OPTIMIZER], rest = export_state(optimizer, weights[MODEL])
        for part, module in weights.items():
            with without_projection(module) as projection:
                if projection is not None:
                    tensors[PROJECTION] = projection.state_dict()
                if has_adapters(module):
                    tensors[ADAPTED + part] = module.state_dict()
                    module = merge_lora(module)
                tensors[part], metadata[part] = module.state_dict(), file_metadata(module, extra)
        metadata = {part: metadata.get(part, {"format": "pt"}) for part in tensors}
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors[MODEL].values())
        text = json.dumps({"format": FORMAT, "trainer": trainer, "optimizer": rest})  # as it is now
        if not sharded and self._group.rank > 0:  # process 0 writes all of it
            tensors = {part: {} for part in tensors}

        def ready(tensor: Tensor) -> Tensor:
            copy = tensor if self._thread is None else tensor.to("cpu", copy=True)
            return copy.detach().contiguous()

        tensors = {part: {name: ready(tensor) for name, tensor in each.items()} for part, each in tensors.items()}
        return _Contents(tensors, metadata, text, sharded)

    def _write(self, contents: _Contents, final: Path, best: int | None) -> None:
        unfinished = final.with_name(final.name + UNFINISHED)
        if not self._group.run_first(lambda: self._begin(unfinished, final), final):
            self._write_files(contents, unfinished, final)
        if self._group.rank == 0:
            if best is not None:
                link_best(self.run, best)
            try:
                self._remove_old(step_of(final), best)
            except OSError as error:
                logger.warning("an old checkpoint in %s could not be removed: %s", self.parent, error)

    def _write_files(self, contents: _Contents, unfinished: Path, final: Path) -> None:
        group = self._group
        try:
            if contents.sharded:
                for part, tensors in contents.tensors.items():
                    group.run(partial(self._write_shards, tensors, unfinished / part), final)
            files = group.run(lambda: self._write_own(contents, unfinished), final)
            group.run_first(lambda: self._finish(unfinished, final, files), final)
        except CheckpointError:
            if group.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if group.rank == 0:
            self._complete.add(final)

    def _begin(self, unfinished: Path, final: Path) -> bool:
        """Makes the folder; True if there is such a checkpoint already: the run stopped right after it was saved."""
        self.parent.mkdir(parents=True, exist_ok=True)
        for folder in self.parent.glob(f"step_*{UNFINISHED}"):  # of a process that died while saving
            shutil.rmtree(folder)
        if final.exists() and not find_problems(final):
            return True
        unfinished.mkdir()
        return False

    def _write_shards(self, tensors: dict[str, Tensor], folder: Path) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group.group)

    def _write_own(self, contents: _Contents, unfinished: Path) -> dict[str, dict[str, Any]]:
        """Writes what is not in shards; returns the manifest's entries of this process's files."""
        shards = unfinished.glob(f"*/shard-{self._group.rank + 1:05d}-*") if contents.sharded else ()
        names = [file.relative_to(unfinished).as_posix() for file in shards]
        if self._group.rank == 0:
            for part, tensors in contents.tensors.items():
                if not contents.sharded:
                    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
                    write_tensors(tensors, contents.metadata[part], unfinished / f"{part}.safetensors")
                    names.append(f"{part}.safetensors")
                elif part != OPTIMIZER:
                    _write_text(unfinished / part / SETTINGS_NAME, json.dumps(contents.metadata[part]))
                    names.append(f"{part}/{SETTINGS_NAME}")
            _write_text(unfinished / TRAINER, contents.trainer)
            names.append(TRAINER)
        return manifest.describe_files(unfinished, names)

    def _finish(self, unfinished: Path, final: Path, files: list[dict[str, Any]]) -> None:
        every = {name: entry for own in files for name, entry in own.items()}
        facts = {"step": step_of(final), "world_size": self._group.world}
        _sync(manifest.write_manifest(unfinished, facts, every))
        problems = find_problems(unfinished, share=(len(every), len(every) + 1))  # the hashes were just taken
        if problems:
            raise CheckpointError(
                f"{final} is incomplete ({problems[0]}); output_dir must be on a file system that all processes share"
            )
        for folder in {unfinished, *((unfinished / name).parent for name in every)}:
            _sync(folder)
        if final.exists():  # a damaged one
            _remove(final)
        os.replace(unfinished, final)
        _sync(self.parent)

    def _remove_old(self, step: int, best: int | None) -> None:
        """Removes what is older than the last undamaged ones to keep, but the best one; newer ones were found damaged,
        and stay."""
        kept, linked = 0, (self.run / BEST).resolve().name  # there is no link on some file systems
        for folder in reversed([each for each in list_checkpoints(self.run) if step_of(each) <= step]):
            if kept == self.keep_last:
                if folder.name != linked and step_of(folder) != best:
                    _remove(folder)
            elif folder in self._complete or not find_problems(folder):
                self._complete.add(folder)
                kept += 1


def link_best(run: Path, step: int) -> None:
    """Makes RUN/best a link to the checkpoint of a step, in one move; nothing if there is no such checkpoint."""
    link, target = run / BEST, Path("checkpoints", f"step_{step:06d}")
    draft = link.with_name(f".{BEST}.{secrets.token_hex(6)}")
    try:
        if (run / target).is_dir() and not (link.is_symlink() and link.readlink() == target):
            draft.symlink_to(target)
            os.replace(draft, link)
    except OSError as error:
        draft.unlink(missing_ok=True)
        logger.warning("%s cannot be made (%s); the best checkpoint is %s", link, error.strerror, run / target)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, for all processes, or None; CheckpointError: all are damaged."""
    group = CheckpointGroup()
    checkpoints = group.run_first(lambda: list_checkpoints(run), run)
    found = newest_complete(checkpoints, logger if group.rank == 0 else None, group.find_problems)
    if found is None and checkpoints:
        raise CheckpointError(
            f"all checkpoints in {run / 'checkpoints'} are damaged, the newest one here: "
            f"{group.find_problems(checkpoints[-1])[0]}; choose another output_dir to start from scratch"
        )
    return found


def load_checkpoint(
    checkpoint: Path, model: nn.Module, ema: nn.Module | None, optimizer: Optimizer | None
) -> dict[str, Any]:
    """Loads a checkpoint in place, into plain tensors or DTensors of any mesh; all processes call it together.

    Returns the `trainer` of `Checkpointer.save`. None for `ema` or `optimizer` does not load it. A CheckpointError
    names what is missing or damaged, or the tensors that do not fit.
    """
    group = CheckpointGroup()
    problems = group.find_problems(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint} is damaged: {problems[0]}; remove it to continue from the one before")
    return group.run(lambda: _load(checkpoint, model, ema, optimizer), checkpoint, collect=False)[0]


def _load(checkpoint: Path, model: nn.Module, ema: nn.Module | None, optimizer: Optimizer | None) -> dict[str, Any]:
    for module, average in ((model, False), (ema, True)):
        weights = None if module is None else checkpoint_weights(checkpoint, average)
        if weights is not None and has_adapters(module):
            weights = weights.with_name(ADAPTED + weights.name)
        if weights is not None:
            with without_projection(module) as projection:
                load_weights(module, weights)
            if projection is not None:
                StoredTensors(_stored(checkpoint, PROJECTION)).read_into(projection.state_dict())
        elif module is not None:
            raise CheckpointError(f"{checkpoint} holds no {'moving average' if average else 'weights'}")
    file = checkpoint / TRAINER
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        trainer, rest = content["trainer"], content["optimizer"]
        if content["format"] != FORMAT or not isinstance(trainer, dict):
            raise ValueError(
                f"its format is not {FORMAT}: another version of vmoe wrote it; choose another output_dir, and start "
                "from its weights with model.pretrained"
            )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if optimizer is not None:
        file = _stored(checkpoint, OPTIMIZER)
        try:
            import_state(optimizer, model, StoredTensors(file) if file.exists() else None, rest)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint}: {error}") from error
    return trainer


def add_stored_projection(checkpoint: Path, model: nn.Module) -> None:
    """Gives a new model the projection of the run's student, if it was taught with features: its optimizer has it."""
    if (file := _stored(checkpoint, PROJECTION)).exists():
        outputs, inputs = StoredTensors(file).shapes["weight"]
        model.add_module(PROJECTION, nn.Linear(inputs, outputs))


def _stored(checkpoint: Path, part: str) -> Path:
    """The file with the tensors of a part, or the folder with its shards."""
    file = checkpoint / f"{part}.safetensors"
    return file if file.exists() else checkpoint / part


def _write_text(file: Path, content: str) -> None:
    file.write_text(content, encoding="utf-8")
    _sync(file)


def _remove(folder: Path) -> None:
    """Removes a checkpoint atomically."""
    doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")  # not the name of a new one of the same step
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Flushes a file or folder to the disk, where that is supported."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)

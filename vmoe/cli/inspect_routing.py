"""The inspection command (`vmoe-inspect`): what the experts of a model do with a data set."""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from rich.console import Console

from vmoe.cli.command import exit_code
from vmoe.data.config import LoaderConfig, SourceConfig
from vmoe.utils.config import ConfigError, check_types, parse_config, read_settings_file
from vmoe.utils.files import is_writable, local_path
from vmoe.utils.paths import check_checkpoint
from vmoe.utils.tables import MetricTable, make_console

if TYPE_CHECKING:
    from vmoe.inspection.routing_statistics import RoutingStatistics


@dataclass
class InspectConfig:
    """An inspection.

    Attributes:
        checkpoint: The model: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
        output_dir: Folder for the results; null: "inspection" beside the checkpoint.
        data: The data to run the model on; without a type, the validation data of the checkpoint's run, where single
            settings may be replaced (--data.split train).
        loader: Batches and worker processes; on_bad "skip" skips and counts unreadable images.
        num_images: Images whose routing the report shows one by one, evenly spaced in the data.
        num_patches: Typical patches to keep for each expert.
        templates: Prompts of the class names, for an image-text model: texts with {} for the name, a file with one per
            line, "openai_imagenet" or "simple_imagenet"; null: the bare name.
        eval_capacity_factor: Capacity of the experts, to see what is dropped in training; null: as the model is set.
        batch_priority: Whether important tokens go first where capacity is limited; null: as the model is set.
        precision: Arithmetic of the forward pass: float32, or autocast to bf16 or fp16.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
    """

    checkpoint: str
    output_dir: str | None = None
    data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    num_images: int = 200
    num_patches: int = 16
    templates: list[str] | str | None = None
    eval_capacity_factor: float | None = None
    batch_priority: bool | None = None
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        self.loader.check_evaluation(one_size=True)
        if self.templates is not None:
            from vmoe.evaluation.zero_shot import resolve_templates

            resolve_templates(self.templates)  # raises ValueError if they cannot be read


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    return exit_code("vmoe-inspect", lambda: run(settings(sys.argv[1:] if argv is None else argv)))


def settings(argv: Sequence[str]) -> InspectConfig:
    """The settings of a command line, on top of what the checkpoint's run validated on if it names no type of data."""
    description = "Inspect a sparse model: which patches and text tokens go to which expert."
    read = functools.partial(parse_config, InspectConfig, prog="vmoe-inspect", description=description)
    config = read(argv)
    if config.data.type is None and Path(config.checkpoint).exists():
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "data.yaml"
            source = dataclasses.asdict(validation_data(config.checkpoint))
            base.write_text(yaml.safe_dump({"data": source}), encoding="utf-8")
            config = read(["--config", str(base), *argv])
    return config


def run(config: InspectConfig, console: Console | None = None) -> RoutingStatistics:
    """Gathers the statistics, writes files, figures and report, and prints a table and their paths.

    ConfigError, before the data are read, which may take hours: a dense model, no data, wrong settings.
    """
    check_checkpoint(config.checkpoint)
    from vmoe.data import build_dataset, with_orientation
    from vmoe.evaluation.loaded_model import load_model
    from vmoe.inspection.forward import sparse_layers
    from vmoe.inspection.plots import write_figures
    from vmoe.inspection.report import write_report
    from vmoe.inspection.results import write_statistics
    from vmoe.inspection.routing_statistics import gather_statistics

    console = console or make_console()
    loaded = load_model(config.checkpoint, config.device, config.precision)
    sparse_layers(loaded)
    if config.data.type is None:
        raise ConfigError("data has no type: set data.type")
    source = with_orientation(config.data) if loaded.exif_orientation else config.data
    dataset = build_dataset(source, "data")
    if config.templates is not None and (loaded.tokenizer is None or dataset.classes is None):
        raise ConfigError("templates are for image-text models and data with class names: leave them out")
    checkpoint = local_path(config.checkpoint)
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "inspection"
    folder = Path(config.output_dir or beside)
    if not is_writable(folder):
        raise ConfigError(f"output_dir {folder} cannot be written to: choose another")
    same = ("num_images", "num_patches", "templates", "eval_capacity_factor", "batch_priority")
    statistics = gather_statistics(
        loaded,
        dataset,
        config.loader,
        data=describe(source),
        console=console,
        **{name: getattr(config, name) for name in same},
    )
    console.print(summary_table(statistics))  # first, in case a file cannot be written
    files = write_statistics(statistics, folder, dataclasses.asdict(dataclasses.replace(config, data=source)))
    with console.status("drawing"):
        files += write_figures(statistics, folder / "figures")
    files.append(write_report(statistics, folder / "report.html", console))
    for file in files:
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)
    return statistics


def validation_data(checkpoint: str) -> SourceConfig:
    """The validation data of the run that a checkpoint belongs to, by its config.yaml; ConfigError if there is none."""
    path = Path(checkpoint).absolute()
    for folder in [path, *path.parents][:4]:  # RUN/checkpoints/step_000100/model.safetensors
        if (file := folder / "config.yaml").is_file():
            try:
                val = (read_settings_file(file).get("data") or {}).get("val") or {}
                if val.get("type") is not None:
                    return SourceConfig(**val)
            except (TypeError, AttributeError) as error:  # it holds something else than settings of data
                raise ConfigError(f"{file}: data.val cannot be read ({error}); set data.type") from error
            break
    raise ConfigError(
        f"data.type is missing, and {checkpoint} is in no run folder whose config.yaml names validation data: say what "
        "to inspect, as in --data.type image_folder --data.path FOLDER"
    )


def describe(source: SourceConfig) -> str:
    """The data in a few words, for titles."""
    from vmoe.evaluation.results_file import NAMED_BY_SPLIT

    split = source.split if source.type in NAMED_BY_SPLIT else None
    return " · ".join(part for part in (source.type, source.name, source.path, split) if part)


def summary_table(statistics: RoutingStatistics) -> MetricTable:
    """A line per layer and modality: tokens, largest over mean load, experts that got none, drops, entropy."""
    header = ["layer", "modality", "tokens", "max/mean load", "idle", "dropped", "entropy"]
    table = MetricTable(f"routing of {statistics.checkpoint} on {statistics.data}", header, keys=2, left=header[:2])
    for layer in statistics.layers:
        for modality, tokens in layer.tokens.items():
            kept_E = layer.kept[modality]
            table.add_row(
                layer.name,
                modality,
                f"{tokens:,}",
                f"{kept_E.max() / max(kept_E.mean(), 1e-12):.2f}",
                f"{(kept_E == 0).sum()} of {layer.num_experts}",
                f"{layer.share_dropped[modality]:.1%}",
                f"{layer.entropy[modality]:.3f}",
            )
    return table

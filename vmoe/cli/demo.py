"""A page to try a model on: `vmoe-demo --checkpoint X` (pip install -e '.[demo]').

Drop an image and type labels: the page shows their probabilities and, for each sparse layer, the experts of the
image's patches and of a label's text tokens, computed in `vmoe.inspection.explain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmoe.cli.command import exit_code
from vmoe.utils.config import ConfigError, check_types, parse_config
from vmoe.utils.optional import import_optional
from vmoe.utils.paths import check_checkpoint, check_index


@dataclass
class DemoConfig:
    """The demo.

    Attributes:
        checkpoint: The model: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
        templates: Image-text models: texts with {} where the label goes (their embeddings are averaged), a file with
            one per line, "openai_imagenet" or "simple_imagenet"; null: the label.
        index: A file of vmoe-embed, made by the same model: the page also searches in it.
        host: Address to listen on; "0.0.0.0" lets other machines in.
        port: Port to listen on; null takes the first free one from 7860.
        share: Also open a public link through Gradio's servers. Images are then sent through them.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
        exif_orientation: Whether images are turned as their EXIF data say; null: as the model was trained.
    """

    checkpoint: str
    templates: list[str] | str | None = None
    index: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    device: str = "auto"
    exif_orientation: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.port is not None and not 0 < self.port < 65536:
            raise ConfigError(f"port must be 1 to 65535, got {self.port}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    description = "A page in the browser to try a model and see its routing."
    config = parse_config(DemoConfig, argv, prog="vmoe-demo", description=description)
    return exit_code("vmoe-demo", lambda: serve(config))


def serve(config: DemoConfig) -> None:
    """Loads the model and serves the page until Ctrl-C."""
    if config.index is not None:
        check_index(config.index)
    check_checkpoint(config.checkpoint)
    import_optional("gradio", "demo", "the demo needs")
    from vmoe.cli.demo_page import build_app, launch
    from vmoe.evaluation.loaded_model import load_model
    from vmoe.evaluation.search import SearchIndex

    index = None if config.index is None else SearchIndex(config.index, config.checkpoint, config.device)
    loaded = load_model(config.checkpoint, config.device) if index is None else index.model
    if config.exif_orientation is not None:
        loaded = loaded._replace(exif_orientation=config.exif_orientation)
    if loaded.tokenizer is None and config.templates is not None:
        raise ConfigError(f"templates are for image-text models, and {config.checkpoint} holds a classifier")
    app = build_app(loaded, config.templates, index)
    launch(app, config.host, config.port, config.share)
    app.block_thread()

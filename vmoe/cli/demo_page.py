"""The demo's page, in Gradio: an image's labels and routing. What it shows is computed in `vmoe.inspection.explain`."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from vmoe.data.images import BadSample, Reading, load_image
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.search import Hit, SearchIndex
from vmoe.evaluation.zero_shot import Template, resolve_templates
from vmoe.inspection import explain as logic

KEPT_SECONDS = 3600  # images in Gradio's temporary folder, and what was computed from them
CSS = """
.gradio-container {width: 100%; max-width: 1400px !important; margin: 0 auto !important}
.token.highlighted {padding: 4px 6px !important}
.token.highlighted .text, .token.highlighted .label {background: #ffffffd8 !important; color: #000; padding: 0 4px}
"""


def launch(app: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> str:
    """Starts the server in a thread, which serves the page and its own temporary files; `app.close()` ends it.

    Returns the page's address, which is printed too. OSError: the port is taken, or the address is not this machine's.
    """
    # Fonts of the reader's system: the page asks no other server for anything.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800")
    try:  # Gradio would try a hundred ports at an address that is not this machine's
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        where = f"{host}, port {port or 'any'}"
        raise OSError(f"cannot listen on {where} ({reason}): choose another --port or --host") from error
    off = dict.fromkeys(("inbrowser", "run_history", "ssr_mode", "mcp_server", "enable_monitoring"), False)
    files = {"allowed_paths": [], "max_file_size": "100mb"}
    look = {"theme": theme, "css": CSS + logic.CSS, "footer_links": []}
    server = {"server_name": host, "server_port": port, "share": share, "prevent_thread_lock": True, "quiet": True}
    _, address, public_address = app.launch(**server, **files, **look, **off)
    print(f"the page is at {address}" + (f" and {public_address}" if public_address else "") + " (Ctrl-C ends it)")
    return address


def build_app(
    loaded: LoadedModel, templates: Sequence[Template] | str | None = None, index: SearchIndex | None = None
) -> gr.Blocks:
    """The page for an image-text model, which gets labels (and templates, see `resolve_templates`), or a classifier.

    With an index there is a second tab, which searches in it.
    """
    answers = _Answers(loaded, templates)
    with gr.Blocks(title="vmoe: what the experts do", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as app:
        with gr.Tab("Classify") if index is not None else contextlib.nullcontext():
            _classify_tab(loaded, answers)
        if index is not None:
            with gr.Tab("Search"):
                _search_tab(index)
    return app


def _classify_tab(loaded: LoadedModel, answers: _Answers) -> None:
    layers, has_text = answers.layers, answers.has_text
    gr.Markdown(f"# What the experts of `{Path(loaded.checkpoint).name}` do" + ("" if layers else ": it has none"))
    found = gr.State(None, time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            image = _image_input("Image", loaded)
            typing = "Labels, one per line or separated by commas"
            labels = gr.Textbox(label=typing, lines=4, max_lines=12, visible=has_text)
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=4, min_width=320):
            probabilities = gr.HTML("<p>The answer appears here.</p>", padding=False)
            with gr.Column(visible=False) as routing:  # shown with the first answer
                (layer, row, column, name), seen = _routing_column(layers, has_text)
    private = {"api_visibility": "private", "trigger_mode": "always_last"}
    quick = {**private, "show_progress": "hidden"}
    inputs = [image, labels, layer, row, column]
    outputs = [found, probabilities, routing, name, *seen]
    methods = answers.classify, answers.view, answers.show_clicked
    classify, view, show_clicked = (_answer(method) for method in methods)
    gr.on([button.click, labels.submit], classify, inputs, outputs, **private, show_progress_on=probabilities)
    changes = [layer.input, row.input, column.input, name.input]
    gr.on(changes, view, [found, layer, row, column, name], seen, **quick)
    seen[0].select(show_clicked, [found, layer, name], [row, column, *seen], **quick)


def _image_input(label: str, loaded: LoadedModel) -> gr.Image:
    image = gr.Image(label=label, type="pil", sources=["upload", "clipboard"], height=280, buttons=[])
    # Not by a subclass, for which Gradio would write a file beside this one.
    image.preprocess = functools.partial(_read_upload, Reading(loaded.exif_orientation))
    return image


def _search_tab(index: SearchIndex) -> None:
    has_text, reading = index.model.tokenizer is not None, Reading(index.model.exif_orientation)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            text = gr.Textbox(label="What the images show", lines=1, visible=has_text)
            image = _image_input("or an image like them" if has_text else "Image", index.model)
            top = gr.Number(12, label="Images", precision=0, minimum=1, maximum=100)
            button = gr.Button("Search", variant="primary")
        with gr.Column(scale=4, min_width=320):
            gallery = gr.Gallery(label=f"Among {len(index.embeddings.paths):,} images", columns=4, format="png")
            table = gr.HTML(padding=False)

    def search(text: str, image: Image.Image | None, top: int) -> tuple[list, str]:
        if (image is None) == (not text.strip()):
            raise ValueError("Give either a text or an image.")
        hits = index.by_text(text, top) if image is None else index.by_image(image, top)
        shown = [(image, f"{hit.score:.3f}") for hit in hits if (image := _thumbnail(hit.path, reading))]
        rows = "".join(map(_hit_row, hits))
        return shown, f'<div class="experts"><table aria-label="Found images"><tbody>{rows}</tbody></table></div>'

    private = {"api_visibility": "private", "trigger_mode": "always_last"}
    gr.on([button.click, text.submit], _answer(search), [text, image, top], [gallery, table], **private)


def _hit_row(hit: Hit) -> str:
    texts = [text for text in (hit.path, hit.caption, hit.label) if text is not None]
    cells = "".join(f'<td><span class="name">{html.escape(text)}</span></td>' for text in texts)
    return f"<tr><td>{hit.score:.4f}</td>{cells}</tr>"


def _thumbnail(path: str, reading: Reading) -> Image.Image | None:
    """An image of the index; None if it is in no file of its own (a shard), or no longer there."""
    try:
        image = load_image(path, reading=reading)
    except BadSample:
        return None
    image.thumbnail((320, 320))
    return image


def _routing_column(layers: list, has_text: bool) -> tuple[list, list]:
    """The inputs (layer, row, column, label) and the outputs (map, patch, text tokens, loads) on a model's routing."""
    choices = [(one.title, index) for index, one in enumerate(layers)]
    layer = gr.Radio(choices, value=len(layers) - 1 if layers else None, label="Sparse layer")
    with gr.Row():
        with gr.Column(scale=3):
            alt = "The image under the numbers and colours of its patches' experts"
            # A label would lie over the first patches.
            routing_map = gr.Image(show_label=False, alt_text=alt, interactive=False, buttons=[], format="png")
        with gr.Column(scale=2):
            gr.Markdown("Click a patch, or choose its row and column; both count from 0.")
            with gr.Row():
                row = gr.Number(0, label="Row", precision=0, minimum=0, min_width=80)
                column = gr.Number(0, label="Column", precision=0, minimum=0, min_width=80)
            patch = gr.HTML(padding=False)
    with gr.Row(visible=has_text):
        name = gr.Dropdown(label="Label", scale=2, min_width=200)
        text_tokens = gr.HighlightedText(label="Experts of the label's text tokens", scale=3, min_width=320)
    return [layer, row, column, name], [routing_map, patch, text_tokens, gr.HTML(padding=False)]


class _Answers:
    """What the page shows, as values of its components."""

    def __init__(self, loaded: LoadedModel, templates: Sequence[Template] | str | None) -> None:
        self.loaded, self.templates = loaded, resolve_templates(templates)
        self.has_text, self.layers = loaded.tokenizer is not None, logic.list_layers(loaded)

    def classify(self, image: Image.Image | None, labels: str, layer: int, row: int, column: int) -> tuple:
        """The explanation, probabilities, the routing made visible, the labels to choose from, and `view`."""
        if image is None:
            raise ValueError("Choose an image first: drop or paste one.")
        names = logic.parse_labels(labels) if self.has_text else None
        found = logic.explain(self.loaded, image, names, self.templates)
        likeliest, _ = max(found.probabilities, key=lambda pair: pair[1])
        choice = gr.Dropdown(choices=[name for name, _ in found.probabilities], value=likeliest)
        bars, routing = logic.bars_html(found.probabilities), gr.Column(visible=bool(self.layers))
        return found, bars, routing, choice, *self.view(found, layer, row, column, likeliest)

    def show_clicked(
        self, found: logic.Explanation | None, layer: int, label: str | None, event: gr.SelectData
    ) -> tuple:
        """Row and column of the clicked patch, and `view`. Gradio finds the event by its type."""
        row, column = 0, 0
        if found is not None:
            grid = found.sample.patches[layer].expert.shape[:2]
            row, column = logic.patch_at(*event.index, grid, logic.map_size(found.sample.image))
        return row, column, *self.view(found, layer, row, column, label)

    def view(
        self, found: logic.Explanation | None, layer: int, row: int | None, column: int | None, label: str | None
    ) -> tuple:
        """Map, experts of the patch, text tokens, loads."""
        if found is None:
            raise ValueError("There is nothing to show, or it is no longer kept: press Classify.")
        if not self.layers:
            return None, None, None, None
        loads, drawn, patch, tokens = {}, None, "<p>This layer sees text only.</p>", ([], {})
        patches, spec = found.sample.patches[layer], self.layers[layer]
        if patches is not None and None in (row, column):
            raise ValueError("Give both a row and a column.")
        if patches is not None:
            patch = logic.patch_html(row, column, logic.patch_experts(patches, row, column))
            drawn = logic.draw_map(found.sample.image, patches, spec.num_experts, (row, column))
            loads["patches"] = logic.expert_loads(spec, patches)
        if self.has_text and label is not None:
            texts, by_layer = logic.route_text(self.loaded, label, self.templates)
            if text := by_layer.get(spec.name):
                tokens = logic.colour_tokens(texts, text)
                loads["text tokens"] = logic.expert_loads(spec, text)
        return drawn, patch, gr.HighlightedText(value=tokens[0], color_map=tokens[1]), logic.loads_html(loads)


ONE_AT_A_TIME = threading.Lock()  # a record of a model's routing holds all that runs meanwhile


def _answer(function: Callable) -> Callable:
    """The function as the answer to an event: one at a time, and a failure is a message on the page."""

    @functools.wraps(function)
    def answer(*arguments: Any) -> Any:
        try:
            with ONE_AT_A_TIME:
                return function(*arguments)
        except Exception as error:
            if os.environ.get("VMOE_TRACEBACK"):
                traceback.print_exc()
            start = "" if isinstance(error, (ValueError, BadSample)) else "This could not be computed: "
            raise _message(f"{start}{str(error) or type(error).__name__}") from None

    return answer


def _message(text: str) -> Exception:
    return gr.Error(html.escape(text), duration=None, print_exception=False)


def _read_upload(reading: Reading, upload: Any) -> Image.Image | None:
    try:
        return None if upload is None else load_image(upload.path, reading=reading)
    except BadSample as error:
        raise _message(f"{upload.orig_name or 'The image'}: {error.reason}.") from None

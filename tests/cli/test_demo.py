"""The demo in a browser: what it shows is what the functions of vmoe compute."""

from __future__ import annotations

import io
import re
import socket
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli import demo
from vmoe.data import LoaderConfig
from vmoe.data.dataset import ImageFiles
from vmoe.evaluation.embeddings import embed_images
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.search import SearchIndex
from vmoe.models.factory import save_pretrained

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs Gradio (pip install -e '.[demo]')")

CLASSES = ["animal", "<i>plant</i>", "thing"]
LABELS = ["cat", "guide dog", "a red car"]
TINY = {"depth": 4, "num_heads": 2, "num_experts": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def photo(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder / "photo.png"


def launch(loaded, **options):
    """(app, address) of the page of a model."""
    from vmoe.cli import demo_page  # here, since importing Gradio takes 4 s in every process that collects the tests

    app = demo_page.build_app(loaded, **options)
    return app, demo_page.launch(app)


def start(file, model, extra=None):
    """Saves the model and starts the demo on it; (loaded, app, address)."""
    save_pretrained(model, file, extra)
    loaded = load_model(str(file), "cpu")
    app, address = launch(loaded)
    return loaded, app, address


@pytest.fixture(scope="module")
def limoe(folder, browser):
    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    loaded, app, address = start(folder / "limoe.safetensors", model)
    yield loaded, address
    app.close(verbose=False)


@pytest.fixture(scope="module")
def classifier(folder, browser):
    torch.manual_seed(0)
    settings = {"num_classes": 3, "embed_dim": 32, "num_selected_experts": 2, "eval_capacity_factor": 0.4, **TINY}
    model = vmoe.create_model("vmoe_tiny_patch8_48", **settings)
    loaded, app, address = start(folder / "vmoe.safetensors", model, {"class_names": CLASSES})
    yield loaded, address
    app.close(verbose=False)


@pytest.fixture
def open_demo(browser_page):
    """A function that opens the page at an address; nothing but that server may be asked for anything."""
    asked = []
    browser_page.on("request", lambda request: asked.append(request.url))

    def open_page(address):
        browser_page.goto(address)
        browser_page.get_by_role("button", name="Classify").wait_for()
        return browser_page

    yield open_page
    outside = [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert asked
    assert outside == []
    # The page itself ends its stream of events, once the answers are there.
    stream = re.compile(r"failed: http://127\.0\.0\.1:\d+/gradio_api/queue/data\?\S+ net::ERR_ABORTED")
    assert [problem for problem in browser_page.problems if not stream.fullmatch(problem)] == []


def classify(page, photo, labels=None):
    page.get_by_label("File upload").set_input_files(photo)
    page.get_by_role("button", name="Remove Image").wait_for()
    if labels is not None:
        page.get_by_label("Labels, one per line").fill("\n".join(labels))
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("table", name="Probabilities").wait_for()


def rows(page, name):
    """{heading of a row: its cells} of a table, without cells that hold no text."""
    table = page.get_by_role("table", name=name)
    texts = table.evaluate("table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))")
    return {heading: [text for text in cells if text] for heading, *cells in texts}


def routing_map(page, other_than=None):
    """(source, image) of the map, once it is there and is not the one of another source."""
    image = page.get_by_alt_text("The image under the numbers")
    image.wait_for()
    page.wait_for_function(
        "([image, old]) => image.src !== old && image.complete && image.naturalWidth > 0",
        arg=[image.element_handle(), other_than],
    )
    source = image.get_attribute("src")
    return source, Image.open(io.BytesIO(page.request.get(source).body()))


def click_patch(page, row, column, grid=6):
    """Clicks a patch that is not the chosen one, and waits until it is framed."""
    source, _ = routing_map(page)
    image = page.get_by_alt_text("The image under the numbers")
    box = image.bounding_box()
    image.click(position={"x": (column + 0.5) * box["width"] / grid, "y": (row + 0.5) * box["height"] / grid})
    page.get_by_text(f"Experts of the patch in row {row}, column {column}").wait_for()
    routing_map(page, other_than=source)


def recorded(loaded, layer, photo):
    """(experts, weights, kept) of the patches in a layer, each (rows, columns, K), by the record itself."""
    image = loaded.transform(Image.open(photo))[None]
    with torch.no_grad(), vmoe.record_routing(loaded.model) as record:
        loaded.model(image) if loaded.tokenizer is None else loaded.model.encode_image(image)
    own = record.layers[layer]
    found = (own.tokens(tensor)[0][-36:] for tensor in (own.expert_index, own.combine_weights, own.kept))
    return [tensor.reshape(6, 6, -1) for tensor in found]


def expected_patch(loaded, layer, photo, row, column):
    experts, weights, kept = (tensor[row, column].tolist() for tensor in recorded(loaded, layer, photo))
    shown = zip(experts, weights, kept, strict=True)
    return {str(expert): [f"{weight:.4f}", "yes" if room else "no"] for expert, weight, room in shown}


def test_probabilities_and_experts_of_text_tokens(limoe, open_demo, photo):
    loaded, address = limoe
    page = open_demo(address)
    classify(page, photo, LABELS)
    [expected] = vmoe.zero_shot_classify(loaded.model, loaded.tokenizer, photo, LABELS)
    assert rows(page, "Probabilities") == {
        label: [f"{value:.2%}"] for label, value in zip(LABELS, expected.tolist(), strict=True)
    }

    page.get_by_label("Label", exact=True).click()
    page.get_by_role("option", name="a red car").click()
    words = page.get_by_test_id("highlighted-text")
    words.get_by_text("red").wait_for()
    with torch.no_grad(), vmoe.record_routing(loaded.model) as record:
        loaded.model.encode_text(loaded.tokenizer(["a red car"]))
    own = record.layers["blocks.3.mlp"]
    experts, weights = (own.tokens(tensor)[0, :5, 0].tolist() for tensor in (own.expert_index, own.combine_weights))
    expected = zip(["<start_of_text>", "a", "red", "car", "<end_of_text>"], experts, weights, strict=True)
    shown = [" ".join(text.split()) for text in words.locator(".token").all_inner_texts()]
    assert shown == [f"{word} {expert} ({weight:.2f})" for word, expert, weight in expected]


def test_another_layer_and_another_patch(limoe, open_demo, photo):
    loaded, address = limoe
    page = open_demo(address)
    classify(page, photo, LABELS)
    source, last = routing_map(page)
    page.get_by_role("radio", name="block 1").check()
    _, first = routing_map(page, other_than=source)
    assert first.size == last.size == (640, 640)
    assert first.tobytes() != last.tobytes()

    for row, column in ((0, 1), (2, 3), (5, 5)):
        click_patch(page, row, column)
        found = rows(page, f"Experts of the patch in row {row}, column {column}")
        assert found == expected_patch(loaded, "blocks.1.mlp", photo, row, column)
        assert page.get_by_label("Row", exact=True).input_value() == str(row)
    page.get_by_label("Row", exact=True).press("ArrowDown")  # without a mouse
    page.get_by_text("Experts of the patch in row 4, column 5").wait_for()

    experts, _, kept = recorded(loaded, "blocks.1.mlp", photo)
    load = np.bincount(experts[kept].numpy(), minlength=4)
    table = rows(page, "Load of the experts")
    assert [table[str(expert)][0] for expert in range(4)] == [str(number) for number in load]


def test_mistakes_are_shown_and_the_server_goes_on(limoe, open_demo, photo, folder):
    page = open_demo(limoe[1])
    labels, button = page.get_by_label("Labels, one per line"), page.get_by_role("button", name="Classify")

    def told(text):
        page.get_by_role("status").get_by_text(text).wait_for()

    button.click()
    told("Choose an image first")
    (folder / "broken.png").write_bytes(photo.read_bytes()[:200])
    page.get_by_label("File upload").set_input_files(folder / "broken.png")
    page.get_by_role("button", name="Remove Image").wait_for()
    button.click()
    told("broken.png: ")
    page.get_by_role("button", name="Remove Image").click()
    page.get_by_label("File upload").set_input_files(photo)
    page.get_by_role("button", name="Remove Image").wait_for()
    button.click()
    told("Type at least one label")
    labels.fill("cat, <b>dog</b>\n<b>dog</b>")
    button.click()
    told("given twice: '<b>dog</b>'")
    labels.fill("cat, <b>dog</b>")
    button.click()
    page.get_by_role("table", name="Probabilities").wait_for()
    assert set(rows(page, "Probabilities")) == {"cat", "<b>dog</b>"}
    page.get_by_label("Row", exact=True).fill("6")
    told("There is no patch in row 6, column 0: rows are 0 to 5, columns 0 to 5.")


def test_classifier(classifier, open_demo, photo):
    loaded, address = classifier
    page = open_demo(address)
    assert page.get_by_label("Labels, one per line").count() == 0
    classify(page, photo)
    with torch.no_grad():
        [expected] = loaded.model(loaded.transform(Image.open(photo))[None]).softmax(dim=1)
    assert rows(page, "Probabilities") == {
        name: [f"{value:.2%}"] for name, value in zip(CLASSES, expected.tolist(), strict=True)
    }
    kept = recorded(loaded, "blocks.3.mlp", photo)[2]
    row, column = np.argwhere(~kept.numpy().all(-1))[-1].tolist()
    click_patch(page, row, column)
    found = rows(page, f"Experts of the patch in row {row}, column {column}")
    assert found == expected_patch(loaded, "blocks.3.mlp", photo, row, column)
    assert not page.get_by_test_id("highlighted-text").is_visible()


def test_errors_of_the_command(tmp_path, capsys, monkeypatch):
    assert demo.main(["--checkpoint", str(tmp_path / "nothing")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("vmoe-demo: error: no weights at")
    assert message.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--checkpoint", "x", "--port", "70000"])
    assert "port must be 1 to 65535, got 70000" in capsys.readouterr().err
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, embed_dim=32, **TINY)
    save_pretrained(model, tmp_path / "vmoe.safetensors")
    file = str(tmp_path / "vmoe.safetensors")
    assert demo.main(["--checkpoint", file, "--templates", "a {}"]) == 2
    assert "templates are for image-text models" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert demo.main(["--checkpoint", file, "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use): choose another --port" in capsys.readouterr().err
    assert demo.main(["--checkpoint", file, "--host", "203.0.113.1"]) == 1  # another machine's
    assert "cannot listen on 203.0.113.1, port any (Cannot assign" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--checkpoint", file]) == 1
    assert "the demo needs the package gradio: pip install -e '.[demo]'" in capsys.readouterr().err


def test_search_in_an_index(folder, open_demo, browser, photo):
    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    save_pretrained(model, folder / "searched.safetensors")
    loaded = load_model(str(folder / "searched.safetensors"), "cpu")
    Image.new("RGB", (60, 40), "red").save(folder / "red.png")
    images = ImageFiles(folder, ["photo.png", "red.png"])
    embed_images(loaded, images, folder / "index.npz", LoaderConfig(num_workers=0))
    index = SearchIndex(folder / "index.npz", device="cpu")
    app, address = launch(loaded, index=index)
    page = open_demo(address)
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What the images show").fill("a red apple")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("table", name="Found images").wait_for()
    assert rows(page, "Found images") == {f"{hit.score:.4f}": [hit.path] for hit in index.by_text("a red apple")}
    assert page.get_by_role("button", name="Thumbnail").count() == 2
    page.get_by_label("What the images show").fill(" ")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Give either a text or an image.").wait_for()
    app.close(verbose=False)

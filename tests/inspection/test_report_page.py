"""The HTML report in a browser, opened from the disk without a network: what it shows is what was computed."""

import dataclasses
import re
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest

from vmoe.inspection.report import write_report

NASTY = """</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1">'"&amp;{{ own }}<!--"""
CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const results = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.getClientRects().length) continue;
    if (element.closest("script, style, .unseen, button:disabled")) continue;
    const style = getComputedStyle(element);
    const colours = [parse(element.closest("svg") ? style.fill : style.color), behind(element)];
    const [dark, light] = colours.map(luminance).sort((x, y) => x - y);
    results.push([(light + 0.05) / (dark + 0.05), text, element.outerHTML.slice(0, 120)]);
  }
  return results;
}"""


def rounded(value, digits):
    """As JavaScript's toFixed rounds: ties away from zero."""
    return str(Decimal(float(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(value):
    return f"{rounded(100 * float(value), 1)}%"


def weight(value):
    return rounded(round(float(value), 4), 4)


def open_file(page, file):
    page.goto(file.as_uri())
    page.wait_for_selector("#cards .card")
    return page


def open_report(page, statistics, folder):
    return open_file(page, write_report(statistics, folder / "report.html"))


@pytest.fixture(scope="module")
def report(example_statistics, tmp_path_factory):
    """(statistics, file) of an image-text model with two choices per token and 30 images."""
    statistics = example_statistics(num_selected_experts=2, num_images=30)
    return statistics, write_report(statistics, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser_page, report):
    """That report, newly opened; no problems may come up."""
    browser_page.statistics, file = report
    yield open_file(browser_page, file)
    assert browser_page.problems == []


def choose(page, layer=None, expert=None):
    if layer is not None:
        page.select_option("#layer", str(layer))
    if expert is not None:
        page.select_option("#expert", str(expert))


def table(page, box):
    """The rows of a table as lists of texts."""
    return page.eval_on_selector_all(
        f"#{box} tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )


def maps(page):
    page.evaluate("document.getElementById('cards').scrollIntoView()")
    for _ in range(200):  # a canvas that was never drawn is 300 pixels wide; Playwright's own waiting needs `eval`
        if page.evaluate("[...document.querySelectorAll('#cards canvas')].every(c => c.width > 0 && c.width !== 300)"):
            break
        page.wait_for_timeout(50)
    return page.eval_on_selector_all("#cards canvas", "all => all.slice(0, 3).map(canvas => canvas.toDataURL())")


def tip_lines(routing, position):
    """The lines of the tooltip: expert, then weight and what became of it."""
    return [
        f"{expert}weight {weight(value)}{'' if kept else ', dropped: no capacity'}"
        for expert, value, kept in zip(
            routing.expert[position], routing.weight[position], routing.kept[position], strict=True
        )
    ]


def shown_tip(page):
    page.wait_for_selector("#tip:not([hidden])")
    return page.locator("#tip strong").inner_text(), page.eval_on_selector_all(
        "#tip li", "lines => lines.map(line => line.textContent)"
    )


def check_header(page):
    header = page.locator("header").inner_text()
    assert "runs/example" in header
    assert "example images" in header
    assert re.search(r"Images\s+30", header)
    assert page.title() == "Routing report: runs/example"
    [first, second] = table(page, "agreement-text")
    assert (first, second) == (["block 1", "1.00", "0.25"], ["block 3", "0.25", "1.00"])


def check_layers(page):
    expected = []
    for index, layer in enumerate(page.statistics.layers):
        for modality, noun in (("image", "patches"), ("text", "text tokens")):
            kept = layer.kept[modality]
            expected.append(
                [
                    f"block {2 * index + 1}",
                    noun,
                    f"{layer.tokens[modality]:,}",
                    "8",
                    percent(layer.share_dropped[modality]),
                    rounded(layer.entropy[modality], 3),
                    str(int((kept == 0).sum())),
                    percent(kept.max() / layer.asked[modality].sum()),
                    str(int(kept.argmax())),
                ]
            )
    assert table(page, "layer-table") == expected


def check_experts(page):
    choose(page, layer=1)
    layer = page.statistics.layers[1]
    for expert, row in enumerate(table(page, "expert-table")):
        expected = [str(expert)]
        for modality in ("image", "text"):
            kept, asked, importance = (values[modality] for values in (layer.kept, layer.asked, layer.importance))
            expected += [
                f"{kept[expert]:,}",
                percent(kept[expert] / asked.sum()),
                percent((asked[expert] - kept[expert]) / asked[expert]) if asked[expert] else "–",
                rounded(importance[expert], 1),
                percent(importance[expert] / importance.sum()),
            ]
        assert row == expected


def check_bars(page):
    layer = page.statistics.layers[0]
    labels = page.eval_on_selector_all(
        "#expert-charts > :first-child .bar", "bars => bars.map(bar => bar.getAttribute('aria-label'))"
    )
    for expert, kept in enumerate(layer.kept["image"]):
        share = percent(kept / layer.asked["image"].sum())
        assert labels[expert].startswith(f"expert {expert}: taken: {kept:,}, {share}; dropped: ")
    page.locator("#expert-charts .bar").nth(2).click()
    assert page.input_value("#expert") == "2"


def check_heat_map(page):
    layer = page.statistics.layers[0]
    titles = page.eval_on_selector_all("#class-chart tbody td", "cells => cells.map(cell => cell.title)")
    for c, name in enumerate(page.statistics.class_names):
        counts = layer.expert_class[:, c]
        for expert, count in enumerate(counts):
            assert f"{name}, expert {expert}: {percent(count / counts.sum())} ({count})" in titles


def test_what_is_shown_is_what_was_computed(page):
    checks = (check_header, check_layers, check_experts, check_heat_map, check_text_tokens, check_notes)
    for check in (*checks, check_tooltips, check_collage, check_bars):
        choose(page, layer=0, expert="")
        check(page)


def test_another_layer_or_expert_changes_maps_collage_and_tables(page):
    before, rows = maps(page), table(page, "expert-table")
    choose(page, layer=1)
    assert "block 3" in page.locator("#images-title").inner_text()
    assert table(page, "expert-table") != rows
    assert all(old != new for old, new in zip(before, maps(page), strict=True))
    choose(page, layer=0, expert=2)
    layer = page.statistics.layers[0]
    labels = page.eval_on_selector_all("#collage .patch", "all => all.map(patch => patch.getAttribute('aria-label'))")
    assert labels == [
        f"images/{p.sample:04d}.png, row {p.row}, column {p.column}: expert 2, weight {weight(p.weight)}"
        for p in layer.typical_patches[2][:24]
    ]
    assert maps(page) != before
    assert page.get_attribute('#legend [data-expert="2"]', "aria-pressed") == "true"
    assert page.locator("#expert-table tr.chosen").inner_text().startswith("2")
    counts = layer.expert_class
    expected = {
        name: [
            f"{counts[:, c].sum():,}",
            str(counts[:, c].argmax()),
            percent(counts[:, c].max() / counts[:, c].sum()),
            str(counts[2, c]),
            percent(counts[2, c] / counts[:, c].sum()),
        ]
        for c, name in enumerate(page.statistics.class_names)
    }
    assert {name: rest for name, *rest in table(page, "class-table")} == expected
    page.click('#legend [data-expert="2"]')
    assert page.input_value("#expert") == ""
    assert maps(page) == before


def check_collage(page):
    """The middle of the first patch on screen has the colour of the patch that was found."""
    choose(page, layer=0, expert=1)
    page.locator("#collage").scroll_into_view_if_needed()
    page.wait_for_timeout(200)
    for index in (0, 5):
        shot = page.locator("#collage .patch").nth(index).screenshot()
        pixels = page.evaluate(
            """async (bytes) => {
              const bitmap = await createImageBitmap(new Blob([new Uint8Array(bytes)]));
              const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
              const brush = canvas.getContext("2d");
              brush.drawImage(bitmap, 0, 0);
              return [...brush.getImageData(bitmap.width / 2, bitmap.height / 2, 1, 1).data].slice(0, 3);
            }""",
            list(shot),
        )
        own = page.statistics.layers[0].typical_patches[1][index].pixels
        np.testing.assert_allclose(pixels, own[own.shape[0] // 2, own.shape[1] // 2], atol=16)


def check_tooltips(page):
    choose(page, layer=1)
    canvas = page.locator("#cards canvas").nth(2)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for row, column in ((0, 0), (3, 1)):
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 4, box["y"] + (row + 0.5) * box["height"] / 4)
        title, lines = shown_tip(page)
        assert title == f"Row {row}, column {column}"
        assert lines == tip_lines(page.statistics.samples[2].patches[1], (row, column))
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_the_keyboard_reaches_patches_and_text_tokens(page):
    sample = page.statistics.samples[0]
    page.focus("#find")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "CANVAS":
            break
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    title, lines = shown_tip(page)
    assert title == "Row 2, column 1"
    assert lines == tip_lines(sample.patches[0], (2, 1))
    spoken = page.locator("#live").inner_text()
    assert spoken.startswith(f"Row 2, column 1: expert {sample.patches[0].expert[2, 1, 0]}, weight ")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    title, lines = shown_tip(page)
    assert title == sample.text_tokens[1]
    assert lines == tip_lines(sample.text[0], 1)


def check_text_tokens(page):
    chips = page.locator("#cards .card").first.locator(".chips button")
    sample = page.statistics.samples[0]
    for index, word in enumerate(sample.text_tokens):
        kept = np.flatnonzero(sample.text[0].kept[index])
        expert = str(sample.text[0].expert[index, kept[0]]) if len(kept) else "–"
        assert chips.nth(index).inner_text().split("\n")[0].startswith(f"{word}{expert}")


def test_tables_are_sorted_by_their_headers_and_stay_so(page):
    header = page.locator("#token-table thead th").nth(1)
    counts = {word: int(own.sum()) for word, own in page.statistics.layers[0].expert_token.items()}
    assert header.get_attribute("aria-sort") == "descending"
    assert [int(row[1]) for row in table(page, "token-table")] == sorted(counts.values(), reverse=True)
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert [int(row[1]) for row in table(page, "token-table")] == sorted(counts.values())
    page.click("#token-table thead th:first-child button")
    assert header.get_attribute("aria-sort") == "none"
    names = [row[0] for row in table(page, "token-table")]
    assert sorted(names) == sorted(counts)
    assert [n for n in names if n.isalpha()] == sorted(n for n in counts if n.isalpha())
    # Sorting and focus stay when an expert or another layer is chosen.
    page.click("#class-table thead th:nth-child(1) button")
    names = [row[0] for row in table(page, "class-table")]
    page.locator("#class-table tbody tr").nth(3).locator("button").focus()
    page.keyboard.press("Enter")
    assert [row[0] for row in table(page, "class-table")] == names
    assert page.locator("#class-table th").first.get_attribute("aria-sort") == "ascending"
    choose(page, layer=1)
    assert [row[0] for row in table(page, "class-table")] == names


def test_images_are_found_and_turned_over(page):
    assert page.locator("#cards .card").count() == 24
    page.click("#next")
    assert page.locator("#cards .card").count() == 6
    assert page.locator("#page").inner_text() == "page 2 of 2, 30 images"
    assert page.evaluate("document.activeElement.id") == "previous"
    page.fill("#find", "0007")
    assert page.locator("#cards .card p").first.inner_text() == "images/0007.png"
    assert page.locator("#cards .card").count() == 1
    page.fill("#find", "")
    assert page.locator("#page").inner_text() == "page 1 of 2, 30 images"


def test_the_worst_mistakes_come_first(browser_page, example_statistics, tmp_path):
    statistics = example_statistics(num_images=5, num_classes=8)
    for index, other in ((1, 1), (3, 5)):  # the second of its likeliest names is right, none of them is
        sample = statistics.samples[index]
        sample.label = (sample.label + other) % 8
    page = open_report(browser_page, statistics, tmp_path)
    shown = "all => all.map(path => Number(path.textContent.slice(7, 11)))"
    assert page.eval_on_selector_all("#cards .card div > p", shown) == [0, 1, 2, 3, 4]
    page.select_option("#order", "worst")
    assert page.eval_on_selector_all("#cards .card div > p", shown) == [3, 1, 0, 2, 4]
    page.fill("#find", "000")
    assert page.eval_on_selector_all("#cards .card div > p", shown) == [3, 1, 0, 2, 4]
    for sample in statistics.samples:
        sample.label = None
    page = open_report(browser_page, statistics, tmp_path)
    assert not page.locator("#order").is_visible()
    assert page.problems == []


def test_text_of_the_data_is_never_html(browser_page, example_statistics, tmp_path):
    statistics = example_statistics(num_images=3, num_classes=3)
    statistics.checkpoint = statistics.data = NASTY
    statistics.class_names = [f"{NASTY} {c}" for c in range(3)]
    statistics.versions = {NASTY: NASTY}
    for sample in statistics.samples:
        sample.path, sample.caption, sample.text_tokens[1] = f"{NASTY}\udcff.png", NASTY, NASTY
        sample.top_classes = [(NASTY, 0.5)]
    for layer in statistics.layers:
        layer.expert_token[NASTY] = np.arange(8)
    page = open_report(browser_page, statistics, tmp_path)
    assert page.locator("#cards .card h3").first.inner_text() == f"{NASTY} 0"
    assert page.locator("#cards .chips button").nth(1).inner_text().startswith(NASTY)
    assert NASTY in [row[0] for row in table(page, "token-table")]
    assert {row[0] for row in table(page, "class-table")} == set(statistics.class_names)
    assert page.locator("#class-chart tbody td").first.get_attribute("title").startswith(NASTY)
    assert page.evaluate("window.broken") is None
    assert page.problems == []


def test_a_classifier_of_64_experts_without_text(browser_page, example_statistics, tmp_path):
    statistics = example_statistics(num_experts=64, num_selected_experts=2, grid=7, side=112, text=False)
    page = open_report(browser_page, statistics, tmp_path)
    assert len(table(page, "expert-table")) == 64
    assert page.locator("#expert option").count() == 65
    assert page.locator("#token-table").is_hidden()
    assert page.locator("#tokens-note").inner_text() == "No texts were read."
    assert page.locator("#cards .chips").count() == 0
    choose(page, expert=40)
    canvas = page.locator("#cards canvas").first
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    page.keyboard.press("ArrowDown")
    title, lines = shown_tip(page)
    assert title == "Row 1, column 0"
    assert lines == tip_lines(statistics.samples[0].patches[0], (1, 0))
    assert page.problems == []


def test_layers_of_one_modality_and_data_without_classes(browser_page, example_statistics, tmp_path):
    statistics = example_statistics()
    first, second = statistics.layers
    for modality, layer, index in (("image", first, 0), ("text", second, 1)):
        for name in ("tokens", "asked", "kept", "importance", "entropy", "share_dropped"):
            del getattr(layer, name)[modality]
        for sample in statistics.samples:
            (sample.patches if modality == "image" else sample.text)[index] = None
    first.name, second.name = "text.blocks.1.mlp", "visual.blocks.1.mlp"
    first.typical_patches, second.expert_token = [[] for _ in range(8)], {}
    first.expert_class = second.expert_class = None
    statistics = dataclasses.replace(statistics, class_names=None)
    page = open_report(browser_page, statistics, tmp_path)
    assert page.locator("#layer option").all_inner_texts() == [first.name, second.name]
    assert page.locator("#cards canvas").count() == 0
    assert "sees no images" in page.locator("#collage").inner_text()
    choose(page, layer=1, expert=3)
    assert page.locator("#cards canvas").count() == len(statistics.samples)
    assert page.locator("#tokens-note").inner_text() == "This layer sees no texts."
    assert page.locator("#classes-note").inner_text() == "The data has no classes."
    assert page.problems == []


def test_text_is_readable_and_a_narrow_window_needs_no_scrolling_sideways(page):
    choose(page, expert=1)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRAST)
        assert len(found) > 250
        assert [entry for entry in found if entry[0] < 4.5] == []
    choose(page, expert="")
    page.set_viewport_size({"width": 400, "height": 800})
    page.locator("#cards").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    # all sections can be reached, and no typical patch is cut off
    assert page.locator("#sections a").last.is_visible()
    cut = """() => [...document.querySelectorAll("#collage .collage")].filter(
      (list) => list.scrollHeight > list.clientHeight + 1 || list.scrollWidth > list.clientWidth + 1).length"""
    assert page.evaluate(cut) == 0


def as_router(statistics, router):
    """The same statistics as another router would have them."""
    for layer in statistics.layers:
        layer.router, layer.num_selected_experts = router, layer.num_experts
        layer.asked = layer.kept
    return statistics


def texts(page):
    """What a reader sees, without texts of the data."""
    return page.locator("body").inner_text().lower()


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_nothing_is_dropped_where_experts_or_slots_choose(browser_page, example_statistics, tmp_path, router):
    statistics = as_router(example_statistics(num_selected_experts=8), router)
    page = open_report(browser_page, statistics, tmp_path)
    choose(page, expert=1)
    assert "dropped" not in texts(page).replace("nothing is dropped", "")
    assert "had capacity" not in texts(page)
    headers = page.locator("#expert-table thead, #layer-table thead").all_inner_texts()
    assert not any("Dropped" in text or "dropped" in text for text in headers)
    assert ("Taken by none" in headers[0]) == (router == "expert_choice")
    assert page.problems == []


def check_notes(page):
    layer = page.statistics.layers[0]
    titles = page.eval_on_selector_all("#class-table thead button", "all => all.map(button => button.textContent)")
    assert titles == ["Class", "assignments", "most to", "share to that"]
    note = page.locator("#classes-note").inner_text()
    assert "asks for 2 experts" in note
    assert f"Dropped assignments ({percent(layer.share_dropped['image'])}) are not counted." in note
    assert "100% of what was not dropped" in note


def test_fixed_capacity_patches_of_other_images_and_dropped_patches(browser_page, example_statistics, tmp_path):
    statistics = example_statistics()
    for layer in statistics.layers:
        layer.capacity, layer.eval_capacity_factor = 4, None
    statistics.layers[0].typical_patches[1][0].sample = 17
    routing = statistics.samples[0].patches[0]
    routing.kept[...], routing.expert[...] = True, 2
    routing.kept[0, 0] = False
    page = open_report(browser_page, statistics, tmp_path)
    header = page.locator("header").inner_text()
    assert "4 rows per expert, largest weights first" in header
    assert "nothing is dropped" not in header
    choose(page, layer=0, expert=1)
    label = page.locator("#collage .patch").first.get_attribute("aria-label")
    assert label.startswith("image 17 of the data, row ")
    maps(page)
    # Dropped patches stay hatched when an expert is chosen.
    colours = """([column]) => {
      const canvas = document.querySelector("#cards canvas");
      const brush = canvas.getContext("2d");
      const [w, h] = [canvas.width / 4, canvas.height / 4];
      const { data } = brush.getImageData(column * w + 4, 4, w - 8, h - 8);
      const found = new Set();
      for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 4).join());
      return found.size;
    }"""
    assert page.evaluate(colours, [1]) == 1  # dimmed
    assert page.evaluate(colours, [0]) > 2  # stripes


def test_errors_exceptions_and_requests_of_a_page_are_noticed(browser_page, tmp_path):
    """The fixture `browser_page`: what goes wrong on a page must not go unseen."""
    file = tmp_path / "page.html"
    file.write_text(
        "<!doctype html><script>console.error('one'); setTimeout(() => {throw Error('two')}, 0)</script>"
        "<img src='https://example.com/three.png'><img src='four.png'>"
    )
    browser_page.goto(file.as_uri(), wait_until="networkidle")
    problems = "\n".join(browser_page.problems)
    for problem in ("console: one", "exception: two", "failed: https://example.com/three.png", "four.png"):
        assert problem in problems

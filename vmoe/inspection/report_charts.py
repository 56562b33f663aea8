"""The charts of the HTML report as Vega-Lite specifications; the page gives them their rows.

Each takes its values from a data set called "rows", so that one specification serves every layer and expert. Fields
called "shown" and "count" are texts, formatted by the page as its tables are; "spoken" is what screen readers say.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

MODALITY_COLOURS = {"patches": "#0072B2", "words": "#D55E00"}  # also told apart by the shape of the points
LABEL_LIMIT = 260  # pixels of a class's name; the page shortens names that are longer
FLAT = {"labelAngle": 0, "labelOverlap": True}


def chart_library() -> ModuleType:
    """vl_convert, which brings Vega-Lite.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the HTML report draws its charts with Vega-Lite and needs {error.name}: "
            "pip install -e '.[report]' in a checkout",
            name=error.name,
        ) from None
    return vl_convert


@cache
def chart_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    library = chart_library()
    return library.javascript_bundle(vl_version=library.get_vegalite_versions()[-1])


def chart_specifications() -> dict[str, dict[str, Any]]:
    """{name: Vega-Lite specification}: "bars", "lines", "share_lines", "classes" and "agreement"."""
    major = chart_library().get_vegalite_versions()[-1].partition(".")[0]
    charts = {
        "bars": _bars(),
        "lines": _lines(".3~f", {}),
        "share_lines": _lines(".1~%", {"domain": {"unionWith": [0, 0.05]}}),  # zeros alone have an axis too
        "classes": _classes(),
        "agreement": _agreement(),
    }
    fixed = {"$schema": f"https://vega.github.io/schema/vega-lite/v{major}.json", "data": {"name": "rows"},
             "width": "container"}  # fmt: skip
    return {name: {**fixed, **chart} for name, chart in charts.items()}


def _field(name: str, kind: str = "nominal", title: str | None = None, **more: Any) -> dict[str, Any]:
    return {"field": name, "type": kind, "title": title, **more}


def _tooltip(**titles: str) -> list[dict[str, Any]]:
    return [_field(name, title=title) for name, title in titles.items()]


def _bars() -> dict[str, Any]:
    """One bar per expert; rows: expert, part, count, share, shown, colour, opacity, order (of the parts)."""
    encoding = {
        "x": _field("expert", "ordinal", "expert", axis=FLAT),
        "y": _field("share", "quantitative", axis={"format": "%", "tickCount": 4}, stack="zero"),
        "color": _field("colour", scale=None),
        "opacity": _field("opacity", "quantitative", scale=None),
        "order": _field("order", "quantitative"),
        "description": _field("spoken"),
        "tooltip": _tooltip(expert="expert", part="which", count="sum", shown="share"),
    }
    return {"height": 170, "mark": {"type": "bar", "cornerRadius": 1}, "encoding": encoding}


def _lines(number_format: str, scale: dict[str, Any]) -> dict[str, Any]:
    """A value over the layers; rows: layer, modality, value, shown (the value as the tables show it)."""
    names, colours = list(MODALITY_COLOURS), list(MODALITY_COLOURS.values())
    encoding = {
        "x": _field("layer", sort=None, axis=FLAT),
        "y": _field("value", "quantitative", scale=scale, axis={"tickCount": 4, "format": number_format}),
        "color": _field("modality", scale={"domain": names, "range": colours}),
        "shape": _field("modality", scale={"domain": names, "range": ["circle", "square"]}),
        "tooltip": _tooltip(layer="layer", modality="modality", shown="value"),
        "description": _field("spoken"),
    }
    mark = {"type": "line", "point": {"size": 60, "filled": True}, "strokeWidth": 2}
    return {"height": 150, "mark": mark, "encoding": encoding}


def _classes() -> dict[str, Any]:
    """Experts by classes, as high as the page says; rows: row (its label), name, expert, share, shown, count."""
    legend = {"format": "%", "orient": "bottom", "gradientLength": 180, "titleLimit": 240, "tickCount": 4}
    scale = {"scheme": "viridis", "domainMin": 0}
    encoding = {
        "x": _field("expert", "ordinal", "expert", axis={**FLAT, "orient": "top"}),
        "y": _field("row", sort=None, axis={"labelLimit": LABEL_LIMIT}),
        "color": _field("share", "quantitative", "share of the class", scale=scale, legend=legend),
        "tooltip": _tooltip(name="class", expert="expert", count="sum", shown="share"),
    }
    # Thousands of cells; the table beside them has the same values.
    return {"mark": {"type": "rect", "aria": False}, "encoding": encoding}


def _agreement() -> dict[str, Any]:
    """Layers by layers, as high as the page says; rows: a, b, value (None: the two cannot be compared), shown."""
    cells = {
        "color": _field("value", "quantitative", scale={"scheme": "viridis", "domain": [0, 1]}, legend=None),
        "tooltip": _tooltip(a="layer", b="layer", shown="agreement"),
        "description": _field("spoken"),
    }
    text = {"type": "text", "aria": False, "fontSize": 11}
    # viridis is light above the middle
    ink = {"condition": {"test": "datum.value > 0.6", "value": "#000000"}, "value": "#ffffff"}
    return {
        "encoding": {"x": _field("a", sort=None, axis={**FLAT, "orient": "top"}), "y": _field("b", sort=None)},
        "layer": [
            {"mark": "rect", "encoding": cells},
            {"mark": text, "encoding": {"text": _field("shown"), "color": ink}},
        ],
    }

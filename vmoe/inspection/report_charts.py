"""The charts of the HTML report as Vega-Lite specifications; the page gives them their rows.

Each takes its values from a data set called "rows", so that one specification serves every layer and expert. Fields
called "shown" and "count" are texts, formatted by the page as its tables are; "spoken" is what screen readers say.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

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
    """{name: Vega-Lite specification}: "bars" and "classes"."""
    major = chart_library().get_vegalite_versions()[-1].partition(".")[0]
    schema = f"https://vega.github.io/schema/vega-lite/v{major}.json"
    fixed = {"$schema": schema, "data": {"name": "rows"}, "width": "container"}
    return {"bars": {**fixed, **_bars()}, "classes": {**fixed, **_classes()}}


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

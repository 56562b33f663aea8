"""The charts of the HTML report as Vega-Lite specifications, made with Altair; the page gives them their rows.

Each takes its figures from a data set called "rows", so that one specification serves every layer and expert. Fields
called "shown" and "count" are texts, formatted by the page as its tables are; "spoken" is what screen readers say.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

MODALITY_COLOURS = {"patches": "#0072B2", "words": "#D55E00"}  # also told apart by the shape of the points

LABEL_LIMIT = 260  # pixels of a class's name; the page shortens names that are longer


def chart_library() -> tuple[ModuleType, ModuleType]:
    """(altair, vl_convert).

    Raises:
        ModuleNotFoundError: one of them is not installed.
    """
    try:
        import altair
        import vl_convert
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the HTML report draws its charts with Altair and needs {error.name}: "
            "pip install -e '.[report]' in a checkout",
            name=error.name,
        ) from None
    return altair, vl_convert


@cache
def chart_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`."""
    altair, vl_convert = chart_library()
    minor = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    # A newer Altair than vl-convert knows differs in what these plain charts do not use.
    return vl_convert.javascript_bundle(vl_version=minor if minor in known else known[-1])


def chart_specifications() -> dict[str, dict[str, Any]]:
    """{name: Vega-Lite specification}: "bars", "lines", "share_lines", "classes" and "agreement"."""
    charts = {
        "bars": _bars(),
        "lines": _lines(".3~f"),
        "share_lines": _lines(".1~%", least=0.05),
        "classes": _classes(),
        "agreement": _agreement(),
    }
    return {name: chart.to_dict(context={"pre_transform": False}) for name, chart in charts.items()}


def _bars():
    """One bar per expert; rows: expert, part, count, share, shown, colour, opacity, order (of the parts)."""
    alt, _ = chart_library()
    return (
        alt.Chart(alt.NamedData("rows"), width="container", height=170)
        .mark_bar(cornerRadius=1)
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("share:Q", title=None, axis=alt.Axis(format="%", tickCount=4), stack="zero"),
            color=alt.Color("colour:N", scale=None),
            opacity=alt.Opacity("opacity:Q", scale=None),
            order=alt.Order("order:Q"),
            description="spoken:N",
            tooltip=[
                alt.Tooltip("expert:O", title="expert"),
                alt.Tooltip("part:N", title="which"),
                alt.Tooltip("count:N", title="sum"),
                alt.Tooltip("shown:N", title="share"),
            ],
        )
    )


def _lines(number_format: str, least: float | None = None):
    """A figure over the layers; rows: layer, modality, value, shown (the value as the tables show it).

    least: the axis goes from 0 to this at least, so that nothing but zeros has an axis too.
    """
    alt, _ = chart_library()
    scale = alt.Scale() if least is None else alt.Scale(domain=alt.DomainUnionWith(unionWith=[0, least]))
    names, colours = list(MODALITY_COLOURS), list(MODALITY_COLOURS.values())
    return (
        alt.Chart(alt.NamedData("rows"), width="container", height=150)
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2)
        .encode(
            x=alt.X("layer:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=4, format=number_format)),
            color=alt.Color("modality:N", title=None, scale=alt.Scale(domain=names, range=colours)),
            shape=alt.Shape("modality:N", title=None, scale=alt.Scale(domain=names, range=["circle", "square"])),
            tooltip=["layer:N", "modality:N", alt.Tooltip("shown:N", title="value")],
            description="spoken:N",
        )
    )


def _classes():
    """Experts by classes, as high as the page says; rows: row (its label), name, expert, share, shown, count."""
    alt, _ = chart_library()
    return (
        alt.Chart(alt.NamedData("rows"), width="container")
        .mark_rect(aria=False)  # thousands of cells; the table beside it has the same figures
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap=True, orient="top")),
            y=alt.Y("row:N", title=None, sort=None, axis=alt.Axis(labelLimit=LABEL_LIMIT)),
            color=alt.Color(
                "share:Q",
                title="share of the class",
                scale=alt.Scale(scheme="viridis", domainMin=0),
                legend=alt.Legend(format="%", orient="bottom", gradientLength=180, titleLimit=240, tickCount=4),
            ),
            tooltip=[
                alt.Tooltip("name:N", title="class"),
                alt.Tooltip("expert:O", title="expert"),
                alt.Tooltip("count:N", title="sum"),
                alt.Tooltip("shown:N", title="share"),
            ],
        )
    )


def _agreement():
    """Layers by layers, as high as the page says; rows: a, b, value (None: the two cannot be compared), shown."""
    alt, _ = chart_library()
    base = alt.Chart(alt.NamedData("rows"), width="container").encode(
        x=alt.X("a:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True, orient="top")),
        y=alt.Y("b:N", title=None, sort=None),
    )
    scale = alt.Scale(scheme="viridis", domain=[0, 1])
    cells = base.mark_rect().encode(
        color=alt.Color("value:Q", scale=scale, legend=None),
        tooltip=[
            alt.Tooltip("a:N", title="layer"),
            alt.Tooltip("b:N", title="layer"),
            alt.Tooltip("shown:N", title="agreement"),
        ],
        description="spoken:N",
    )
    numbers = base.mark_text(aria=False, fontSize=11).encode(
        text="shown:N",
        # viridis is light above the middle
        color=alt.condition("datum.value > 0.6", alt.value("#000000"), alt.value("#ffffff")),
    )
    return cells + numbers

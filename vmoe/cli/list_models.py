"""The table of docs/models.md: `vmoe-list-models [NAME ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vmoe.cli.command import exit_code

SOURCES = {
    "vmoe_naflex_": "ours, after [NaViT](https://arxiv.org/abs/2307.06304)",
    "vmoe_": "[V-MoE](https://arxiv.org/abs/2106.05974)",
    "softmoe_": "[Soft MoE](https://arxiv.org/abs/2308.00951)",
    "siglino_": "[SigLino](https://arxiv.org/abs/2512.20157)",
    "swin_moe_": "[Swin-MoE](https://arxiv.org/abs/2206.03382)",
    "limoe_": "[LIMoE](https://arxiv.org/abs/2206.02770)",
    "two_tower_soft_": "[Soft MoE](https://arxiv.org/abs/2308.00951)",
    "two_tower_": "ours, after [CLIP-UP](https://arxiv.org/abs/2502.00965)",
}
HEAD = """\
| name | parameters | active | GFLOPs per image | GFLOPs per text | source |
| --- | ---: | ---: | ---: | ---: | --- |"""


def table_row(name: str) -> str:
    """A line of the table, for the name of one of this package's models."""
    from vmoe.models.factory import create_model
    from vmoe.models.flops import model_profile
    from vmoe.utils.meta import meta_device

    with meta_device():  # the largest cost no memory
        model = create_model(name)
    profile = model_profile(model)
    source = next((source for prefix, source in SOURCES.items() if name.startswith(prefix)), "")
    total, active = (f"{profile[f'parameters_{kind}'] / 1e6:,.1f} M" for kind in ("total", "active"))
    text = f"{profile['gflops_per_text']:.3g}" if "gflops_per_text" in profile else "–"
    return f"| `{name}` | {total} | {active} | {profile['gflops_per_image']:.4g} | {text} | {source} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the named models, or of all; returns the exit code, see `exit_code`."""
    parser = argparse.ArgumentParser(prog="vmoe-list-models", description="A table of models: parameters and FLOPs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models, also with wildcards; by default all")
    arguments = parser.parse_args(argv)
    return exit_code("vmoe-list-models", lambda: run(arguments.names or [""]))


def run(patterns: Sequence[str]) -> None:
    """Prints the table of the models that match; ValueError, before it: a name is unknown."""
    from vmoe.models.spec import list_models

    rows: dict[str, str | None] = {}
    for pattern in patterns:
        rows |= dict.fromkeys(list_models(pattern)) or {pattern: table_row(pattern)}  # one of timm's or open_clip's
    print(HEAD)
    for name, row in rows.items():
        print(row or table_row(name))

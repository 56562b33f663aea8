"""Generates docs/performance.md from the files in benchmarks/results: `python -m benchmarks.report`.

With --check nothing is written; the exit code is 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import bars
from benchmarks.session import RESULTS, ROOT, read_results
from vmoe.utils.files import atomic_file

PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, Any]
Section = dict[str, Any]

MADE = (
    "`python -m benchmarks.report` generates this page from the files in `benchmarks/results`; do not edit it by "
    "hand. `benchmarks/NOTES.md` says what was tried."
)
METHOD = (
    "The cost of a sparse layer, compared with a dense baseline and other libraries. Ratios are measured in one "
    "process, alternating (A B A B ...), with a new input in each round, and computed per round. Tables show the "
    'median and (lowest-highest). Below 1 the numerator is faster. "dense" is timm\'s MLP or ViT with the same active '
    'compute: the hidden units of K experts. "kept" is the share of the assignments that the experts keep; the dense '
    "baseline keeps all. Forward is in `eval()` without gradients, with the capacity in use. Forward + backward is in "
    "training mode, with gradients of the input and of all parameters, which are None before each call, as after "
    "`optimizer.zero_grad()`. Activations are, on a CPU, what autograd keeps for the backward pass, without "
    "parameters; on CUDA, the peak beyond parameters and their gradients."
)

NO_GPU = (
    "## GPUs\n\nNone was measured: there is no file of a GPU in `benchmarks/results`. The same commands work on one."
)

ABOUT = {
    "layer": "The layer alone. `mlp`: the dense MLP; `image`: the tokens of one image, nothing dropped; `swiglu`: "
    "gated experts without biases, nothing dropped, as in transformers' Mixtral block; `st_moe`: st_moe_pytorch with "
    "timm's MLPs as experts, its capacity set to keep the same share; `soft`: Soft MoE with about as many slots as "
    "tokens; `dropless`: packages for CUDA. `mlp` has the number of rounds below, `image` four times as many, the "
    "others half.",
    "dispatch": "The layer without its experts, step by step; batch priority (BPR) against token order, alternating; "
    "and GShard's one-hot matrix multiplications on few tokens.",
    "scaling": 'One axis at a time around E = 8, K = 1, capacity 1.0; "base" is that case. "experts" is the expert '
    "MLPs alone. The last column is the time to read the weights at the speed of a large copy (forward + backward: to "
    "read them twice and write their gradients).",
    "model": "The widths of ViT-S/16, experts in every second block, E = 8, K = 1, exact GELU in both models, "
    "untrained weights. Untrained routers balance tokens worse than trained ones; the compute is equal only if "
    "nothing is dropped. Training is forward and backward. Speed is images per second over the dense model's: above 1 "
    "the sparse model is faster. One image has four times the number of rounds below.",
    "train_step": "Forward, routing losses, backward, clipping, fused AdamW; bfloat16 is autocast on float32 weights. "
    "The V-MoE has a capacity of 1.05 and batch priority. The LIMoE is `limoe_tiny_patch12_48` with capacity 1.25 and "
    "four times the number of rounds below.",
    "trainers": "`train.py`, timm's train.py and open_clip's trainer with the same model, JPEG files, crops, batches, "
    "optimizer and one worker. Each epoch ends with a checkpoint, and a classifier's with an evaluation of 8 images. "
    "The CPU time of one epoch, of all processes, is taken from that of several, so start-up and the first reading "
    "of the images do not count. Speed is images per CPU second over the other trainer's: above 1 "
    "`train.py` is cheaper.",
}


def merged(folder: Path) -> list[dict[str, Any]]:
    """[{"device", "sections"}] of all devices, CPUs first; of a command that ran on several days, the latest.

    Raises:
        ValueError: a file is damaged.
    """
    devices: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.name):
        content = read_results(file)
        one = devices.setdefault(str(content["device"]), {"device": content["device"], "sections": {}})
        for key, section in content["sections"].items():
            known = one["sections"].get(key)
            if known is None or known["finished"] <= section["finished"]:
                one["sections"][key] = section
    return sorted(devices.values(), key=lambda one: (one["device"]["kind"], one["device"]["name"]))


def page(folder: Path) -> str:
    """The whole page."""
    devices = merged(folder)
    parts = ["# Performance", _prose(MADE), _prose(METHOD)]
    for one in devices:
        parts.append(f"## {_device_title(one['device'])}")
        sections = sorted(one["sections"].items(), key=lambda item: _position(*item))
        if not sections:
            continue
        if one["device"]["kind"] == "cpu":
            parts.append(_bars_table([section for _, section in sections]))
        for _, section in sections:
            parts += _section(section)
    if not devices:
        parts.append("Nothing was measured: there is no file in `benchmarks/results`.")
    if not any(one["device"]["kind"] == "cuda" for one in devices):
        parts.append(NO_GPU)
    return "\n\n".join(parts) + "\n"


def _device_title(device: dict[str, Any]) -> str:
    if device["kind"] == "cuda":
        return f"{device['name']}, {device['memory_gib']:g} GiB (host: {device['cpu']})"
    extra = f", {', '.join(device['instructions'])}" if device["instructions"] else ""
    return f"{device['name']}, {device['cores']} cores{extra}"


def _position(key: str, section: Section) -> tuple[int, str]:
    return list(ABOUT).index(section["benchmark"]), key


def _bars_table(sections: list[Section]) -> str:
    lines = []
    for bar in bars(sections):
        if bar.found is None:
            lines.append((bar.what, bar.goal, "not measured", "", f"`{bar.command}`"))
            continue
        median, low, high = bar.found["median"], bar.found["min"], bar.found["max"]
        verdict = "met" if bar.met else f"missed by {abs(median - bar.limit):.3f}"
        lines.append((bar.what, bar.goal, f"{median:.3f} ({low:.3f}-{high:.3f})", verdict, f"`{bar.command}`"))
    head = ("ratio", "goal", "median (lowest-highest)", "", "command")
    return "### Goals\n\n" + _table(head, lines, numbers=(2,))


def _section(section: Section) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in section["versions"].items())
    commit = f"commit {section['commit'][:10]}" if section["commit"] else "no commit known"
    changed = " with uncommitted changes" if section["changed"] else ""
    yield f"### {section['benchmark']}: `{section['command']}`"
    yield _prose(ABOUT[section["benchmark"]])
    yield _prose(
        f"{section['finished'][:10]}, {commit}{changed}; rounds: {section['rounds']}; threads: {section['threads']}; "
        f"allocator: {section['allocator']}; {versions}."
    )
    ceilings = [row for row in section["rows"] if row["comparison"] == "ceiling"]
    machine = [
        f"in {row['dtype']} a large matrix multiplication {_spread(row['gemm_gflops'], '.0f')} GFLOP/s, a large copy "
        f"{_spread(row['copy_gbps'], '.1f')} GB/s"
        for row in ceilings
    ]
    if machine:
        yield _prose(f"The machine: {'; '.join(machine)}.")
    rows = [row for row in section["rows"] if row["comparison"] != "ceiling"]
    for comparison in dict.fromkeys(row["comparison"] for row in rows):
        chosen = [row for row in rows if row["comparison"] == comparison]
        if section["benchmark"] == "scaling":
            order = list(dict.fromkeys((row["dtype"], row["pass"], row["name"]) for row in chosen))
            chosen.sort(key=lambda row: (order.index((row["dtype"], row["pass"], row["name"])), row[row["comparison"]]))
        settings = list(dict.fromkeys(_setting(row) for row in chosen))
        if len(settings) == 1 and settings[0]:
            yield f"{settings[0]}:"
        yield _rows_table(section["benchmark"], chosen, with_setting=len(settings) > 1)
    if section["notes"]:
        yield "\n".join(_prose(f"- {note}", "  ") for note in section["notes"])


def _prose(text: str, indent: str = "") -> str:
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, 120, subsequent_indent=indent, **options)


# Columns: title -> text of a row, "" where it has none.
def _columns(benchmark: str, comparison: str) -> dict[str, Callable[[Row], str]]:
    columns: dict[str, Callable[[Row], str]] = {comparison: lambda row: row["name"]}
    if benchmark == "scaling":
        columns = {comparison: lambda row: f"{row[comparison]:g}", "part": lambda row: row["name"]}
    columns |= {
        "type": lambda row: row.get("dtype", ""),
        "pass": lambda row: row.get("pass", ""),
        "setting": _setting,
        "kept": lambda row: f"{row['kept']:.1%}" if "kept" in row else "",
        "ms": lambda row: f"{row['ms']['median']:.4g}" if "ms" in row else "",
        "CPU ms an image": lambda row: _spread(row["cpu_ms_per_image"], ".2f") if "cpu_ms_per_image" in row else "",
        "images/s": lambda row: f"{row['images_per_second']['median']:.4g}" if "images_per_second" in row else "",
        "speed": lambda row: _spread(row["speed_ratio"], ".3f") if "speed_ratio" in row else "",
    }
    for other in ("base", "dense", "vmoe", "layer, vanilla", "dispatch and combine"):
        title = f"time / {other}"
        columns[title] = lambda row, other=other: _ratio(row, other)
    columns |= {
        "share of large matmul": lambda row: f"{row['share_of_gemm']['median']:.0%}" if "share_of_gemm" in row else "",
        "activations / dense": lambda row: f"{row['activations_ratio']:.2f}" if "activations_ratio" in row else "",
        "weights, MiB": lambda row: f"{row['weights_mib']:g}" if "weights_mib" in row else "",
        "reading them, ms": lambda row: f"{row['weights_ms']:.3g}" if "weights_ms" in row else "",
    }
    return columns


def _setting(row: Row) -> str:
    """The sizes of a row, but for the axis of its table."""
    names = {
        "batch": "batch {:g}",
        "image_size": "{:g} px",
        "tokens": "{:g} tokens",
        "width": "D = {:g}",
        "hidden": "F = {:g}",
        "experts": "E = {:g}",
        "selected": "K = {:g}",
        "capacity": "capacity {:g}",
        "slots": "{:g} slots",
    }
    return ", ".join(form.format(row[n]) for n, form in names.items() if n in row and n != row["comparison"])


def _ratio(row: Row, other: str) -> str:
    return _spread(row["ratios"][other], ".3f") if other in row["ratios"] else ""


def _spread(one: dict[str, float], form: str) -> str:
    return f"{one['median']:{form}} ({one['min']:{form}}-{one['max']:{form}})"


def _rows_table(benchmark: str, rows: list[Row], with_setting: bool) -> str:
    columns = _columns(benchmark, rows[0]["comparison"])
    if not with_setting:
        columns.pop("setting")
    used = {title: text for title, text in columns.items() if any(text(row) for row in rows)}
    lines = [tuple(text(row) for text in used.values()) for row in rows]
    texts = {"part", "type", "pass", "setting"} | ({rows[0]["comparison"]} if benchmark != "scaling" else set())
    numbers = [index for index, title in enumerate(used) if title not in texts]
    return _table(tuple(used), lines, numbers)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    rule = ["---:" if index in numbers else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page")
    args = parser.parse_args(argv)
    try:
        text = page(args.results)
    except ValueError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 1
    if args.check:
        if not args.page.exists() or args.page.read_text(encoding="utf-8") != text:
            print(
                f"{args.page.name} is not what the files in {args.results.name} give; run python -m benchmarks.report",
                file=sys.stderr,
            )
            return 1
        return 0
    with atomic_file(args.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

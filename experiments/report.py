"""Writes docs/results.md and other pages' tables from the records of all experiments: `python -m experiments.report`.

With --check nothing is written; the exit code is 1 if they are out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from experiments.compare import Estimate, estimate
from experiments.figure import draw, is_share
from experiments.plan import MINUS, OUTPUT, ROOT, Cell, as_text
from experiments.results import Results
from vmoe.utils.files import atomic_file

PAGE = ROOT / "docs" / "results.md"
WITH_TABLES = (ROOT / "README.md", ROOT / "docs" / "choosing.md")  # pages with tables between marks
MARKED = re.compile(r"(<!-- results of (\w+) -->\n)(?:(?!<!-- results).)*?(<!-- end of results -->)", re.DOTALL)
MARK = re.compile(r"<!-- (?:results|end of results).*?-->")
MADE = (
    "`python -m experiments.report` generates this page from `experiments/*.yaml` and the records in "
    "`experiments/results`; do not edit it by hand. [experiments/README.md](../experiments/README.md) says how to run "
    "an experiment."
)
METHOD = (
    "Values are means over seeds ± their standard error. A difference is taken seed by seed, since runs of one seed "
    "share the order of the data, and then averaged: it is called clear if there are at least three seeds and it is "
    "more than two standard errors from 0. With three seeds that is weak evidence for a single row, and of many rows "
    'some are clear by chance. "seeds" counts those that have the first metric. "p, images" '
    "is the probability that two equally good runs differ so much by the choice of the validation images: McNemar's "
    "test, with an image's differences summed over the seeds. Accuracies, and differences of them, are in percent. "
    "GFLOPs are of the forward pass of one image, two for a multiply-add. images/s are of training, measured by "
    "`python -m experiments.speed`, one run after the other: the median of its rounds, and (lowest-highest)."
)
MOST_NAMES = 5  # of a group in a verdict; the table has all
COSTS = {
    "parameters": ("parameters_total", 1e-6, ".2f", " M"),
    "active": ("parameters_active", 1e-6, ".2f", " M"),
    "GFLOPs": ("gflops_per_image", 1, ".4g", ""),
}


def page(results: Sequence[Results]) -> str:
    """The whole page."""
    shown = [one for one in results if one.shown]
    parts = ["# Results", prose(MADE), prose(METHOD)]
    if not shown:
        parts.append("There is no record of a run in `experiments/results` yet.")
    else:
        lines = [f"- [{one.experiment.question}](#{anchor(one.experiment.question)}) {verdict(one)}" for one in shown]
        parts += ["## Verdicts", "\n".join(prose(line, "  ") for line in lines)]
    for one in shown:
        parts += section(one)
    return "\n\n".join(parts) + "\n"


def section(results: Results) -> Iterator[str]:
    experiment, name = results.experiment, results.name
    yield f"## {experiment.question}"
    yield prose(f"**{verdict(results)}**")
    if experiment.source:
        yield prose(f"Source: {experiment.source}.")
    yield prose(f"Set-up: {', '.join(f'`{key} {as_text(value)}`' for key, value in common_settings(results).items())}.")
    missing = [cell.name for key, cell in results.cells.items() if key not in results.records]
    if missing:
        yield prose(f"Not made yet: {', '.join(missing)}.")
    yield table(results)
    yield prose(f"Measured on {'; '.join(devices(results))}; {commits(results)}.")
    if results.speed["images_per_second"]:
        speed = results.speed
        yield prose(f"images/s on {speed['device']}, {count_threads(speed['threads'])}, torch {speed['torch']}.")
    if results.unknown:
        yield prose(f"The records of {', '.join(results.unknown)} do not say on which images they were trained.")
    yield f"![{experiment.question}](images/{figure_name(name)})"
    yield "\n".join(["```", f"python -m experiments.launch {shown_path(results.file)}", "```"])
    commands = [f"{cell.command()}" for cell in first_cells(results)]
    yield "\n".join(["<details><summary>Command of each row</summary>", "", "```", *commands, "```", "", "</details>"])


def with_tables(file: Path, results: Sequence[Results]) -> str:
    """The text of a page with what the records say, between its marks "results of EXPERIMENT"."""
    known = {one.name: one for one in results}

    def between(found: re.Match) -> str:
        if found[2] not in known:
            raise ValueError(f"{file.name}: no experiment is called {found[2]!r}; a mark names a file of experiments/")
        one = known[found[2]]
        said = prose(f"{one.experiment.question} {verdict(one)}")
        return f"{found[1]}{said}\n\n{table(one, short=True)}\n\n{found[3]}"

    text = file.read_text(encoding="utf-8")
    if len(MARK.findall(text)) != 2 * len(MARKED.findall(text)):
        raise ValueError(f"{file.name}: write '<!-- results of NAME -->' and '<!-- end of results -->' in pairs")
    return MARKED.sub(between, text)


def table(results: Results, short: bool = False) -> str:
    """A row for each run; a short table has the first metric and what a model costs."""
    seeds = [str(len(results.values(run, results.metrics[0]))) for run in results.runs]
    columns = [["run", *results.runs], ["seeds", *seeds]]  # those that have the first metric
    for metric in results.metrics[:1] if short else results.metrics:
        values = [list(results.values(run, metric).values()) for run in results.runs]
        columns.append([metric, *(show(estimate(each), metric) if each else "" for each in values)])
    if (base := results.experiment.baseline) is not None:
        found = [results.difference(run) for run in results.runs]
        shown = ("" if each is None else show(each, results.metrics[0], signed=True) for each in found)
        columns.append([f"difference to {base}", *shown])
        tests = [results.image_test(run) for run in results.runs]
        columns += [] if short else [["p, images", *("" if p is None else show_p(p) for p in tests)]]
    for name, form in COSTS.items():
        columns.append([name, *(cost(results, run, *form) for run in results.runs)])
    if rounds := results.speed["images_per_second"]:
        columns.append(["images/s", *(show_speed(rounds.get(run)) for run in results.runs)])
    head, *lines = zip(*columns, strict=True)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (head, rule, *lines)
    )


def cost(results: Results, run: str, metric: str, factor: float, form: str, unit: str) -> str:
    values = results.values(run, metric).values()
    return f"{factor * fmean(values):{form}}{unit}" if values else ""


def show_speed(rounds: list[float] | None) -> str:
    return f"{median(rounds):,.0f} ({min(rounds):,.0f}-{max(rounds):,.0f})" if rounds else ""


def show(found: Estimate, metric: str, signed: bool = False) -> str:
    """ "71.2 ± 0.3"; shares in percent."""
    percent = is_share(metric)
    factor, form = (100, ".2f") if percent else (1, ".4g")
    text = f"{factor * found.mean:{'+' if signed else ''}{form}}"
    return text if found.error is None else f"{text} ± {factor * found.error:{'.2f' if percent else '.2g'}}"


def show_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(results: Results) -> str:
    """What the numbers say, in one sentence."""
    base, metric, words = results.experiment.baseline, results.metrics[0], ("better", "worse")
    means = {run: estimate([*values.values()]) for run in results.runs if (values := results.values(run, metric))}
    best = (max if results.higher else min)(means, key=lambda run: means[run].mean)
    leader = f"{best} has the best {metric}, {show(means[best], metric)} ({count(means[best].seeds)})"
    if MINUS in metric:
        leader, base = metric.split(MINUS)
        words = ("higher", "lower")
    found = {run: one for run in means if (one := results.difference(run)) is not None}
    if not found:
        return f"{leader}."
    sign = 1 if results.higher else -1
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "few": []}
    for run, one in sorted(found.items(), key=lambda item: -sign * item[1].mean):
        clear = "better" if sign * one.mean > 0 else "worse"
        kind = "few" if not one.has_enough else clear if one.is_clear else "open"
        groups[kind].append(f"{run} ({show(one, metric, signed=True)})")
    said = {
        "better": f"clearly {words[0]} than {base}",
        "worse": f"clearly {words[1]} than {base}",
        "open": f"not clearly different from {base}",
        "few": f"against {base} with one or two seeds",
    }
    parts = [f"{said[kind]}: {some(runs)}" for kind, runs in groups.items() if runs]
    if not groups["better"] and (groups["worse"] or groups["open"]):
        parts.insert(0, f"no run is clearly {words[0]} than {base}")
    return f"{'; '.join([leader, *parts])}."


def some(runs: list[str]) -> str:
    """The first names, and how many others there are."""
    others = f" and {len(runs) - MOST_NAMES} others" if len(runs) > MOST_NAMES + 1 else ""
    return ", ".join(runs[:MOST_NAMES] if others else runs) + others


def count(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def common_settings(results: Results) -> dict[str, Any]:
    """The settings that all runs share."""
    first, *others = first_cells(results)
    return {
        key: value for key, value in first.settings.items() if all(one.settings.get(key) == value for one in others)
    }


def first_cells(results: Results) -> list[Cell]:
    """The cell of each row's first seed."""
    return [results.cells[run, min(results.of(run))] for run in results.runs]


def devices(results: Results) -> list[str]:
    """The machines, and which rows are from them if there are several."""
    rows: dict[str, dict[str, None]] = {}
    for (run, _), record in sorted(results.records.items()):
        where = f"{record['device']}, {count_threads(record['threads'])}, torch {record['torch']}"
        rows.setdefault(where, {})[run] = None
    return list(rows) if len(rows) == 1 else [f"{where}: {', '.join(runs)}" for where, runs in rows.items()]


def commits(results: Results) -> str:
    """The commits of the code, and which had changes."""
    names = {
        f"{(record['commit'] or 'unknown')[:10]}{' with uncommitted changes' if record['changed'] else ''}"
        for record in results.records.values()
    }
    return f"commit{'s' * (len(names) > 1)} {', '.join(sorted(names))}"


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def figure_name(name: str) -> str:
    return f"results_{name}.png"


def shown_path(file: Path) -> str:
    file = file.resolve()
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def prose(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", type=Path, help="YAMLs; default: all in experiments/ but drafts")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page; figures are in images/ beside it")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="folder of the runs, for drafts")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args(argv)
    try:
        files = args.experiments or sorted((ROOT / "experiments").glob("*.yaml"))
        results = [Results(file, args.output_dir.resolve()) for file in files]
        results = [one for one in results if args.experiments or not one.experiment.draft]
        pages = {args.output: page(results)}
        if args.output == PAGE and not args.experiments:
            pages |= {file: with_tables(file, results) for file in WITH_TABLES}
        return check(pages, args.output, results) if args.check else write(pages, args.output, results)
    except (ValueError, OSError) as error:
        print(f"experiments.report: error: {error}", file=sys.stderr)
        return 1


def check(pages: dict[Path, str], output: Path, results: list[Results]) -> int:
    """1 unless the pages are what the records give, and the figures are there."""
    wrong = [file for file, text in pages.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    figures = [output.parent / "images" / figure_name(one.name) for one in results if one.shown]
    wrong += [figure for figure in figures if not figure.is_file()]
    for file in wrong:
        print(f"{file} is not what the records give; run python -m experiments.report", file=sys.stderr)
    return 1 if wrong else 0


def write(pages: dict[Path, str], output: Path, results: list[Results]) -> int:
    """Writes the pages and the figures."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for one in results:
        if one.shown:
            draw(one, output.parent / "images" / figure_name(one.name))
            print(f"{one.name}: {verdict(one)}")
    for file, text in pages.items():
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

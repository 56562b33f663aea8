"""What all benchmarks of speed share: their options, the state of the machine, and the file of results.

A device and a day have one file, `benchmarks/results/<device>-<date>.json`; each command has its section in it, and a
later run of the same command takes its place.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe, device_name, revision
from benchmarks.measure import DTYPES, WARM_UP, Ceiling, alternate, milliseconds, ratios, synchronizer
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.files import atomic_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "timm", "transformers", "st-moe-pytorch", "soft-moe-pytorch", "torchao", "triton"),
    *("scattermoe", "megablocks", "tutel"),
)
FORMAT = 1
# Options that say how long or where to, not what is measured.
NOT_IN_KEY = ("rounds", "results")


# Sizes of a layer: option -> (type, default, help).
SIZES = {
    "tokens": (int, 6304, "of a call (%(default)s: 32 images)"),
    "width": (int, 384, "D (%(default)s)"),
    "hidden": (int, 1536, "F, of each expert (%(default)s)"),
    "experts": (int, 8, "E (%(default)s)"),
    "selected": (int, 1, "K (%(default)s)"),
    "capacity": (float, 1.0, "capacity factor (%(default)s)"),
}


def make_parser(benchmark: str, description: str, rounds: int, sizes: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has, and some of `SIZES`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each contender runs (%(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="types, in turn")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU; default: its own choice")
    parser.add_argument(
        "--allocator",
        choices=["keep", "system"],
        default="keep",
        help="keep: freed memory stays with the process, as in training; system: glibc's own way",
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="everything through torch.compile, in this mode",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    for name in sizes:
        kind, default, words = SIZES[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=words)
    return parser


class Session:
    """One run of a benchmark: collects rows and notes (what was not measured, and why), and writes the section."""

    def __init__(
        self, benchmark: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None, compiles: bool = True
    ) -> None:
        warnings.filterwarnings("ignore", "a sparse layer trains without")  # layers are measured by themselves
        self.benchmark = benchmark
        self.parser = parser
        self.args = parser.parse_args(argv)
        for name in ("rounds", "threads", "length", *SIZES):
            value = getattr(self.args, name, None)
            if value is not None and name != "capacity" and value < 1:
                parser.error(f"--{name} must be at least 1, got {value}")
        if self.args.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        if self.args.compile and not compiles:
            parser.error(f"--compile: benchmarks.{benchmark} has no compiled form; leave it out")
        self.device = torch.device(self.args.device)
        if self.args.threads is not None:
            torch.set_num_threads(self.args.threads)
        self.keeps_memory = self.args.allocator == "keep" and keep_freed_memory()
        if self.args.compile:  # many modules share code; one that is no longer compiled must not be measured as such
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch.manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        print(f"{self.command()}\n{device_name(self.device)}, {self.threads} threads, torch {torch.__version__}")
        print(f"allocator: {allocator(self.device, self.keeps_memory)}", flush=True)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def command(self, key: bool = False) -> str:
        """The command line without defaults, or with `key` only what says what is measured; a path as its metavar."""
        words = ["python", "-m", f"benchmarks.{self.benchmark}"]
        for action in self.parser._actions:
            value = getattr(self.args, action.dest, None)
            left_out = action.dest == "results" or (key and action.dest in NOT_IN_KEY)
            if left_out or not action.option_strings or value in (None, False) or value == action.default:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[-1], *(action.metavar if isinstance(v, Path) else str(v) for v in values)]
        return shlex.join(words)

    def alternate(
        self,
        calls: Mapping[Any, Callable],
        make_input: Callable[[int], Any],
        modules: Iterable[nn.Module] = (),
        rounds: int | None = None,
        warmup: int = WARM_UP,
    ) -> dict[Any, list[float]]:
        """Seconds of the calls in turn, see `measure.alternate`; the modules' gradients are None before each call."""
        modules = list(modules)
        return alternate(
            calls,
            make_input,
            rounds or self.args.rounds,
            warmup=warmup,
            before=lambda: [module.zero_grad(set_to_none=True) for module in modules],
            synchronize=synchronizer(self.device),
        )

    def add_times(self, seconds: Mapping[str, Sequence[float]], base: str, row_of: Callable[[str], dict]) -> None:
        """A row for each call: what `row_of` says of its name, its time, and its ratio to the time of `base`."""
        for name, own in seconds.items():
            times = {"ms": milliseconds(own), "ratios": {} if name == base else {base: ratios(own, seconds[base])}}
            self.add({"name": name, **row_of(name), **times})

    def run(self, measure: Callable[[Session, str, dict[str, dict[str, float]]], None]) -> None:
        """Measures in each type, given the machine's rates, and writes the section; errors are one sentence."""
        for dtype in self.args.dtype:
            try:
                measure(self, dtype, measure_ceiling(self, dtype, Ceiling(self.device, DTYPES[dtype])))
            except (ValueError, AssertionError) as error:  # timm asserts what it is given
                self.parser.error(str(error))
        self.finish()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and print it: "ms" are milliseconds, "ratios" compare with others of the same rounds."""
        self.rows.append(row)
        texts = [str(row[name]) for name in ("comparison", row["comparison"], "dtype", "pass", "name") if name in row]
        if "kept" in row:
            texts.append(f"{row['kept']:.1%} kept")
        texts += [f"{to} {one['median']:.3g}" for to, one in row.items() if isinstance(one, dict) and "median" in one]
        for to, one in row.get("ratios", {}).items():
            texts.append(f"ratio to {to} {one['median']:.3f} ({one['min']:.3f}-{one['max']:.3f})")
        print(", ".join(texts), flush=True)

    def note(self, sentence: str) -> None:
        """Keep a sentence and print it."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            print(f"note: {sentence}", flush=True)

    def finish(self) -> Path:
        """Write the section into the file of this device and day."""
        now = datetime.now(UTC)
        section = {
            "benchmark": self.benchmark,
            "command": self.command(),
            "finished": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **revision(),
            "versions": versions(),
            "threads": self.threads,
            "allocator": allocator(self.device, self.keeps_memory),
            "rounds": self.args.rounds,
            "rows": self.rows,
            "notes": self.notes,
        }
        file = write_section(self.args.results, describe(self.device), now, self.command(key=True), section)
        print(f"wrote {file.name}")
        return file


def measure_ceiling(session: Session, dtype: str, ceiling: Ceiling) -> dict[str, dict[str, float]]:
    """The large matrix multiplication and the large copy, in turn, as a row of their own; see `Ceiling.rates`."""
    rates = ceiling.rates(session.alternate(ceiling.calls, lambda _: None))
    session.add({"comparison": "ceiling", "name": "machine", "dtype": dtype, **rates})
    return rates


def write_section(folder: Path, device: dict[str, Any], when: datetime, key: str, section: dict[str, Any]) -> Path:
    """Puts a section into the file of a device and day, atomically, in place of one with the same key.

    Raises:
        ValueError: the file there is not one of these.
    """
    date = when.strftime("%Y-%m-%d")
    file = folder / f"{slug(device)}-{date}.json"
    content: dict[str, Any] = {"format": FORMAT, "device": device, "date": date, "sections": {}}
    if file.exists():
        content = read_results(file)
    content["sections"][key] = section
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def read_results(file: Path) -> dict[str, Any]:
    """A file of results; raises ValueError if it is damaged, or of another format."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["sections"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is not a file of benchmark results (format {FORMAT}); delete it and measure again")


def slug(device: dict[str, Any]) -> str:
    """A device as the beginning of a file's name."""
    words = f"{device['kind']} {device['name']}" + (f" {device['cores']} cores" if device["kind"] == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def allocator(device: torch.device, keeps_memory: bool) -> str:
    """Who hands out memory, and how it is set."""
    if device.type == "cuda":
        return f"PyTorch's for CUDA, PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'not set')}"
    preloaded = [Path(word).name for word in re.split("[ :]", os.environ.get("LD_PRELOAD", "")) if word]
    names = sorted(name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    settings = [f"set by {', '.join(f'{name}={os.environ[name]}' for name in names)}"] if names else []
    if keeps_memory:
        by_us = "set by vmoe.utils.allocator.keep_freed_memory, as in training: freed memory stays with the process"
        settings.append(by_us)
    whose = f"preloaded: {', '.join(preloaded)}" if preloaded else f"{platform.libc_ver()[0] or 'system'}'s"
    return ", ".join([whose, *(settings or ["as it is by itself"])])


def versions() -> dict[str, str]:
    """Python and the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

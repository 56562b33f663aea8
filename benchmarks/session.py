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
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import DTYPES, Ceiling, alternate, synchronizer
from vmoe.utils.allocator import keep_freed_memory
from vmoe.utils.atomic import whole_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "timm", "transformers", "st-moe-pytorch", "soft-moe-pytorch", "torchao", "triton"),
    *("scattermoe", "megablocks", "tutel"),
)
FORMAT = 1
# Options that say how long or where to, not what is measured.
NOT_IN_KEY = ("rounds", "results")


def make_parser(benchmark: str, description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
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
    return parser


class Session:
    """One run of a benchmark: collects rows, prints them, writes the section.

    Args:
        benchmark: its name.
        parser: of `make_parser`.
        argv: the command line; None: the process's own.
        compiles: whether the benchmark has a compiled form.

    Attributes:
        args: the options.
        device: where it runs.
        rows: what was measured.
        notes: what was not, and why.
    """

    def __init__(
        self, benchmark: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None, compiles: bool = True
    ) -> None:
        self.benchmark = benchmark
        self.parser = parser
        self.args = parser.parse_args(argv)
        if self.args.rounds < 1:
            parser.error(f"--rounds must be at least 1, got {self.args.rounds}")
        if self.args.threads is not None and self.args.threads < 1:
            parser.error(f"--threads must be at least 1, got {self.args.threads}")
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
        """The command line, without what is left at its default; a path stands as its option's metavar.

        Args:
            key: only what says what is measured.
        """
        words = ["python", "-m", f"benchmarks.{self.benchmark}"]
        for action in self.parser._actions:
            value = getattr(self.args, action.dest, None)
            left_out = action.dest == "results" or (key and action.dest in NOT_IN_KEY)
            if left_out or not action.option_strings or value in (None, False) or value == action.default:
                continue
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[-1], *(action.metavar if isinstance(v, Path) else str(v) for v in values)]
        return shlex.join(words)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and print it: "ms" are milliseconds, "ratios" compare with others of the same rounds."""
        self.rows.append(row)
        told = [str(row[name]) for name in ("comparison", row["comparison"], "dtype", "pass", "name") if name in row]
        if "kept" in row:
            told.append(f"{row['kept']:.1%} kept")
        told += [f"{to} {one['median']:.3g}" for to, one in row.items() if isinstance(one, dict) and "median" in one]
        for to, one in row.get("ratios", {}).items():
            told.append(f"ratio to {to} {one['median']:.3f} ({one['min']:.3f}-{one['max']:.3f})")
        print(", ".join(told), flush=True)

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
    """The large product and the large copy as a row of their own, in turn with one another; see `Ceiling.rates`."""
    synchronize = synchronizer(session.device)
    seconds = alternate(ceiling.calls, lambda _: None, session.args.rounds, synchronize=synchronize)
    rates = ceiling.rates(seconds)
    session.add({"comparison": "ceiling", "name": "machine", "dtype": dtype, **rates})
    return rates


def write_section(folder: Path, device: dict[str, Any], when: datetime, key: str, section: dict[str, Any]) -> Path:
    """Put a section into the file of a device and day, in place of one with the same key; the file is whole or not.

    Raises:
        ValueError: the file there is not one of these.
    """
    date = when.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(device)}-{date}.json"
    content: dict[str, Any] = {"format": FORMAT, "device": device, "date": date, "sections": {}}
    if file.exists():
        content = read_results(file)
    content["sections"][key] = section
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def read_results(file: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["sections"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} is not a file of benchmark results (format {FORMAT}); delete it and measure again")


def describe(device: torch.device) -> dict[str, Any]:
    """{"kind", "name", "cores", "instructions"} of a CPU, {"kind", "name", "memory_gib", "cpu"} of a GPU."""
    name, instructions = cpu()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 2**30, 1)
        return {"kind": "cuda", "name": properties.name, "memory_gib": memory, "cpu": name}
    return {"kind": "cpu", "name": name, "cores": cpu_cores(), "instructions": instructions}


def device_name(device: torch.device) -> str:
    about = describe(device)
    return f"{about['name']}, {about['cores']} cores" if about["kind"] == "cpu" else about["name"]


def slug(device: dict[str, Any]) -> str:
    """A device as the beginning of a file's name."""
    words = f"{device['kind']} {device['name']}" + (f" {device['cores']} cores" if device["kind"] == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cpu() -> tuple[str, list[str]]:
    """The CPU's model, and those of its instruction sets that decide its speed."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1].strip() if found else name
        found = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
        flags = set(found[1].split()) if found else flags
    return name, [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocator(device: torch.device, keeps_memory: bool) -> str:
    """Who hands out memory, and how it is set."""
    if device.type == "cuda":
        return f"PyTorch's for CUDA, PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'not set')}"
    preloaded = [Path(word).name for word in re.split("[ :]", os.environ.get("LD_PRELOAD", "")) if word]
    by_environment = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    ]
    words = [f"{platform.libc_ver()[0] or 'system'}'s"]
    if preloaded:
        words = [f"preloaded: {', '.join(preloaded)}"]
    if by_environment:
        words.append(f"set by {', '.join(by_environment)}")
    if keeps_memory:
        words.append(
            "set by vmoe.utils.allocator.keep_freed_memory, as in training: freed memory stays with the process"
        )
    elif not by_environment:
        words.append("as it is by itself")
    return ", ".join(words)


def versions() -> dict[str, str]:
    """Python and the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision() -> dict[str, Any]:
    """{"commit", "changed"}: the checkout, and whether tracked files other than results differ from the commit."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        ours = (":!benchmarks/results", ":!docs/performance.md")
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("diff", "HEAD", "--name-only", "--", ".", *ours)),
        }
    except FileNotFoundError:  # no git here
        return {"commit": None, "changed": None}

"""What a result was made with: the machine and the commit."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.data.workers import cpu_cores

if TYPE_CHECKING:
    import torch


def describe(device: torch.device) -> dict[str, Any]:
    """{"kind", "name", "cores", "instructions"} of a CPU, {"kind", "name", "memory_gib", "cpu"} of a GPU."""
    name, instructions = cpu()
    if device.type == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 2**30, 1)
        return {"kind": "cuda", "name": properties.name, "memory_gib": memory, "cpu": name}
    return {"kind": "cpu", "name": name, "cores": cpu_cores(), "instructions": instructions}


def device_name(device: torch.device) -> str:
    about = describe(device)
    return f"{about['name']}, {about['cores']} cores" if about["kind"] == "cpu" else about["name"]


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


def revision() -> dict[str, Any]:
    """{"commit", "changed"}: the checkout, and whether tracked files other than results differ from the commit."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        ours = (":!benchmarks/results", ":!docs/performance.md", ":!experiments/results", ":!docs/results.md")
        ours += (":!docs/images/results_*",)
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("diff", "HEAD", "--name-only", "--", ".", *ours)),
        }
    except FileNotFoundError:  # no git here
        return {"commit": None, "changed": None}

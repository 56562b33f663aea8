"""GPUs to plan for: peaks from their data sheets, and the shares of a peak that the plan counts on."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from vmoe.utils.config import ConfigError

GiB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One processor and its links.

    Attributes:
        memory: GiB that the driver shows.
        half_tflops: peak of bf16 and fp16 matrix multiplications, 10^12 operations per second, without sparsity.
        float32_tflops: peak of float32 matrix multiplications; PyTorch's default uses no TF32.
        memory_bandwidth: GB/s.
        node_bandwidth: GB/s from one processor to others of its machine, in one direction.
        network_bandwidth: GB/s from one processor to other machines, in one direction.
        reserve: share of the memory left for fragmentation, the CUDA context, NCCL and cuBLAS buffers.
        matmul_efficiency: share of the peak that matrix multiplications reach.
        memory_efficiency: share of `memory_bandwidth` that is reached.
        link_efficiency: share of the links' bandwidth that is reached.
        launch: microseconds that any operation takes at least.
        latency: microseconds that any collective takes at least.
        foreach: optimizers work on all tensors at once (PyTorch's default on GPUs), which takes temporary memory.
    """

    memory: float
    half_tflops: float
    float32_tflops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    reserve: float = 0.1
    matmul_efficiency: float = 0.6
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    launch: float = 5.0
    latency: float = 20.0
    foreach: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * GiB * (1 - self.reserve)

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the memory that is reached."""
        return self.memory_bandwidth * 1e9 * self.memory_efficiency


# Peaks: NVIDIA's data sheets "A100 80GB SXM" (2021), "H100 SXM" (2023), "H200 SXM" (2024), "DGX B200" (2024, an eighth
# of it) and "L40S" (2023), without sparsity, NVLink halved to one direction. Memory: what nvidia-smi shows. Network:
# one adapter per GPU as in DGX systems (200 Gb/s for A100, 400 Gb/s since H100); for L40S 200 Gb/s is assumed.
HARDWARE = {
    "a100": Hardware(80, 312, 19.5, 2039, 300, 25),
    "h100": Hardware(79, 989, 67, 3350, 450, 50),
    "h200": Hardware(140, 989, 67, 4800, 450, 50),
    "b200": Hardware(179, 2250, 75, 8000, 900, 50),
    "l40s": Hardware(45, 362, 91.6, 864, 32, 25),
    # No data sheet: a small server, as a base for `--hardware.KEY`.
    "cpu": Hardware(64, 2, 1, 50, 10, 1.25, reserve=0.2, launch=10, latency=200, foreach=False),
}


def pick_hardware(name: str, changes: dict[str, float | None]) -> Hardware:
    """The entry `name` of `HARDWARE`, with some numbers replaced (None: not replaced).

    Raises:
        ConfigError: unknown name or key, or a number out of range.
    """
    if name not in HARDWARE:
        raise ConfigError(
            f"--gpu must be one of {', '.join(HARDWARE)}, got {name!r}; for another one take the nearest and give its "
            "numbers as --hardware.KEY"
        )
    known = [field.name for field in fields(Hardware) if field.name != "foreach"]
    changes = {key: value for key, value in changes.items() if value is not None}
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean 'hardware.{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key 'hardware.{key}'; {hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"hardware.{key} must be a number, got {value!r}")
        positive = key not in ("reserve", "launch", "latency")
        if not value >= 0 or (positive and value == 0):
            raise ConfigError(f"hardware.{key} must be {'> 0' if positive else '>= 0'}, got {value}")
        if (key.endswith("_efficiency") and value > 1) or (key == "reserve" and value >= 1):
            raise ConfigError(
                f"hardware.{key} is a share and must be {'<' if key == 'reserve' else '<='} 1, got {value}"
            )
    return replace(HARDWARE[name], **changes)


@dataclass(frozen=True)
class Links:
    """The links between processes; `per_node` consecutive ranks share a machine."""

    hardware: Hardware
    per_node: int

    def gather(self, size: float, ranks: Sequence[int]) -> float:
        """Seconds of a ring all-gather or reduce-scatter of `size` bytes in total; an all-reduce is both."""
        n, local = len(ranks), self._local(ranks)
        if n == 1 or size == 0:
            return 0.0
        node, network = self._speeds()
        seconds = size * (n - 1) / n / node if local > 1 else 0.0
        if local < n:  # the members of a machine use all their adapters
            machines = n / local
            seconds = max(seconds, size * (machines - 1) / machines / local / network)
        return seconds + self.hardware.latency * 1e-6

    def exchange(self, size: float, ranks: Sequence[int]) -> float:
        """Seconds of an all-to-all in which each process sends `size` bytes, its share for itself included."""
        n, local = len(ranks), self._local(ranks)
        if n == 1 or size == 0:
            return 0.0
        node, network = self._speeds()
        return max(size * (local - 1) / n / node, size * (n - local) / n / network) + self.hardware.latency * 1e-6

    def _speeds(self) -> tuple[float, float]:
        """(inside a machine, between machines) in bytes per second."""
        reached = 1e9 * self.hardware.link_efficiency
        return self.hardware.node_bandwidth * reached, self.hardware.network_bandwidth * reached

    def _local(self, ranks: Sequence[int]) -> int:
        """Members of a group that share the first one's machine."""
        return sum(rank // self.per_node == ranks[0] // self.per_node for rank in ranks)

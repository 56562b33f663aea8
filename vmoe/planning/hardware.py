"""Machines to plan for: peak numbers of their datasheets, and how much of a peak the plan counts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmoe.utils.config import ConfigError

GiB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One processor and its links.

    Attributes:
        memory: GiB that the driver shows.
        half_tflops: peak of bf16 and fp16 products, 10^12 operations per second, without structured sparsity.
        float32_tflops: peak of float32 products. PyTorch's default uses no TF32.
        memory_bandwidth: GB/s.
        node_bandwidth: GB/s from one processor to others of its machine, in one direction.
        network_bandwidth: GB/s from one processor to other machines, in one direction.
        reserve: share of the memory that is not planned with: fragmentation, CUDA context, NCCL and cuBLAS buffers.
        product_efficiency: share of the peak that matrix products reach; so are memory_efficiency and link_efficiency.
        launch: microseconds that any operation takes at least (launching it from Python).
        latency: microseconds that any collective takes at least.
        foreach: optimizers work on all tensors at once, which takes memory for a while: PyTorch's choice on GPUs.
    """

    memory: float
    half_tflops: float
    float32_tflops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    reserve: float = 0.1
    product_efficiency: float = 0.6
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.8
    launch: float = 5.0
    latency: float = 20.0
    foreach: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * GiB * (1 - self.reserve)


# Peaks: NVIDIA's datasheets "A100 80GB SXM" (2021), "H100 SXM" (2023), "H200 SXM" (2024), "DGX B200" (2024, an eighth
# of it) and "L40S" (2023), dense figures, NVLink halved to one direction. Memory: what nvidia-smi shows. Network: one
# adapter per processor as in DGX systems (200 Gb/s for A100, 400 Gb/s since H100); for L40S 200 Gb/s is assumed.
HARDWARE = {
    "a100": Hardware(80, 312, 19.5, 2039, 300, 25),
    "h100": Hardware(79, 989, 67, 3350, 450, 50),
    "h200": Hardware(140, 989, 67, 4800, 450, 50),
    "b200": Hardware(179, 2250, 75, 8000, 900, 50),
    "l40s": Hardware(45, 362, 91.6, 864, 32, 25),
    # No datasheet: a small server, as a start for `--hardware.KEY`. Processes of one machine talk through its memory.
    "cpu": Hardware(64, 2, 1, 50, 10, 1.25, reserve=0.2, launch=10, latency=200, foreach=False),
}


def pick_hardware(name: str, changes: dict[str, float | None]) -> Hardware:
    """The hardware of a name, with the numbers that a user gives in place of its own.

    Args:
        name: of `HARDWARE`.
        changes: {attribute of `Hardware`: number, or None for the table's}.

    Raises:
        ConfigError: unknown name, or a number out of range.
    """
    if name not in HARDWARE:
        raise ConfigError(
            f"--gpu must be one of {', '.join(HARDWARE)}, got {name!r}; for another one take the nearest and give its "
            "numbers as --hardware.KEY"
        )
    changes = {key: value for key, value in changes.items() if value is not None}
    for key, value in changes.items():
        least_open = key not in ("reserve", "launch", "latency")
        if value < 0 or (least_open and value == 0):
            raise ConfigError(f"hardware.{key} must be {'> 0' if least_open else '>= 0'}, got {value}")
        if (key.endswith("_efficiency") and value > 1) or (key == "reserve" and value >= 1):
            raise ConfigError(
                f"hardware.{key} is a share and must be {'<' if key == 'reserve' else '<='} 1, got {value}"
            )
    return replace(HARDWARE[name], **changes)


@dataclass(frozen=True)
class Links:
    """The links between processes: `per_node` neighbours in rank share a machine."""

    hardware: Hardware
    per_node: int

    def _speed(self, gigabytes: float) -> float:
        return gigabytes * 1e9 * self.hardware.link_efficiency

    def _local(self, ranks: Sequence[int]) -> int:
        """Members of a group that share the first one's machine."""
        return sum(rank // self.per_node == ranks[0] // self.per_node for rank in ranks)

    def gather(self, size: float, ranks: Sequence[int]) -> float:
        """Seconds of an all-gather, or reduce-scatter, of `size` bytes in all: a ring, machines use all adapters."""
        n, local = len(ranks), self._local(ranks)
        if n == 1 or size == 0:
            return 0.0
        seconds = size * (n - 1) / n / self._speed(self.hardware.node_bandwidth) if local > 1 else 0.0
        if local < n:
            machines = n / local
            network = size * (machines - 1) / machines / local / self._speed(self.hardware.network_bandwidth)
            seconds = max(seconds, network)
        return seconds + self.hardware.latency * 1e-6

    def reduce(self, size: float, ranks: Sequence[int]) -> float:
        """Seconds of an all-reduce of `size` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks)

    def exchange(self, size: float, ranks: Sequence[int]) -> float:
        """Seconds of an all-to-all in which each process sends `size` bytes, its own share of them to itself."""
        n, local = len(ranks), self._local(ranks)
        if n == 1 or size == 0:
            return 0.0
        inside = size * (local - 1) / n / self._speed(self.hardware.node_bandwidth)
        outside = size * (n - local) / n / self._speed(self.hardware.network_bandwidth)
        return max(inside, outside) + self.hardware.latency * 1e-6

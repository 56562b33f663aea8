"""GPUs to plan for: peaks from their data sheets, and the shares of a peak that the plan counts on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from vmoe.utils.config import ConfigError

GiB = 2**30
RESERVE = 0.1  # of the memory: fragmentation, the CUDA context, NCCL and cuBLAS buffers
MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.6, 0.8, 0.8  # shares of the peaks that are reached
LATENCY = 20e-6  # seconds that a collective takes at least


@dataclass(frozen=True)
class Hardware:
    """One processor and its links; links count in one direction."""

    memory: float  # GiB that the driver shows
    half_tflops: float  # peak of bf16 and fp16 matrix multiplications, 10^12 operations per second, without sparsity
    float32_tflops: float  # the same of float32; PyTorch's default uses no TF32
    memory_bandwidth: float  # GB/s
    node_bandwidth: float  # GB/s to others of the machine
    network_bandwidth: float  # GB/s to other machines
    foreach: bool = True  # optimizers work on all tensors at once (PyTorch's default on GPUs): temporary memory

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * GiB * (1 - RESERVE)

    def gather(self, size: float, ranks: Sequence[int], per_node: int) -> float:
        """Seconds of a ring all-gather or reduce-scatter of `size` bytes in total; an all-reduce is both. `per_node`
        consecutive ranks share a machine, whose members use all their adapters.
        """
        n, local = len(ranks), _on_first_machine(ranks, per_node)
        machines = n / local
        inside = size * (n - 1) / n if local > 1 else 0.0
        return self._send(inside, size * (machines - 1) / machines / local) if n > 1 else 0.0

    def exchange(self, size: float, ranks: Sequence[int], per_node: int) -> float:
        """Seconds of an all-to-all in which each process sends `size` bytes, its share for itself included."""
        n, local = len(ranks), _on_first_machine(ranks, per_node)
        return self._send(size * (local - 1) / n, size * (n - local) / n) if n > 1 else 0.0

    def _send(self, inside: float, between: float) -> float:
        """Seconds for bytes inside a machine and between machines, at the same time."""
        speed = 1e9 * LINK_EFFICIENCY
        return LATENCY + max(inside / self.node_bandwidth, between / self.network_bandwidth) / speed


def _on_first_machine(ranks: Sequence[int], per_node: int) -> int:
    return sum(rank // per_node == ranks[0] // per_node for rank in ranks)


# Peaks: NVIDIA's data sheets "A100 80GB SXM" (2021), "H100 SXM" (2023), "H200 SXM" (2024), "DGX B200" (2024, an eighth
# of it) and "L40S" (2023), without sparsity, NVLink halved to one direction. Memory: what nvidia-smi shows. Network:
# one adapter per GPU as in DGX systems (200 Gb/s for A100, 400 Gb/s since H100); for L40S 200 Gb/s is assumed.
HARDWARE = {
    "a100": Hardware(80, 312, 19.5, 2039, 300, 25),
    "h100": Hardware(79, 989, 67, 3350, 450, 50),
    "h200": Hardware(140, 989, 67, 4800, 450, 50),
    "b200": Hardware(179, 2250, 75, 8000, 900, 50),
    "l40s": Hardware(45, 362, 91.6, 864, 32, 25),
    "cpu": Hardware(64, 2, 1, 50, 10, 1.25, foreach=False),  # no data sheet: a base for `--hardware.KEY`
}


def pick_hardware(name: str, changes: dict[str, float]) -> Hardware:
    """The entry `name` of `HARDWARE` with some numbers replaced; a ConfigError names what is not known or not > 0."""
    if name not in HARDWARE:
        another = "for another one take the nearest and give its numbers as --hardware.KEY"
        raise ConfigError(f"--gpu must be one of {', '.join(HARDWARE)}, got {name!r}; {another}")
    known = [field.name for field in fields(Hardware) if field.name != "foreach"]
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(f"unknown key 'hardware.{key}'; known keys: {', '.join(known)}")
        if type(value) not in (int, float) or not value > 0:
            raise ConfigError(f"hardware.{key} must be a number > 0, got {value!r}")
    return replace(HARDWARE[name], **changes)

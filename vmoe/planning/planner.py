"""Every mesh that a number of processes allows: memory of a process, time of a step, and what bounds it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from vmoe.distributed.mesh import MeshSize
from vmoe.moe import SparseMoE
from vmoe.planning.hardware import MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, Hardware
from vmoe.planning.model_plan import make_model, model_units
from vmoe.planning.simulate import Step, optimizer_state, simulate_step
from vmoe.training.config import Config
from vmoe.training.optim import SHARDABLE, is_fused
from vmoe.utils.config import ConfigError

BUFFERS = 3  # of one all-to-all, at a time: rows to send, rows received, and their results
# Share of the activations' bytes that autocast leaves, without and with checkpointing: means of V-MoE, LIMoE, Soft MoE
# and ViT, tiny to B, with autocast imitated on the meta device (0.58 to 0.64 and 0.67 to 0.86).
AUTOCAST = {False: 0.62, True: 0.78}
ALONE = MeshSize(1)


@dataclass(frozen=True)
class Candidate:
    """A mesh, with or without activation checkpointing."""

    mesh: MeshSize
    grad_checkpointing: bool
    memory: dict[str, float]  # {kind: bytes} in one process when most is needed
    traffic: dict[str, float]  # {collective: bytes} that one process sends in one optimizer step
    seconds: dict[str, float]  # {part: seconds} of one optimizer step; they add up
    usable: float  # bytes that may be filled

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.usable

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


class Planner:
    """Plans a training config on `nodes` machines of `gpus_per_node` processes; a ConfigError if they do not fit."""

    def __init__(self, config: Config, hardware: Hardware, nodes: int, gpus_per_node: int) -> None:
        self.config, self.hardware, self.per_node = config, hardware, gpus_per_node
        self.world = nodes * gpus_per_node
        if config.data.loader.naflex is not None:
            raise ConfigError("data.loader.naflex has batches of several sizes, which cannot be planned; leave it out")
        batch = config.data.loader.batch_size
        if batch % self.world:
            nearest = max(1, round(batch / self.world)) * self.world
            raise ConfigError(
                f"data.loader.batch_size is {batch}, for all processes together, and {self.world} processes cannot "
                f"share it evenly; set it to {nearest}, or choose other --nodes and --gpus_per_node"
            )
        self.local_batch = batch // self.world
        self.precision = config.train.precision
        if self.precision == "auto":
            self.precision = "bf16" if hardware.half_tflops > hardware.float32_tflops else "float32"
        self.model, self.notes = make_model(config)
        self.units = model_units(self.model)
        self._steps: dict[bool, Step] = {}  # with and without checkpointing

    def meshes(self) -> tuple[list[MeshSize], dict[MeshSize, str]]:
        """(possible meshes, {impossible ones: reason}); their sizes multiply to the number of processes."""
        sizes = [size for size in range(1, self.world + 1) if self.world % size == 0]
        pairs = [(ep, shard) for ep in sizes for shard in sizes if self.world % (ep * shard) == 0]
        every = [MeshSize(self.world // ep // shard, shard, ep) for ep, shard in pairs]
        reasons = {mesh: reason for mesh in every if (reason := self._obstacle(mesh)) is not None}
        return [mesh for mesh in every if mesh not in reasons], reasons

    def _obstacle(self, mesh: MeshSize) -> str | None:
        sharded, name = not mesh.is_plain, self.config.optim.name
        numbers = {layer.num_experts for layer in self.model.modules() if isinstance(layer, SparseMoE)}
        uneven = ", ".join(str(number) for number in numbers if number % mesh.ep)
        widths = {parameter.shape[1] for unit in self.units if unit.experts for parameter in unit.parameters}
        odd = ", ".join(str(width) for width in widths if mesh.ep > 1 and width % mesh.dp_shard)
        reasons = {
            f"optim.name {name!r} does not work on sharded weights": sharded and name.lower() not in SHARDABLE,
            "train.precision fp16 needs dp_shard = ep = 1": sharded and self.config.train.precision == "fp16",
            "model.pretrained_optimizer needs dp_shard = ep = 1": sharded and self.config.model.pretrained_optimizer,
            "ep > 1 needs experts, and the model has none": mesh.ep > 1 and not numbers,
            f"ep is no divisor of the {uneven} experts": uneven,
            f"with ep > 1, dp_shard must divide the experts' width {odd}": odd,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def candidate(self, mesh: MeshSize, grad_checkpointing: bool) -> Candidate:
        """Memory and time of a mesh."""
        if grad_checkpointing not in self._steps:
            self.model.set_grad_checkpointing(grad_checkpointing)
            step = simulate_step(self.model, self.local_batch, self.config.train.loss, self.world)
            self._steps[grad_checkpointing] = step
        step = self._steps[grad_checkpointing]
        memory = self._memory(mesh, step, grad_checkpointing)
        return Candidate(mesh, grad_checkpointing, memory, *self._time(mesh, step, memory), self.hardware.usable)

    @cached_property
    def _state(self) -> dict[int, int]:
        return optimizer_state(self.model, self.config.optim)

    def _bytes(self, mesh: MeshSize, trained_only: bool = False, experts: bool | None = None) -> int:
        """Bytes of weights in one process: of experts, of all else, or (None) of both."""
        return sum(unit.bytes(mesh, trained_only) for unit in self.units if experts in (None, unit.experts))

    def _memory(self, mesh: MeshSize, step: Step, grad_checkpointing: bool) -> dict[str, float]:
        """{kind: bytes} at the moment of the backward pass, or of the optimizer's step, when the sum is largest."""
        train, low = self.config.train, self.precision != "float32"
        weights, gradients = self._bytes(mesh), self._bytes(mesh, trained_only=True)
        shares = [self._bytes(mesh, True, kind) / max(1, self._bytes(ALONE, True, kind)) for kind in (False, True)]
        others, experts = shares
        state = 0
        for unit in self.units:
            state += (experts if unit.experts else others) * sum(self._state.get(id(one), 0) for one in unit.parameters)
        always = {"weights": weights, "optimizer": state, "EMA": weights if train.ema_decay is not None else 0}
        # DDP's buckets stay, and so do gradients that are accumulated, which FSDP2 reduces after every part of a step.
        stay = (mesh.is_plain and mesh.world > 1) or train.accumulate_steps > 1
        # Autocast keeps copies of the weights in 16 bits; with checkpointing those of the block at work.
        copies = [low * unit.bytes(ALONE) / 2 / (mesh.ep if unit.experts else 1) for unit in self.units]
        # An optimizer's step: all tensors at once, or one after the other (two copies, and one of the tensor before).
        *_, second, largest = sorted([0, 0, *(p.nbytes for p in self.model.parameters() if p.requires_grad)])
        temporary = gradients if self.hardware.foreach else 2 * largest + second
        temporary *= not is_fused(self.config.optim)
        always_in_backward = {
            **always,
            "all-to-all": BUFFERS * max(step.exchanges, default=0) if mesh.ep > 1 else 0,
            "copies": max(copies) if grad_checkpointing else sum(copies),
            "gathered": 0 if mesh.is_plain else self._gathered(mesh),
        }
        moments = [{**always, "gradients": gradients, "step": temporary}]
        for activations, of_experts, of_others in step.peaks:
            ready = gradients if stay else of_experts * experts + of_others * others
            activations *= AUTOCAST[grad_checkpointing] if low else 1
            moments.append({**always_in_backward, "gradients": ready, "activations": activations})
        return max(moments, key=lambda sizes: sum(sizes.values()))

    def _gathered(self, mesh: MeshSize) -> float:
        """The most that FSDP2 keeps beside its shards.

        The rest of the model and a unit with their gradients (experts that are cut along the width have another copy),
        the block around it, and the next one, which is gathered meanwhile.
        """
        *units, rest = self.units
        sizes = (unit.bytes(mesh) * (3 if unit.experts and mesh.ep > 1 else 2) for unit in units)
        largest, block = max(sizes, default=0), max((unit.bytes(mesh) for unit in units if not unit.experts), default=0)
        return mesh.dp_shard * (2 * rest.bytes(mesh) + largest + 2 * block)

    def _time(self, mesh: MeshSize, step: Step, memory: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """({collective: bytes sent}, {part: seconds}).

        A roofline: matrix multiplications at the peak of their type, all other operations at the memory's bandwidth.
        """
        train, hardware, low = self.config.train, self.hardware, self.precision != "float32"
        repeats = train.accumulate_steps * (4 / 3 if train.accumulate_features else 1)  # another forward pass
        peak = 1e12 * MATMUL_EFFICIENCY * (hardware.half_tflops if low else hardware.float32_tflops)
        bandwidth = 1e9 * MEMORY_EFFICIENCY * hardware.memory_bandwidth
        matmul = repeats * step.flops / peak
        moved = repeats * step.moved * (AUTOCAST[False] if low else 1) / bandwidth
        traffic, weights = Counter(), 0.0
        for kind, size, ranks, times in self._weight_traffic(mesh):
            traffic[kind] += times * size * (len(ranks) - 1) / len(ranks)
            weights += times * hardware.gather(size, ranks, self.per_node)
        exchange, experts = 0.0, range(mesh.ep)
        for size in step.exchanges if mesh.ep > 1 else ():
            exchange += repeats * hardware.exchange(size, experts, self.per_node)
            traffic["all-to-all"] += repeats * size * (mesh.ep - 1) / mesh.ep
        seconds = {
            "matmul": matmul,
            "memory": moved,
            "all-to-all": exchange,
            # Sent while other units are computed: only what takes longer than that adds to the step.
            "weights": max(0.0, weights - matmul - moved),
            # Weights, gradients and state are read and written.
            "optimizer": 2 * (2 * self._bytes(mesh, trained_only=True) + memory["optimizer"]) / bandwidth,
        }
        return dict(traffic), seconds

    def _weight_traffic(self, mesh: MeshSize) -> Iterator[tuple[str, float, Sequence[int], int]]:
        """(collective, bytes, ranks, passes over them) for weights and gradients in an optimizer step."""
        repeats = self.config.train.accumulate_steps
        if mesh.is_plain:
            yield "all-reduce", self._bytes(ALONE, trained_only=True), range(self.world), 2
            return
        shards = range(0, mesh.dp_shard * mesh.ep, mesh.ep)
        replicas = range(0, self.world, mesh.dp_shard * mesh.ep)  # of experts
        dense_replicas = [start + offset for start in replicas for offset in range(mesh.ep)]
        for unit in self.units:
            gradient = unit.bytes(mesh, trained_only=True)
            yield "all-gather", unit.bytes(mesh) * mesh.dp_shard, shards, 2 * repeats
            yield "reduce-scatter", gradient * mesh.dp_shard, shards, repeats
            yield "all-reduce", gradient, replicas if unit.experts and mesh.ep > 1 else dense_replicas, 2 * repeats


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Those that fit, fastest first (of equal ones the smaller first); then those that do not, smallest first."""
    return sorted(candidates, key=lambda one: (not one.fits, one.step_seconds if one.fits else one.total, one.total))

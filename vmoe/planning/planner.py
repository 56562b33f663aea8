"""Every mesh that a number of processes allows: memory of a process, time of a step, and what bounds it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from vmoe.distributed.mesh import MeshSize
from vmoe.planning.hardware import Hardware, Links
from vmoe.planning.model_plan import FLOAT32, ModelPlan
from vmoe.planning.simulate import OptimizerMemory, Step, simulate_optimizer, simulate_step
from vmoe.training.config import Config
from vmoe.training.optim import SHARDABLE
from vmoe.utils.config import ConfigError

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time
BUFFERS = 3  # of one all-to-all, at a time: rows to send, rows received, and their results
ALONE = MeshSize(1)


@dataclass(frozen=True)
class Candidate:
    """A mesh, with or without activation checkpointing.

    Attributes:
        mesh: sizes of the dimensions.
        grad_checkpointing: blocks run again in the backward pass.
        parameters: in one process.
        memory: {kind: bytes} in one process when most is needed.
        moment: when that is, "backward pass" or "optimizer step".
        flops: of one process in one optimizer step.
        traffic: {collective: bytes} that one process sends in one optimizer step.
        seconds: {part: seconds} of one optimizer step; they add up.
        usable: bytes that may be filled.
    """

    mesh: MeshSize
    grad_checkpointing: bool
    parameters: int
    memory: dict[str, float]
    moment: str
    flops: float
    traffic: dict[str, float]
    seconds: dict[str, float]
    usable: float

    @property
    def total(self) -> float:
        """Bytes in one process."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """The memory is enough."""
        return self.total <= self.usable

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """The largest part of the time."""
        return max(self.seconds, key=self.seconds.__getitem__)


class Planner:
    """Plans a training config on `nodes` machines of `gpus_per_node` processes.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
    """

    def __init__(self, config: Config, model: ModelPlan, hardware: Hardware, nodes: int, gpus_per_node: int) -> None:
        self.config, self.model, self.hardware = config, model, hardware
        self.world = nodes * gpus_per_node
        self.links = Links(hardware, gpus_per_node)
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
        self._steps: dict[bool, Step] = {}

    @cached_property
    def optimizer(self) -> OptimizerMemory:
        """What the optimizer keeps for the whole model."""
        return simulate_optimizer(self.model.model, self.config.optim, self.hardware.foreach)

    def meshes(self) -> tuple[list[MeshSize], dict[MeshSize, str]]:
        """(possible meshes, {impossible ones: reason}); their sizes multiply to the number of processes."""
        sizes = [size for size in range(1, self.world + 1) if self.world % size == 0]
        every = [MeshSize(self.world // ep // shard, shard, ep) for ep in sizes for shard in sizes
                 if self.world % (ep * shard) == 0]  # fmt: skip
        reasons = {mesh: reason for mesh in every if (reason := self._obstacle(mesh)) is not None}
        return [mesh for mesh in every if mesh not in reasons], reasons

    def _obstacle(self, mesh: MeshSize) -> str | None:
        config = self.config
        if not mesh.is_plain:
            if config.optim.name.lower() not in SHARDABLE:
                return f"optim.name {config.optim.name!r} does not work on sharded weights"
            if config.train.precision == "fp16":
                return "train.precision fp16 needs dp_shard = ep = 1"
            if config.model.pretrained_optimizer:
                return "model.pretrained_optimizer needs dp_shard = ep = 1"
        if mesh.ep == 1:
            return None
        if not self.model.num_experts:
            return "ep > 1 needs experts, and the model has none"
        for number in self.model.num_experts:
            if number % mesh.ep:
                return f"ep is no divisor of the {number} experts"
        for width in self.model.expert_widths:
            if width % mesh.dp_shard:
                return f"with ep > 1, dp_shard must divide the experts' width {width}"
        return None

    def candidate(self, mesh: MeshSize, grad_checkpointing: bool) -> Candidate:
        """Memory and time of a mesh."""
        if grad_checkpointing not in self._steps:
            model, loss = self.model.model, self.config.train.loss
            model.set_grad_checkpointing(grad_checkpointing)
            self._steps[grad_checkpointing] = simulate_step(
                model, self.local_batch, self.hardware, self.precision, loss, self.world
            )
        step = self._steps[grad_checkpointing]
        memory, moment = self._memory(mesh, step)
        traffic, seconds = self._time(mesh, step)
        parameters = sum(unit.bytes(mesh) for unit in self.model.units) // FLOAT32
        flops = step.flops * self.config.train.accumulate_steps
        usable = self.hardware.usable
        return Candidate(mesh, grad_checkpointing, parameters, memory, moment, flops, traffic, seconds, usable)

    def _memory(self, mesh: MeshSize, step: Step) -> tuple[dict[str, float], str]:
        units, train, optimizer = self.model.units, self.config.train, self.optimizer
        weights = sum(unit.bytes(mesh) for unit in units)
        gradients = sum(unit.bytes(mesh, trained_only=True) for unit in units)
        state = 0.0
        for unit in units:
            share = unit.bytes(mesh, trained_only=True) / max(1, unit.bytes(ALONE, trained_only=True))
            state += share * sum(optimizer.state.get(id(parameter), 0) for parameter in unit.parameters)
        always = {"weights": weights, "optimizer": state, "ema": weights if train.ema_decay is not None else 0.0}
        # DDP's buckets stay, and so do gradients that are accumulated, which FSDP2 reduces after every part of a step.
        stay = (mesh.is_plain and mesh.world > 1) or train.accumulate_steps > 1
        shares = {experts: self._share(mesh, experts) for experts in (False, True)}
        gathered = 0 if mesh.is_plain else self._gathered(mesh)
        padding = step.padding if mesh.ep > 1 else 1
        unready = 1 if mesh.is_plain else 0  # FSDP2's whole gradients include them
        largest: dict[str, float] = {}
        for peak in map(Counter, step.peaks):
            ready = peak["gradients"] * shares[False] + peak["expert_gradients"] * shares[True]
            moment = {
                **always,
                "gradients": gradients if stay else ready,
                "activations": peak["activations"] + padding * peak["expert_rows"] + unready * peak["expert_weights"],
                "loss": peak["loss"],
                "all_to_all": BUFFERS * max(step.exchanges, default=0) if mesh.ep > 1 else 0,
                "low_precision_copies": peak["copies"] + peak["expert_copies"] / mesh.ep,
                "gathered_weights": gathered,
                "input": peak["input"] * train.accumulate_steps,
                "optimizer_step": 0.0,
            }
            largest = max(largest, moment, key=lambda sizes: sum(sizes.values()))
        temporary = optimizer.step * gradients / max(1, self._trained)
        after = {**dict.fromkeys(largest, 0.0), **always, "gradients": gradients, "input": largest["input"]}
        after["optimizer_step"] = temporary
        if sum(after.values()) > sum(largest.values()):
            return after, "optimizer step"
        return largest, "backward pass"

    @cached_property
    def _trained(self) -> int:
        """Bytes of the trained weights."""
        return sum(unit.bytes(ALONE, trained_only=True) for unit in self.model.units)

    def _share(self, mesh: MeshSize, experts: bool) -> float:
        """Part of the experts' trained weights, or of the others, that one process holds."""
        units = [unit for unit in self.model.units if unit.experts == experts]
        whole = sum(unit.bytes(ALONE, trained_only=True) for unit in units)
        return sum(unit.bytes(mesh, trained_only=True) for unit in units) / max(1, whole)

    def _gathered(self, mesh: MeshSize) -> float:
        """The most that FSDP2 keeps beside its shards.

        The rest of the model stays whole in the backward pass, with its gradients. A block is whole while it or its
        experts run, and the next one is gathered meanwhile. A unit is whole with its gradients, then these are in
        `.grad` and in a buffer; units that are cut along the width have another copy.
        """
        *units, rest = self.model.units
        whole = [unit.bytes(mesh) * mesh.dp_shard for unit in units]
        most = 0
        for index, unit in enumerate(units):
            block = whole[index + 1] if unit.experts else 0
            most = max(most, block + whole[index] * (3 if unit.is_cut_along_width(mesh) else 2))
        coming = max((size for size, unit in zip(whole, units, strict=True) if not unit.experts), default=0)
        return 2 * rest.bytes(mesh) * mesh.dp_shard + most + coming

    def _time(self, mesh: MeshSize, step: Step) -> tuple[dict[str, float], dict[str, float]]:
        repeats, hardware = self.config.train.accumulate_steps, self.hardware
        traffic, weights = self._weight_traffic(mesh)
        exchange = 0.0
        for size in step.exchanges if mesh.ep > 1 else ():
            exchange += repeats * self.links.exchange(size, range(mesh.ep))
            traffic["all_to_all"] += repeats * size * (mesh.ep - 1) / mesh.ep
        compute = {part: repeats * step.seconds.get(part, 0.0) for part in ("matmul", "memory", "launch")}
        compute["memory"] += repeats * step.expert_bytes / mesh.ep / hardware.bytes_per_second
        held = sum(unit.bytes(mesh, trained_only=True) for unit in self.model.units)
        seconds = {
            **compute,
            "all_to_all": exchange,
            # Sent while other units are computed: only what takes longer than that adds to the step.
            "weights_and_gradients": max(0.0, weights - sum(compute.values())),
            "optimizer": self.optimizer.touched * held / max(1, self._trained) / hardware.bytes_per_second,
        }
        return dict(traffic), seconds

    def _weight_traffic(self, mesh: MeshSize) -> tuple[Counter[str], float]:
        """({collective: bytes that one process sends}, seconds) for weights and gradients in an optimizer step."""
        links, repeats, size = self.links, self.config.train.accumulate_steps, self._trained
        if mesh.is_plain:
            waits = 2 * (max(1, size / BUCKET) - 1) * self.hardware.latency * 1e-6 * (self.world > 1)
            traffic = Counter(all_reduce=2 * size * (self.world - 1) / self.world)
            return traffic, 2 * links.gather(size, range(self.world)) + waits
        traffic, seconds = Counter(), 0.0
        shards = range(0, mesh.dp_shard * mesh.ep, mesh.ep)
        copies = range(0, self.world, mesh.dp_shard * mesh.ep)  # of experts
        dense_copies = [start + offset for start in copies for offset in range(mesh.ep)]
        for unit in self.model.units:
            weight, gradient = unit.bytes(mesh) * mesh.dp_shard, unit.bytes(mesh, trained_only=True) * mesh.dp_shard
            group = copies if unit.experts and mesh.ep > 1 else dense_copies
            others = repeats * (mesh.dp_shard - 1) / mesh.dp_shard
            seconds += repeats * (2 * links.gather(weight, shards) + links.gather(gradient, shards))
            seconds += repeats * 2 * links.gather(gradient / mesh.dp_shard, group)
            traffic["all_gather"] += 2 * weight * others
            traffic["reduce_scatter"] += gradient * others
            traffic["all_reduce"] += repeats * 2 * gradient / mesh.dp_shard * (len(group) - 1) / len(group)
        return traffic, seconds


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Those that fit, fastest first (of equal ones the smaller first); then those that do not, smallest first."""
    return sorted(candidates, key=lambda one: (not one.fits, one.step_seconds if one.fits else one.total, one.total))

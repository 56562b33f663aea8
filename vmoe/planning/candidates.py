"""Every mesh that a number of processes allows: does it fit, how long does a step take, and what bounds it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from vmoe.distributed.mesh import MeshSize
from vmoe.planning.fsdp_memory import FLOAT32, Gathering
from vmoe.planning.hardware import GiB, Hardware, Links
from vmoe.planning.model_plan import Subject, Unit
from vmoe.planning.simulate import OptimizerMemory, Step, simulate_optimizer, simulate_step
from vmoe.training.config import Config
from vmoe.training.optim import SHARDABLE
from vmoe.utils.config import ConfigError

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time


@dataclass(frozen=True)
class Candidate:
    """A mesh, with or without activation checkpointing.

    Attributes:
        mesh: sizes of the dimensions.
        grad_checkpointing: blocks run again in the backward pass.
        parameters: that lie in one process.
        memory: {kind: bytes} in one process at the moment when most is needed.
        moment: that moment, "backward pass" or "optimizer step".
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


@dataclass(frozen=True)
class Refused:
    """A mesh that cannot be: which, and why."""

    mesh: MeshSize
    reason: str


class Planner:
    """Plans one training config on some machines.

    Args:
        config: of the run.
        subject: its model.
        hardware: of each process.
        nodes: machines.
        gpus_per_node: processes of each.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
    """

    def __init__(self, config: Config, subject: Subject, hardware: Hardware, nodes: int, gpus_per_node: int) -> None:
        self.config, self.subject, self.hardware = config, subject, hardware
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
        self._steps: dict[tuple[bool, bool], Step] = {}

    @cached_property
    def optimizer(self) -> OptimizerMemory:
        """What the optimizer keeps for the whole model."""
        return simulate_optimizer(self.subject.model, self.config.optim, self.hardware.foreach)

    def meshes(self) -> tuple[list[MeshSize], list[Refused]]:
        """(meshes that can be, those that cannot); three sizes that multiply to the number of processes."""
        possible, refused = [], []
        for ep in _divisors(self.world):
            for dp_shard in _divisors(self.world // ep):
                mesh = MeshSize(self.world // ep // dp_shard, dp_shard, ep)
                reason = self._obstacle(mesh)
                if reason is None:
                    possible.append(mesh)
                else:
                    refused.append(Refused(mesh, reason))
        return possible, refused

    def _obstacle(self, mesh: MeshSize) -> str | None:
        optimizer = self.config.optim.name
        if not mesh.is_plain and optimizer.lower() not in SHARDABLE:
            return f"optim.name {optimizer!r} does not work on sharded weights"
        if not mesh.is_plain and self.config.train.precision == "fp16":
            return "train.precision fp16 needs dp_shard = ep = 1"
        if not mesh.is_plain and self.config.model.pretrained_optimizer:
            return "model.pretrained_optimizer needs dp_shard = ep = 1"
        if mesh.ep == 1:
            return None
        if not self.subject.num_experts:
            return "ep > 1 needs experts, and the model has none"
        for number in self.subject.num_experts:
            if number % mesh.ep:
                return f"ep is no divisor of the {number} experts"
        for width in self.subject.expert_widths:
            if width % mesh.dp_shard:
                return f"with ep > 1, dp_shard must divide the experts' width {width}"
        return None

    def candidate(self, mesh: MeshSize, grad_checkpointing: bool) -> Candidate:
        """Memory and time of a mesh."""
        step = self._step(mesh.ep > 1, grad_checkpointing, mesh.ep)
        memory, moment = self._memory(mesh, step)
        traffic, seconds = self._time(mesh, step)
        return Candidate(
            mesh,
            grad_checkpointing,
            sum(unit.held(mesh) for unit in self.subject.units),
            memory,
            moment,
            step.flops * self.config.train.accumulate_steps,
            traffic,
            seconds,
            self.hardware.usable,
        )

    def _step(self, spread: bool, grad_checkpointing: bool, ep: int) -> Step:
        """The simulated step. How many processes share the experts changes their weights alone: one number will do."""
        if (spread, grad_checkpointing) not in self._steps:
            model = self.subject.model
            model.set_grad_checkpointing(grad_checkpointing)
            self._steps[spread, grad_checkpointing] = simulate_step(
                model,
                self.local_batch,
                self.hardware,
                self.precision,
                self.config.train.loss,
                self.world,
                ep,
            )
        return self._steps[spread, grad_checkpointing]

    def _share(self, mesh: MeshSize, experts: bool) -> float:
        """Part of the trained weights, the experts' or the others', that one process has."""
        units = [unit for unit in self.subject.units if unit.experts == experts]
        whole = sum(unit.held(MeshSize(1), trained_only=True) for unit in units)
        return sum(unit.held(mesh, trained_only=True) for unit in units) / max(1, whole)

    def _memory(self, mesh: MeshSize, step: Step) -> tuple[dict[str, float], str]:
        units, train = self.subject.units, self.config.train
        weights = FLOAT32 * sum(unit.held(mesh) for unit in units)
        gradients = FLOAT32 * sum(unit.held(mesh, trained_only=True) for unit in units)
        optimizer = self.optimizer
        share, expert_share = self._share(mesh, False), self._share(mesh, True)
        always = {
            "weights": weights,
            "optimizer": optimizer.state * share + optimizer.expert_state * expert_share,
            "ema": weights if train.ema_decay is not None else 0.0,
        }
        # DDP's gradients lie in buckets that stay; accumulated ones stay too, sharded like the weights: sharded models
        # reduce them after every part of a step.
        gradients_stay = (mesh.is_plain and mesh.world > 1) or train.accumulate_steps > 1
        gathering = None if mesh.is_plain else Gathering(units, mesh)
        largest: dict[str, float] = {}
        spread = step.ep / mesh.ep  # experts of a process over those in the simulation
        for peak, at in zip(step.peaks, step.moments, strict=True):
            # Gradients of the unit at work and of the rest are whole until it is done.
            expert_ready = at.ready if units[at.unit].experts else 0
            dense_ready = at.rest_ready + (0 if units[at.unit].experts or at.unit == len(units) - 1 else at.ready)
            ready = (peak.get("gradients", 0) - dense_ready) * share
            ready += (peak.get("expert_gradients", 0) - expert_ready) * step.ep * expert_share
            ready = gradients if gradients_stay else ready
            if gathering is not None or not gradients_stay:
                ready += dense_ready + expert_ready * spread
            moment = {
                **always,
                "gradients": ready,
                "activations": peak.get("activations", 0) + peak.get("expert_weights", 0) * spread,
                "loss": peak.get("loss", 0),
                "all_to_all": peak.get("all_to_all", 0),
                # Weights are gathered in float32, so autocast copies them on every mesh.
                "low_precision_copies": peak.get("copies", 0) + peak.get("expert_copies", 0) * spread,
                "gathered_weights": 0 if gathering is None else gathering.bytes(at),
                "input": peak.get("input", 0) * train.accumulate_steps,
                "optimizer_step": 0.0,
            }
            if sum(moment.values()) > sum(largest.values()):
                largest = moment
        after = {
            **dict.fromkeys(largest, 0.0),
            **always,
            "gradients": gradients,
            "input": largest["input"],
            "optimizer_step": optimizer.step * gradients / max(1, self._trainable * FLOAT32),
        }
        if sum(after.values()) > sum(largest.values()):
            return after, "optimizer step"
        return largest, "backward pass"

    @cached_property
    def _trainable(self) -> int:
        return sum(unit.held(MeshSize(1), trained_only=True) for unit in self.subject.units)

    @staticmethod
    def _unit_bytes(unit: Unit, mesh: MeshSize) -> tuple[int, int]:
        """(bytes of a unit's gathered weights, of its gradients on their way) in one process, both in float32."""
        return FLOAT32 * unit.gathered(mesh), FLOAT32 * unit.gathered(mesh, trained_only=True)

    def _time(self, mesh: MeshSize, step: Step) -> tuple[dict[str, float], dict[str, float]]:
        repeats, hardware, links = self.config.train.accumulate_steps, self.hardware, self.links
        ep_group = range(mesh.ep)
        shards = range(0, mesh.dp_shard * mesh.ep, mesh.ep)
        copies = range(0, self.world, mesh.dp_shard * mesh.ep)  # of experts
        dense_copies = [start + offset for start in copies for offset in ep_group]
        traffic: Counter[str] = Counter()
        weights = 0.0
        if mesh.is_plain:
            size = self._trainable * FLOAT32
            everybody = range(self.world)
            traffic["all_reduce"] = 2 * size * (self.world - 1) / self.world
            buckets = max(1, size / BUCKET)
            weights = links.reduce(size, everybody) + 2 * (buckets - 1) * hardware.latency * 1e-6 * (self.world > 1)
        else:
            for unit in self.subject.units:
                weight, gradient = self._unit_bytes(unit, mesh)
                group = copies if unit.experts and mesh.ep > 1 else dense_copies
                weights += repeats * (2 * links.gather(weight, shards) + links.gather(gradient, shards))
                weights += repeats * links.reduce(gradient / mesh.dp_shard, group)
                others = (mesh.dp_shard - 1) / mesh.dp_shard
                traffic["all_gather"] += 2 * repeats * weight * others
                traffic["reduce_scatter"] += repeats * gradient * others
                traffic["all_reduce"] += repeats * 2 * gradient / mesh.dp_shard * (len(group) - 1) / len(group)
        exchange = 0.0
        for size in step.exchanges if mesh.ep > 1 else ():
            exchange += repeats * links.exchange(size, ep_group)
            traffic["all_to_all"] += repeats * size * (mesh.ep - 1) / mesh.ep
        parts = step.seconds(mesh.ep, hardware.launch * 1e-6)
        compute = {part: repeats * seconds for part, seconds in parts.items()}
        held = sum(unit.held(mesh, trained_only=True) for unit in self.subject.units)
        bandwidth = hardware.memory_bandwidth * 1e9 * hardware.memory_efficiency
        seconds = {
            **compute,
            "all_to_all": exchange,
            # Weights and gradients travel while others are computed with; what is longer than that is waited for.
            "weights_and_gradients": max(0.0, weights - sum(compute.values())),
            "optimizer": self.optimizer.touched * held / max(1, self._trainable) / bandwidth,
        }
        return dict(traffic), seconds


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """Those that fit, fastest first (of equal ones that with more room); then those that do not, smallest first."""
    return sorted(candidates, key=lambda one: (not one.fits, one.step_seconds if one.fits else one.total, one.total))


def too_large(candidate: Candidate) -> str:
    """Why a candidate does not fit."""
    kind = max(candidate.memory, key=candidate.memory.__getitem__)
    return (
        f"needs {candidate.total / GiB:.0f} GiB of {candidate.usable / GiB:.0f}, most of it {kind.replace('_', ' ')} "
        f"({candidate.memory[kind] / GiB:.0f} GiB)"
    )

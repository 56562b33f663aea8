"""What FSDP2 has beside its shards at a moment of a step: whole weights, whole gradients, and those on their way."""

from __future__ import annotations

from vmoe.distributed.mesh import MeshSize
from vmoe.planning.model_plan import Unit
from vmoe.planning.simulate import Moment

FLOAT32 = 4  # bytes: weights and gradients travel so, whatever the precision of the products


class Gathering:
    """The units of a model on a mesh, in the order in which their forward passes end.

    The order of events is that of torch.distributed.fsdp: a unit's weights arrive in one buffer and are copied out of
    it; the backward pass asks for the next block's while it works on one; the gradients of a unit are copied into one
    buffer, which stays until those of the next unit are ready. The outermost unit stays whole in the backward pass.

    Args:
        units: of the model, experts before the block that they are in, the rest of the model last.
        mesh: of the processes.
    """

    def __init__(self, units: list[Unit], mesh: MeshSize) -> None:
        self.units = units
        self.weights = [FLOAT32 * unit.gathered(mesh) for unit in units]
        self.gradients = [FLOAT32 * unit.gathered(mesh, trained_only=True) for unit in units]
        # Units that are cut along the width go through another copy, in which the parts lie one after another.
        self.copied = [unit.experts and mesh.dp_shard > 1 and unit.cut(mesh) == 1 for unit in units]
        self.rest = len(units) - 1

    def bytes(self, moment: Moment) -> float:
        """Of whole weights and of all buffers, without gradients that wait in `.grad`."""
        index, block = moment.unit, self._block(moment.unit)
        around = self._around(index)
        if moment.phase == "forward":
            return around + self.weights[index] + max(self.weights[index], self.weights[self._experts(index)])
        coming = self._experts(block) - 1  # the block whose turn is next
        prefetched = self.weights[coming] if coming >= 0 else 0
        if moment.phase == "backward":
            return around + self.weights[index] + prefetched + self._sent_before(index)
        # The unit's weights are given up, its gradients are in `.grad` and in the buffer.
        reduced = around + prefetched + self.gradients[index] * (2 if self.copied[index] else 1)
        if coming < 0 or index == self.rest:
            return reduced
        # `.grad` is emptied, and the next unit comes: in the buffer and out of it.
        following = self._experts(coming) if index == block else block
        arriving = self.weights[following] * (3 if self.copied[following] else 2)
        return max(reduced, self._around(following) + arriving)

    def _around(self, index: int) -> float:
        """Whole weights of the units that a unit is in."""
        return sum(self.weights[one] for one in {self.rest, self._block(index)} - {index})

    def _block(self, index: int) -> int:
        """The block that experts are in; the unit itself if it is none."""
        return index + 1 if self.units[index].experts else index

    def _experts(self, index: int) -> int:
        """The experts in a block; the unit itself if there are none."""
        return index - 1 if index not in (0, self.rest) and self.units[index - 1].experts else index

    def _sent_before(self, index: int) -> float:
        """Gradients of the unit that was done last, which are still in their buffer."""
        if self._experts(index) != index and not self.units[index].experts:
            return self.gradients[self._experts(index)]
        following = self._block(index) + 1
        if following < self.rest:
            following = self._block(following)
        return self.gradients[following] if following < self.rest else 0

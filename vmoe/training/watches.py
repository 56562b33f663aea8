"""Warnings of a run: collapsed routing, and a model that waits for data."""

import logging
import math

from vmoe.data.workers import own_cores
from vmoe.moe import LayerRouting
from vmoe.training.logger import requested_shares
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

WAITING_SHARE, WAITING_FOR = 0.2, 5  # a warning follows above this share of the time, in so many logged steps in a row


class CollapseWatch:
    """Warns when the routing of a layer stays collapsed for `after` steps (0 never warns).

    One expert is asked for by most assignments (over half of those that an even load would not give it), or some expert
    by none.
    """

    def __init__(self, after: int) -> None:
        self.after = after
        self.since: dict[str, float] = {}  # {layer: the step at which it collapsed, or infinity once it was reported}

    def update(self, step: int, layers: dict[str, LayerRouting]) -> None:
        """Takes the routing of a logged step; all processes call it, and the first one warns."""
        for name, share_E in requested_shares(layers).items() if self.after else ():
            num_experts, share, idle = len(share_E), share_E.max().item(), int((share_E == 0).sum())
            even = 1 / num_experts
            crowded = num_experts > 1 and share > even + 0.5 * (1 - even)
            if not crowded and not idle:
                self.since.pop(name, None)
                continue
            since = self.since.setdefault(name, step)
            if step - since < self.after:
                continue
            self.since[name] = math.inf
            what = f"{share:.0%} of its tokens ask for one expert" if crowded else f"{idle} experts get no token"
            if world()[0] == 0:
                logger.warning(
                    f"the routing of {name} has collapsed: {what} of {num_experts} (steps {since} to {step}); raise "
                    "the balancing losses (importance_loss, load_loss, global_entropy_loss), lower optim.lr, or train "
                    "with more noise_std"
                )


class DataWatch:
    """Warns once, with a remedy, when the model waits for data in several logged steps in a row.

    `can_cache`: images are decoded again in each epoch, so that a cache would help.
    """

    def __init__(self, num_workers: int, can_cache: bool) -> None:
        self.num_workers, self.can_cache, self.in_a_row, self.warned = num_workers, can_cache, 0, False

    def update(self, metrics: dict[str, float], readable: float) -> None:
        """Takes the metrics of a logged step; `readable`: images per second that this process's workers can read."""
        rank, processes = world()
        waiting = metrics["data_wait_share"]
        self.in_a_row = self.in_a_row + 1 if waiting > WAITING_SHARE else 0
        if self.in_a_row < WAITING_FOR or self.warned or rank > 0 or not readable > 0:
            return
        self.warned = True
        needed = metrics["images_per_second"] / processes / max(1 - waiting, 0.01)
        workers = max(math.ceil(needed / readable * max(self.num_workers, 1)), self.num_workers + 1)
        remedy = f"raise it to {min(workers, own_cores())}"
        if self.num_workers >= own_cores():
            remedy = f"all {own_cores()} CPU cores read already: store smaller images, or take more cores"
        if self.can_cache:
            remedy += ", or set data.cache memory and data.cache_gb if the decoded images fit into memory"
        logger.warning(
            f"the model waits for data {waiting:.0%} of the time: each process could take {needed:.0f} images/s, and "
            f"data.loader.num_workers {self.num_workers} reads {readable:.0f}; {remedy}"
        )

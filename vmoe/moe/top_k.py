"""The router whose tokens choose their experts: V-MoE's (arXiv 2106.05974) and its relatives.

Shapes, by suffix: G groups, N tokens in a group, I images in a group, D width, E experts, K choices, R rows handed to
the experts.
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vmoe.moe.autograd import is_recomputation, transforms_active
from vmoe.moe.config import RoutingSettings
from vmoe.moe.dispatch import Capacity, DispatchPlan, combine, dispatch, plan_dispatch
from vmoe.moe.groups import TokenGroups
from vmoe.moe.router import Assignment, Gate, Routing, add_by_member, normalized, without_autocast


@dataclass(frozen=True)
class TopKAssignment(Assignment):
    """Each token goes to its K experts, as far as their capacity allows."""

    plan: DispatchPlan

    @property
    def count_E(self) -> Tensor:
        return self.plan.count_E

    def dispatch(self, x_GND: Tensor) -> Tensor:
        return dispatch(x_GND, self.plan)

    def combine(self, y_RD: Tensor) -> Tensor:
        return combine(y_RD, self.routing.combine_weights_GNK, self.plan)

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.routing.expert_index_GNK, self.routing.combine_weights_GNK, self.plan.kept_GNK


def top_k_experts(gates_GNE: Tensor, num_selected_experts: int) -> Tensor:
    """Indices (..., K) of the K largest gates, best first; equal gates: the lower index first."""
    # torch.topk leaves the order of equal values open; the maximum is the first of equal ones. K passes over the
    # experts are much cheaper than sorting them.
    indices = [gates_GNE.max(dim=-1, keepdim=True).indices]
    for _ in range(num_selected_experts - 1):
        gates_GNE = gates_GNE.scatter(-1, indices[-1], -math.inf)
        indices.append(gates_GNE.max(dim=-1, keepdim=True).indices)
    return torch.cat(indices, dim=-1)


class TopKRouter(Gate):
    """Each token takes its K best experts; V-MoE's router (arXiv 2106.05974, section 2.2) and its relatives.

    With `per_image` each image does so by its mean token, and all its tokens follow (arXiv 2309.04354).

    With `bias_update_rate` it has `expert_bias`, (E,) float32 whatever the type of the model, and `expert_load`, (E,)
    how often each expert was chosen since the last update.
    """

    per_token = True
    # A user who forgets `update_expert_bias` gets an unbalanced model and no error, so there is one warning.
    CALLS_BEFORE_WARNING = 1000

    def __init__(self, dim: int, config: RoutingSettings, device=None, dtype=None) -> None:
        super().__init__(dim, config, device, dtype)
        self.num_selected_experts = config.num_selected_experts
        self.per_image = config.per_image
        self.random_threshold = config.random_threshold
        self.bias_update_rate = config.bias_update_rate
        if self.bias_update_rate > 0:
            self.register_buffer("expert_bias", torch.empty(self.num_experts, device=device, dtype=torch.float32))
            # Not a buffer: DistributedDataParallel would overwrite each process's own counts with those of the first.
            self.expert_load = torch.empty(self.num_experts, dtype=torch.long, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias_update_rate > 0:
            nn.init.zeros_(self.expert_bias)
            self.expert_load.zero_()
            self.calls_without_update = 0

    def __call__(self, x_GND: Tensor, groups: TokenGroups, capacity: Capacity, batch_priority: bool) -> Assignment:
        seen = groups.image_means(x_GND) if self.per_image else x_GND
        return super().__call__(seen, groups, capacity, batch_priority)

    def assign(
        self, logits: Tensor | tuple[Tensor, Tensor], groups: TokenGroups, capacity: Capacity, batch_priority: bool
    ) -> Assignment:
        """Chooses the experts and queues the tokens, or the images, with `batch_priority` the surest first."""
        routing, mask = self.choose(logits), groups.image_mask_GI if self.per_image else groups.mask_GN
        G, N, K = routing.expert_index_GNK.shape
        # A number of tokens that an export leaves open is counted by the graph.
        counted = mask
        if mask is None and not isinstance(N, int):
            counted = torch.ones_like(routing.expert_index_GNK[..., 0])
        M, E = self.ensemble_size, self.num_experts
        rows, most = capacity.rows(N if G else 0, E, K, counted, M)
        priority = routing.priority_GN if batch_priority else None
        plan = plan_dispatch(routing.expert_index_GNK, E, rows, priority, mask, most, routing.chosen_GNK, M)
        if self.per_image:
            kept_GNK = groups.to_tokens(plan.kept_GNK) if plan.may_drop else None
            routing, most = routing.map(groups.to_tokens), None if most is None else most * groups.tokens_per_image
            # The images that were kept have capacity for all their tokens: the limit only bounds the number of rows.
            index_GNK = routing.expert_index_GNK
            plan = plan_dispatch(index_GNK, E, most, mask_GN=groups.mask_GN, chosen_GNK=kept_GNK, ensemble_size=M)
        if self.bias_update_rate > 0 and self.training:
            self._count(routing, groups.mask_GN)
        return TopKAssignment(routing, None if most is None else G // M * most, plan)

    def choose(self, logits: Tensor | tuple[Tensor, Tensor]) -> Routing:
        """The K experts of each token and their weights, without a queue."""
        device = self.weight.device
        with without_autocast(device):
            routing, scores_GNE = self.gates(logits)
            choice_GNE = scores_GNE.detach()
            if self.bias_update_rate > 0:
                choice_GNE = add_by_member(choice_GNE, self.expert_bias, self.ensemble_size)
            index_GNK = top_k_experts(choice_GNE, self.num_selected_experts)
            weights_GNK = scores_GNE.gather(-1, index_GNK)
            if self.normalize_weights:
                weights_GNK = normalized(weights_GNK)
            chosen_GNK = None
            if self.random_threshold is not None and self.training:
                chosen_GNK = torch.rand_like(weights_GNK) * self.random_threshold < weights_GNK
                chosen_GNK = chosen_GNK | (torch.arange(self.num_selected_experts, device=device) == 0)
        choice = {"combine_weights_GNK": weights_GNK, "chosen_GNK": chosen_GNK}
        choice["expert_index_GNK"] = routing.global_index(index_GNK)
        if self.learned_noise:
            choice["importance_GNE"] = torch.zeros_like(scores_GNE).scatter(-1, index_GNK, weights_GNK)
        return replace(routing, **choice)

    # --- the balancing bias ---

    def _apply(self, fn, recurse: bool = True):
        bias_E = getattr(self, "expert_bias", None)
        super()._apply(fn, recurse)
        if bias_E is not None:
            if self.expert_bias.dtype != torch.float32:  # steps of 0.001 vanish in half precision
                self.expert_bias = bias_E.to(self.expert_bias.device)
            load_E = fn(self.expert_load)
            self.expert_load = torch.zeros_like(load_E) if self.expert_load.is_meta else load_E
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.bias_update_rate > 0:
            self.expert_bias = self.expert_bias.float()  # with assign=True it has the type of the state dict

    @torch.no_grad()
    def _count(self, routing: Routing, mask_GN: Tensor | None) -> None:
        """Adds the choices of real tokens to `expert_load`, and warns those who never update the bias."""
        if is_recomputation():
            return
        if transforms_active():
            raise RuntimeError(
                "torch.func cannot count the loads of a balancing bias in training: call model.eval(), or build the "
                "model with bias_update_rate=0"
            )
        index_GNK = routing.expert_index_GNK
        # load_state_dict(assign=True) and pruning replace parameters and buffers only.
        if self.expert_load.device != index_GNK.device or len(self.expert_load) != self.num_experts:
            self.expert_load = torch.zeros(self.num_experts, dtype=torch.long, device=index_GNK.device)
        ones_GNK = torch.ones_like(index_GNK) if mask_GN is None else mask_GN[..., None].long().expand_as(index_GNK)
        self.expert_load.scatter_add_(0, index_GNK.flatten(), ones_GNK.flatten())
        if not torch.compiler.is_compiling() and routing.gates_GNE.requires_grad:
            self.calls_without_update += 1
            if self.calls_without_update == self.CALLS_BEFORE_WARNING:
                warnings.warn(
                    f"the expert bias of this router was not updated in {self.CALLS_BEFORE_WARNING} training steps: "
                    "call vmoe.update_expert_bias(model) after each optimizer.step()",
                    stacklevel=4,
                )

    @torch.no_grad()
    def update_bias(self) -> None:
        """b_e += rate · sign(mean load - load_e), of all processes (arXiv 2408.15664, algorithm 1), unless frozen."""
        load_E = self.expert_load
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load_E)
        if self.weight.requires_grad:
            self.expert_bias.add_((load_E.double().mean() - load_E).sign(), alpha=self.bias_update_rate)
        load_E.zero_()
        self.calls_without_update = 0


def update_expert_bias(model: nn.Module) -> None:
    """Moves the balancing biases (`bias_update_rate`) of a model's routers; once after each `optimizer.step()`."""
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.bias_update_rate > 0:
            module.update_bias()

"""The sparse layer: route -> dispatch -> experts -> combine, in place of a transformer block's MLP.

Shapes, by suffix: B batch, T length, D width, G groups, N tokens in a group, E experts, K choices, R rows.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.dispatch import DispatchPlan, combine, dispatch, expert_capacity, masked_capacity, plan_dispatch
from vmoe.moe.experts import Experts
from vmoe.moe.losses import AuxiliaryLosses, PerModality
from vmoe.moe.record import LayerRouting, active_records, attach_loss
from vmoe.moe.router import Routing, TopKRouter

ROUTERS = ("top_k",)


class SparseMoE(nn.Module):
    """A sparse mixture of MLPs, a drop-in for `timm.layers.Mlp`.

    Args:
        in_features: D.
        hidden_features: hidden width of each expert, by default D.
        out_features: width of the result, by default D.
        act_layer: makes the experts' activation.
        norm_layer: not supported inside experts; here because `timm.layers.Mlp` has it.
        bias: biases in the experts.
        drop: dropout after the activation.
        num_experts: E.
        num_selected_experts: K, experts per token.
        router: "top_k", V-MoE's.
        capacity_factor: room per expert in training, 1.0 is just enough for an even spread; None: nothing is dropped.
        eval_capacity_factor: the same in `eval()`; None: nothing is dropped, so that an output never depends on the
            rest of the batch.
        batch_priority: batch-prioritized routing: when room is short, the most important tokens go first.
        group_size: tokens routed together; None: all of the call's. The last group is filled up with padding.
        noise_std: of the gate's noise in training, times 1/E.
        importance_loss: weight; so are `load_loss`, `gshard_loss` and `z_loss`.
        local_entropy_loss: weight for every modality, or {modality: weight}; so is `global_entropy_loss`.
        global_entropy_min_experts: threshold S of the global entropy loss, for every modality or {modality: S}.
        auxiliary_loss: "record": the losses leave through `record_routing`; "attach": their gradients are added in the
            backward pass of the output, for training loops that know nothing of them.
        modalities: names of the modalities of the input's tokens.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        num_experts: int = 8,
        num_selected_experts: int = 1,
        router: str = "top_k",
        capacity_factor: float | None = 1.05,
        eval_capacity_factor: float | None = None,
        batch_priority: bool = False,
        group_size: int | None = None,
        noise_std: float = 1.0,
        importance_loss: float = 0.005,
        load_loss: float = 0.005,
        gshard_loss: float = 0.0,
        z_loss: float = 0.0,
        local_entropy_loss: PerModality = 0.0,
        global_entropy_loss: PerModality = 0.0,
        global_entropy_min_experts: PerModality | None = None,
        auxiliary_loss: str = "record",
        modalities: Sequence[str] = ("image",),
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise ValueError("norm_layer inside an expert (scale_mlp_norm=True) is not supported; leave it out")
        if num_experts < 1:
            raise ValueError(f"num_experts must be >= 1, got {num_experts}")
        if not 1 <= num_selected_experts <= num_experts:
            raise ValueError(f"num_selected_experts must be 1..num_experts ({num_experts}), got {num_selected_experts}")
        if router not in ROUTERS:
            raise ValueError(f"router must be one of {ROUTERS}, got {router!r}")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, or None for no limit, got {factor}")
        if group_size is not None and (group_size < 1 or group_size != int(group_size)):
            raise ValueError(f"group_size must be a whole number >= 1, or None for all of a call, got {group_size}")
        if not 0 <= noise_std < math.inf:
            raise ValueError(f"noise_std must be >= 0 and finite, got {noise_std}")
        if auxiliary_loss not in ("record", "attach"):
            raise ValueError(f"auxiliary_loss must be 'record' or 'attach', got {auxiliary_loss!r}")

        self.num_experts = num_experts
        self.num_selected_experts = num_selected_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.batch_priority = batch_priority
        self.group_size = None if group_size is None else int(group_size)
        self.out_features = out_features or in_features
        self.auxiliary_loss = auxiliary_loss
        self.losses = AuxiliaryLosses.from_settings(
            modalities,
            num_experts,
            importance_loss,
            load_loss,
            gshard_loss,
            z_loss,
            local_entropy_loss,
            global_entropy_loss,
            global_entropy_min_experts,
        )
        factory = {"device": device, "dtype": dtype}
        self.router = TopKRouter(in_features, num_experts, num_selected_experts, noise_std, **factory)
        hidden_features = hidden_features or in_features
        self.experts = Experts(
            num_experts, in_features, hidden_features, self.out_features, act_layer, bias, drop, **factory
        )

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None, modality_BT: Tensor | None = None) -> Tensor:
        """Each token through its experts.

        Args:
            x_BTD: tokens; (..., D) with any leading shape if there is neither mask nor modality.
            mask_BT: True where the token is real. Padding takes no room, counts in no loss, and comes out as zero.
            modality_BT: index of each token's modality; None: all of the first.

        Returns:
            (B, T, D); zero for a token that every chosen expert dropped.

        Raises:
            ValueError: if the mask or the modality does not fit the tokens.
        """
        leading = x_BTD.shape[:-1]
        if leading.numel() == 0:  # an empty batch has nothing to route
            return x_BTD.new_zeros(*leading, self.out_features)
        x_GND, mask_GN, modality_GN = self._into_groups(x_BTD, mask_BT, modality_BT)
        routing = self.router(x_GND)
        plan = self._plan(routing, mask_GN)
        y_RD = self.experts(dispatch(x_GND, plan), plan.count_E)
        y_GND = combine(y_RD, routing.combine_weights_GNK, plan)

        attached = self.auxiliary_loss == "attach" and self.training and torch.is_grad_enabled()
        if attached:
            _, loss = self.losses(routing, mask_GN, modality_GN)
            y_GND = attach_loss(y_GND, loss)
        for record in active_records(self):
            mask_GN = torch.ones(plan.shape[:2], dtype=torch.bool, device=x_BTD.device) if mask_GN is None else mask_GN
            shape = (leading[:-1].numel(), leading[-1])
            learns = self.training and self.router.weight.requires_grad
            kept_GNK = plan.kept_GNK
            call = LayerRouting(routing, kept_GNK, mask_GN, modality_GN, shape, self.losses, learns, attached)
            record.add(self, call)
        return y_GND.flatten(0, 1)[: leading.numel()].view(*leading, -1)

    def _into_groups(
        self, x_BTD: Tensor, mask_BT: Tensor | None, modality_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Flatten the tokens and cut them into groups; what the last group lacks is padding."""
        for name, tensor, kind in (("mask", mask_BT, "bool"), ("modality", modality_BT, "int")):
            if tensor is not None and tensor.shape != x_BTD.shape[:-1]:
                raise ValueError(
                    f"the {name} must have the tokens' shape {tuple(x_BTD.shape[:-1])}, got {tuple(tensor.shape)}"
                )
            if tensor is not None and (tensor.dtype == torch.bool) != (kind == "bool"):
                raise ValueError(f"the {name} must be a tensor of {kind}, got {tensor.dtype}")
        num_tokens = x_BTD.shape[:-1].numel()
        size = min(self.group_size or num_tokens, num_tokens)
        missing = -num_tokens % size
        x_SD = x_BTD.reshape(num_tokens, x_BTD.shape[-1])
        mask_S = None if mask_BT is None else mask_BT.reshape(num_tokens)
        modality_S = None if modality_BT is None else modality_BT.reshape(num_tokens)
        if missing:
            if mask_S is None:
                mask_S = torch.ones(num_tokens, dtype=torch.bool, device=x_SD.device)
            x_SD = F.pad(x_SD, (0, 0, 0, missing))
            mask_S = F.pad(mask_S, (0, missing))
            modality_S = None if modality_S is None else F.pad(modality_S, (0, missing))
        if mask_S is not None:
            # Padding may hold anything, NaN too; as zeros it reaches neither the gate's gradient nor the output.
            x_SD = torch.where(mask_S[:, None], x_SD, 0)
        G = (num_tokens + missing) // size
        return (
            x_SD.view(G, size, -1),
            None if mask_S is None else mask_S.view(G, size),
            None if modality_S is None else modality_S.view(G, size),
        )

    def _plan(self, routing: Routing, mask_GN: Tensor | None) -> DispatchPlan:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity, max_capacity = None, None
        if factor is not None:
            N, E, K = routing.gates_GNE.shape[1], self.num_experts, self.num_selected_experts
            capacity = max_capacity = expert_capacity(N, E, K, factor)
            if mask_GN is not None:
                capacity = masked_capacity(mask_GN, E, K, factor)
        return plan_dispatch(
            routing.expert_index_GNK,
            routing.combine_weights_GNK,
            self.num_experts,
            capacity,
            self.batch_priority,
            mask_GN,
            max_capacity,
        )

"""The experts: E independent MLPs, one stacked weight tensor per matrix.

Shapes, by suffix: E experts, R rows sorted by expert, D model width, F hidden width, O the result's width.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.backends import check_backend, select_backend
from vmoe.moe.backends.reference import activate
from vmoe.moe.grouped import GroupedLayerNorm, GroupedLinear


class TwiceSquaredReLU(nn.Module):
    """2 relu(x)²: the squared ReLU (Primer, arXiv 2109.08668), doubled as in SigLino (arXiv 2512.20157)."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.relu(x).square()


GATED_ACTIVATIONS = {"swiglu": nn.SiLU, "geglu": nn.GELU, "relu2glu": TwiceSquaredReLU}

RunExperts = Callable[[Tensor, Tensor], Tensor]  # (rows, rows of each expert) -> rows


def has_adapters(model: nn.Module) -> bool:
    """Whether a library such as PEFT put adapters beside some weights."""
    return any(".base_layer." in name for name, _ in model.named_parameters())


def refuse_adapters(model: nn.Module) -> None:
    """ValueError if there are adapters, for those who read weights, which would not see them."""
    if has_adapters(model):
        raise ValueError("the model has adapters beside its weights: merge them first (merge_and_unload of PEFT)")


class Mlp(nn.Module):
    """x -> fc2(drop(act(fc1(x)))), a dense MLP: the shared expert. `Experts` has the same parts, stacked.

    `kind`: "mlp", or gated: "swiglu" (SiLU), "geglu" (GELU; arXiv 2002.05202) or "relu2glu" (2 relu²). Then the first F
    of the 2F outputs of `fc1` are the gate g, the others the value v, and the hidden activations are act(g) * v. This
    is the layout of `timm.layers.GluMlp(gate_last=False)`. `act_layer` makes the activation of a plain MLP, `linear`
    the layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        kind: str = "mlp",
        linear: Callable[..., nn.Module] = nn.Linear,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.gated = kind in GATED_ACTIVATIONS
        self.fc1 = linear(in_features, (1 + self.gated) * hidden_features, bias, **factory)
        self.act = GATED_ACTIVATIONS[kind]() if self.gated else act_layer()
        self.drop = nn.Dropout(drop)
        self.register_module("norm", None)  # here in the state dict, if there is one
        self.fc2 = linear(hidden_features, out_features or in_features, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        return self.fc2(self.drop(activate(self.act, self.gated, self.fc1(x))))


class Experts(Mlp):
    """E MLPs: x -> fc2(norm(drop(act(fc1(x))))), the stacked form of `timm.layers.Mlp`, or gated ones.

    `norm_layer` makes a norm of the hidden activations, given their width; `backend`: see `vmoe.moe.backends`.
    """

    # An `ExpertExchange` if the experts are sharded over processes: it sends each row to its expert and back.
    exchange: Callable[[RunExperts, Tensor, Tensor, int | None], Tensor] | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
        backend: str = "auto",
        **kwargs,
    ) -> None:
        super().__init__(in_features, hidden_features, linear=partial(GroupedLinear, num_experts), **kwargs)
        self.num_experts = num_experts
        self.backend = check_backend(backend)
        if norm_layer is not None:
            factory = {name: kwargs.get(name) for name in ("device", "dtype")}
            self.norm = GroupedLayerNorm(num_experts, norm_layer(hidden_features), **factory)

    def forward(self, x_RD: Tensor, count_E: Tensor, max_count: int | None = None) -> Tensor:
        """Rows sorted by expert, (R, D) -> (R, O). `max_count`: the most of an expert; None: unknown."""
        return self.run(x_RD, count_E) if self.exchange is None else self.exchange(self.run, x_RD, count_E, max_count)

    def run(self, x_RD: Tensor, count_E: Tensor) -> Tensor:
        """The experts that this process holds."""
        return select_backend(self, x_RD)(self, x_RD, count_E)

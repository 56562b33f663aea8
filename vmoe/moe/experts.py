"""The experts: E independent MLPs, one stacked weight tensor per matrix.

Shapes, by suffix: E experts, R rows sorted by expert, D model width, F hidden width, I and O a linear layer's widths.
"""

from collections.abc import Callable

from torch import Tensor, nn

from vmoe.moe.backends import check_backend, select_backend
from vmoe.moe.backends.reference import activate
from vmoe.moe.grouped import GroupedLayerNorm, GroupedLinear

GATED_ACTIVATIONS = {"swiglu": nn.SiLU, "geglu": nn.GELU}

# (rows, rows of each expert) -> rows
RunExperts = Callable[[Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """E MLPs: x -> fc2(norm(drop(act(fc1(x))))), the stacked form of `timm.layers.Mlp`, or gated ones.

    Gated experts (GLU variants, arXiv 2002.05202) have 2F outputs in `fc1`: the first F are the gate g, the second the
    value v, and the hidden activations are act(g) * v. This is the layout of `timm.layers.GluMlp(gate_last=False)`.

    Args:
        num_experts: E.
        in_features: D.
        hidden_features: F.
        out_features: width of the result, by default D.
        act_layer: makes the activation of plain experts.
        norm_layer: makes a norm of the hidden activations, given their width; None: no norm.
        bias: biases in both layers.
        drop: dropout after the activation.
        kind: "mlp", "swiglu" (SiLU) or "geglu" (GELU).
        backend: what computes them, see `vmoe.moe.backends.select_backend`.

    Attributes:
        exchange: where the experts are sharded over processes: brings each row to the process of its expert and back
            (`vmoe.distributed.expert_parallel.ExpertExchange`); else None.
    """

    exchange: Callable[[RunExperts, Tensor, Tensor, int | None], Tensor] | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        *,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        kind: str = "mlp",
        backend: str = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.backend = check_backend(backend)
        self.gated = kind in GATED_ACTIVATIONS
        fc1_features = 2 * hidden_features if self.gated else hidden_features
        self.fc1 = GroupedLinear(num_experts, in_features, fc1_features, bias, **factory)
        self.act = GATED_ACTIVATIONS[kind]() if self.gated else act_layer()
        self.drop = nn.Dropout(drop)
        self.norm = None
        if norm_layer is not None:
            self.norm = GroupedLayerNorm(num_experts, norm_layer(hidden_features), **factory)
        self.fc2 = GroupedLinear(num_experts, hidden_features, out_features or in_features, bias, **factory)

    def forward(self, x_RD: Tensor, count_E: Tensor, max_count: int | None = None) -> Tensor:
        """Rows through their experts.

        Args:
            x_RD: rows sorted by expert.
            count_E: rows of each expert; rows beyond their sum are unused.
            max_count: the most rows that an expert can have; None: unknown, in all processes.

        Returns:
            (R, O).
        """
        if self.exchange is not None:
            return self.exchange(self.run, x_RD, count_E, max_count)
        return self.run(x_RD, count_E)

    def run(self, x_RD: Tensor, count_E: Tensor) -> Tensor:
        """The experts that this process holds: (R, D) rows sorted by expert, (E,) rows of each -> (R, O)."""
        return select_backend(self, x_RD)(self, x_RD, count_E)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


class SharedExpert(nn.Module):
    """The dense MLP that sees every token beside the experts; of their kind and, gated, of their layout."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        out_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        kind: str = "mlp",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.gated = kind in GATED_ACTIVATIONS
        self.fc1 = nn.Linear(in_features, (1 + self.gated) * hidden_features, bias, **factory)
        self.act = GATED_ACTIVATIONS[kind]() if self.gated else act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        return self.fc2(self.drop(activate(self.act, self.gated, self.fc1(x))))

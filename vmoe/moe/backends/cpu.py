"""The experts on a CPU: both layers of one expert after the other, so that its rows stay in the cache between them.

One autograd function for the whole MLP: results and gradients are written where they belong, without the copies that
stacking each expert's would take. Kept for the backward pass are the rows and the hidden layer before and after its
activation. Where gradients are to be differentiated again, they are computed by plain PyTorch.

Shapes, by suffix: E experts, R rows sorted by expert, M rows of one expert, D width, F hidden width (2F in front of a
gated activation), I and O a linear layer's widths.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.backends.reference import activate

if TYPE_CHECKING:
    from vmoe.moe.experts import Experts

# {activation: how it approximates GELU}
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}
_NAMES = {  # by name: this package does not know timm, whose models bring activations of their own
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}


def activation_name(act: nn.Module) -> str | None:
    """ "gelu", "gelu_tanh", "silu" or "relu"; None: none of these, or one that works in place."""
    if getattr(act, "inplace", False):
        return None
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return _NAMES.get(f"{type(act).__module__}.{type(act).__qualname__}")


def run(experts: "Experts", x_RD: Tensor, count_E: Tensor) -> Tensor:
    """(R, D) rows sorted by expert, (E,) rows of each -> (R, O), zero in unused rows."""
    from vmoe.moe.experts import local_experts

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_RD.dtype
    parameters = [local_experts(p) for fc in (experts.fc1, experts.fc2) for p in (fc.weight, fc.bias)]
    arguments = (x_RD, *parameters, count_E.tolist(), activation_name(experts.act), experts.gated, dtype)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_RD, *parameters)):
            return _FusedExperts.apply(*arguments)
        return _forward(*arguments, None)


def _forward(x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, counts, name, gated, dtype, kept: tuple[Tensor, Tensor] | None):
    """`kept`: (R, F) buffers for the hidden layer and its activation."""
    y_RO = x_RD.new_empty(x_RD.shape[0], w2_EOF.shape[1], dtype=dtype)
    y_RO[sum(counts) :].zero_()
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        w1_FD, b1_F, w2_OF, b2_O = (_expert(p, e, dtype) for p in (w1_EFD, b1_EF, w2_EOF, b2_EO))
        h_MF = _linear(x_RD[rows].to(dtype), w1_FD, b1_F, None if kept is None else kept[0][rows])
        a_MF = _activate(h_MF, name, gated)
        if kept is not None:
            kept[1][rows] = a_MF
        _linear(a_MF, w2_OF, b2_O, y_RO[rows])
    return y_RO


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, counts, name, gated, dtype):
        kept = [x_RD.new_empty(x_RD.shape[0], width, dtype=dtype) for width in (w1_EFD.shape[1], w2_EOF.shape[2])]
        y_RO = _forward(x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, counts, name, gated, dtype, kept)
        ctx.save_for_backward(x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, *kept)
        ctx.rest = counts, name, gated, dtype
        return y_RO

    @staticmethod
    def backward(ctx, grad_RO):
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grad_RO), *[None] * 4
        x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, h_RF, a_RF = ctx.saved_tensors
        counts, name, gated, dtype = ctx.rest
        new = torch.empty_like if all(counts) else torch.zeros_like  # an expert without rows has a gradient of zero
        needs = ctx.needs_input_grad
        parameters = (w1_EFD, b1_EF, w2_EOF, b2_EO)
        dw1, db1, dw2, db2 = (new(p) if need else None for p, need in zip(parameters, needs[1:5], strict=True))
        dx_RD = torch.empty_like(x_RD) if needs[0] else None
        if dx_RD is not None:
            dx_RD[sum(counts) :].zero_()
        start = 0
        with torch.autocast("cpu", enabled=False):
            for e, count in enumerate(counts):
                rows = slice(start, start + count)
                start += count
                if not count:
                    continue
                g_MO = grad_RO[rows]
                if dw2 is not None:
                    _product(g_MO.t(), a_RF[rows], dw2[e])
                if db2 is not None:
                    db2[e] = g_MO.sum(0)
                if not any(needs[:3]):
                    continue
                g_MF = _linear(g_MO, _expert(w2_EOF, e, dtype).t())
                g_MF = _activation_gradient(g_MF, h_RF[rows], name, gated)
                if dw1 is not None:
                    _product(g_MF.t(), x_RD[rows].to(dtype), dw1[e])
                if db1 is not None:
                    db1[e] = g_MF.sum(0)
                if dx_RD is not None:
                    _linear(g_MF, _expert(w1_EFD, e, dtype).t(), None, dx_RD[rows])
        return dx_RD, dw1, db1, dw2, db2, None, None, None, None


def _expert(parameter: Tensor | None, e: int, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter[e].to(dtype)


def _linear(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None = None, out_MO: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, written to `out_MO` if it is given."""
    if out_MO is None:
        return F.linear(x_MI, w_OI, b_O)
    if out_MO.dtype != x_MI.dtype:  # the gradient of the rows under autocast
        return out_MO.copy_(F.linear(x_MI, w_OI, b_O))
    return torch.mm(x_MI, w_OI.t(), out=out_MO) if b_O is None else torch.addmm(b_O, x_MI, w_OI.t(), out=out_MO)


def _product(a_XM: Tensor, b_MY: Tensor, out_XY: Tensor) -> None:
    """out = a b, in the type of `out`."""
    if out_XY.dtype == a_XM.dtype:
        torch.mm(a_XM, b_MY, out=out_XY)
    else:
        out_XY.copy_(a_XM @ b_MY)


def _activate(h_MF: Tensor, name: str, gated: bool) -> Tensor:
    if gated:
        gate_MF, value_MF = h_MF.chunk(2, dim=-1)
        return _activate(gate_MF, name, False).mul_(value_MF)
    return F.gelu(h_MF, approximate=_GELU[name]) if name in _GELU else {"silu": F.silu, "relu": F.relu}[name](h_MF)


def _activation_gradient(g_MF: Tensor, h_MF: Tensor, name: str, gated: bool) -> Tensor:
    """The gradient before the activation from the one after it."""
    if gated:
        gate_MF, value_MF = h_MF.chunk(2, dim=-1)
        before_gate_MF = _activation_gradient(g_MF * value_MF, gate_MF, name, False)
        return torch.cat([before_gate_MF, g_MF * _activate(gate_MF, name, False)], dim=-1)
    if name in _GELU:
        return torch.ops.aten.gelu_backward(g_MF, h_MF, approximate=_GELU[name])
    return torch.ops.aten.silu_backward(g_MF, h_MF) if name == "silu" else g_MF * (h_MF > 0)


def _differentiable_gradients(ctx, grad_RO: Tensor) -> list[Tensor | None]:
    """The gradients of `_FusedExperts` with a graph: by autograd, of its forward pass once more in plain PyTorch."""
    inputs, (counts, name, gated, dtype) = ctx.saved_tensors[:5], ctx.rest
    x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO = (None if t is None else t.to(dtype) for t in inputs)
    act = {"silu": nn.SiLU(), "relu": nn.ReLU()}.get(name) or nn.GELU(_GELU[name])
    rows = []
    for e, x_MD in enumerate(x_RD[: sum(counts)].split(counts)):
        h_MF = F.linear(x_MD, w1_EFD[e], None if b1_EF is None else b1_EF[e])
        rows.append(F.linear(activate(act, gated, h_MF), w2_EOF[e], None if b2_EO is None else b2_EO[e]))
    needed = [tensor for tensor, needs in zip(inputs, ctx.needs_input_grad) if needs]
    own_RO = grad_RO[: sum(counts)]
    grads = iter(torch.autograd.grad(torch.cat(rows), needed, own_RO, create_graph=True, materialize_grads=True))
    return [next(grads) if needs else None for needs in ctx.needs_input_grad[:5]]

"""Experts whose weights are kept in int8 or bfloat16, for inference; matrix multiplications keep their input's type.

Shapes, by suffix: E experts, R rows sorted by expert, M rows of one expert, I and O a linear layer's widths.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe.moe.experts import Experts, refuse_adapters
from vmoe.moe.grouped import GroupedLinear, compute_dtype, grouped_linear

STORED = {"int8": torch.int8, "bfloat16": torch.bfloat16}


class WeightOnlyLinear(nn.Module):
    """A `GroupedLinear` for inference that keeps `stored`, (E, O, I), in fewer bytes, and for int8 `scale`, (E, O).

    The scale of an expert's output is its largest magnitude / 127 (symmetric). On a CPU, outside compiled code, one
    expert's weights at a time are converted, into one buffer, and the results are scaled instead of the weights
    (docs/inference.md has measurements). Elsewhere all weights of the layer are converted in each call.
    """

    def __init__(self, linear: GroupedLinear, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight_EOI, scale_EO = linear.weight.detach(), None
        if kind == "int8":
            scale_EO = torch.linalg.vector_norm(weight_EOI, torch.inf, dim=-1).float() / 127
            scale_EO = scale_EO.masked_fill(scale_EO == 0, 1.0)  # an output without weights
            pairs = zip(weight_EOI, scale_EO, strict=True)  # one expert at a time takes less memory
            stored_EOI = torch.stack(
                [(each_OI / scale_O[:, None]).round().to(torch.int8) for each_OI, scale_O in pairs]
            )
        else:
            stored_EOI = weight_EOI.to(STORED[kind])
        self.register_buffer("stored", stored_EOI)
        self.register_buffer("scale", scale_EO)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """RuntimeError, for those who look for the weights of a `GroupedLinear`."""
        raise RuntimeError(
            f"the weights of these experts are kept as {self.kind}, for inference alone: load the model without that"
        )

    def forward(self, x_RI: Tensor, count_E: Tensor) -> Tensor:
        """As `GroupedLinear.forward`. RuntimeError: in training mode, or if a gradient is required."""
        if self.training or (torch.is_grad_enabled() and x_RI.requires_grad):
            raise RuntimeError(
                f"experts kept as {self.kind} cannot be trained and have no gradients: call model.eval() and compute "
                "under torch.no_grad(), or load the model without that"
            )
        dtype = compute_dtype(x_RI)
        x_RI, bias_EO = x_RI.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if x_RI.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._forward_segments(x_RI, bias_EO, count_E.tolist())
        weight_EOI = self.stored.to(dtype) if self.scale is None else self.stored * self.scale.to(dtype)[..., None]
        return grouped_linear(x_RI, weight_EOI, bias_EO, count_E)

    def _forward_segments(self, x_RI: Tensor, bias_EO: Tensor | None, counts: list[int]) -> Tensor:
        _, O, I = self.stored.shape
        y_RO = x_RI.new_empty(x_RI.shape[0], O)
        buffer_OI = x_RI.new_empty(O, I)
        # Rows times integers up to 127 may exceed float16, whose largest is 65504.
        scale_weights = self.scale is not None and x_RI.dtype == torch.float16
        for e, (x_MI, y_MO) in enumerate(zip(x_RI.split(counts), y_RO.split(counts), strict=True)):
            if not x_MI.shape[0]:
                continue
            weight_OI = self.stored[e] if self.stored.dtype == x_RI.dtype else buffer_OI.copy_(self.stored[e])
            if scale_weights:
                weight_OI.mul_(self.scale[e, :, None])
            torch.mm(x_MI, weight_OI.t(), out=y_MO)
            if self.scale is not None and not scale_weights:
                y_MO.mul_(self.scale[e])
            if bias_EO is not None:
                y_MO.add_(bias_EO[e])
        return y_RO


@torch.no_grad()
def quantize_experts(model: nn.Module, kind: str) -> nn.Module:
    """Keeps the weights of a model's experts in "int8" or "bfloat16", for inference.

    The model is changed in place, put into eval(), without gradients, and returned. Do it before `torch.compile`. Its
    `state_dict` fits a model that was changed in the same way; `create_model` reads files of `save_pretrained`.
    ValueError: unknown kind; no experts; experts that are sharded, of the other kind or not finite. Nothing is changed.
    """
    if kind not in STORED:
        raise ValueError(f"experts can be kept as {' or '.join(map(repr, STORED))}, got {kind!r}")
    refuse_adapters(model)
    kinds = (GroupedLinear, WeightOnlyLinear)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not linears:
        raise ValueError(f"the model has no experts to keep as {kind}: leave it out for a dense model")
    for name, linear in linears.items():
        if isinstance(linear, WeightOnlyLinear):
            if linear.kind != kind:
                raise ValueError(f"{name} is kept as {linear.kind} already: load the model again for {kind}")
        elif isinstance(linear.weight, DTensor):
            raise ValueError(f"{name} is sharded over processes: export the run with vmoe-export, and load its file")
        elif not linear.weight.is_meta and not torch.linalg.vector_norm(linear.weight, torch.inf).isfinite():
            raise ValueError(f"{name}.weight is not finite: {kind} cannot keep it; take another checkpoint")
    for name in list(linears):
        linear = linears.pop(name)  # frees one before the next
        if isinstance(linear, GroupedLinear):
            model.set_submodule(name, WeightOnlyLinear(linear, kind))
    return model.eval().requires_grad_(False)


def experts_kept_as(model: nn.Module) -> str | None:
    """The kind that `quantize_experts` gave a model's experts; None if it did not."""
    return next((module.kind for module in model.modules() if isinstance(module, WeightOnlyLinear)), None)


def expert_bytes(model: nn.Module) -> int:
    """Memory of all experts of a model, in bytes."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    return sum(tensor.nbytes for each in experts for tensor in (*each.parameters(), *each.buffers()))

"""The experts in plain PyTorch: the code to read, what other backends are tested against, and what supports everything.

Shapes, by suffix: E experts, R rows sorted by expert, D model width, F hidden width, O output width.
"""

from torch import Tensor, nn


def run(experts: nn.Module, x_RD: Tensor, count_E: Tensor) -> Tensor:
    """`Experts` over (R, D) rows sorted by expert, (E,) rows of each -> (R, O)."""
    h_RF = experts.fc1(x_RD, count_E)
    h_RF = experts.drop(activate(experts.act, experts.gated, h_RF))
    if experts.norm is not None:
        h_RF = experts.norm(h_RF, count_E)
    return experts.fc2(h_RF, count_E)


def activate(act: nn.Module, gated: bool, h: Tensor) -> Tensor:
    """The hidden activations: act(h), or act(gate) * value of a gated MLP, whose h holds the gate, then the value."""
    if not gated:
        return act(h)
    gate, value = h.chunk(2, dim=-1)
    return act(gate) * value

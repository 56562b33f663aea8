"""A dense model's optimizer state for the model upcycled from it: no new warm-up (arXiv 2212.05055, appendix B)."""

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vmoe.models.dense_mlp import UpcycleError, stacked_parameters, to_experts
from vmoe.moe import SparseMoE


def upcycle_optimizer(
    dense_optimizer: Optimizer, dense_model: nn.Module, sparse_model: nn.Module, sparse_optimizer: Optimizer
) -> None:
    """Carry an optimizer's state over to the upcycled model's optimizer, in place, before its first step.

    Every expert gets the moments of the MLP that it was copied from, all else its own by name; routers start fresh.
    Settings stay those of the new optimizer. An UpcycleError if the optimizers are of two kinds, or keep state that is
    not one number per weight.
    """
    kind, states = type(dense_optimizer).__name__, dense_optimizer.state
    if (other := type(sparse_optimizer)) is not type(dense_optimizer):
        raise UpcycleError(f"the state of {kind} is of no use to {other.__name__}; take one kind for both models")
    dense = {name: p for name, p in dense_model.named_parameters() if states.get(p)}
    if not dense:
        raise UpcycleError("the dense optimizer has no state: it made no step yet, or keeps none; leave it out")
    for key in ("amsgrad", "centered"):  # they need state of their own
        old, new = (any(g.get(key) for g in each.param_groups) for each in (dense_optimizer, sparse_optimizer))
        if new and not old:
            raise UpcycleError(f"{kind} with {key} needs state that the dense model's {kind} does not keep")
    carried = {}
    for name, parameter in sparse_model.named_parameters():
        if name in dense and dense[name].shape == parameter.shape:
            carried[name] = copy.deepcopy(states[dense[name]])
    for name, layer in sparse_model.named_modules():
        if isinstance(layer, SparseMoE) and hasattr(layer, "upcycled_from"):
            own = {key.removeprefix(f"{name}."): p for key, p in dense.items() if key.startswith(f"{name}.")}
            new = _expert_states(layer, own, {key: states[p] for key, p in own.items()})
            carried |= {f"{name}.experts.{key}": state for key, state in new.items()}
    trained = {parameter for group in sparse_optimizer.param_groups for parameter in group["params"]}
    for name, state in carried.items():
        if (parameter := sparse_model.get_parameter(name)) in trained:
            sparse_optimizer.state[parameter] = state
    # Its own rules say what lies on which device and in which type, such as Adam's step counts.
    sparse_optimizer.load_state_dict(sparse_optimizer.state_dict())


def _expert_states(layer: SparseMoE, mlp: dict[str, Tensor], states: dict[str, dict]) -> dict[str, dict]:
    """{name of an expert's parameter: its state}, from the parameters of the MLP that have one and their states."""
    layout, G = layer.upcycled_from.layout, layer.upcycled_from.granularity
    new = {
        key: copy.deepcopy(states[source])
        for key, _ in layer.experts.named_parameters()
        if key.startswith("act.") and (source := layout.sources(key)[0]) in states
    }
    if f"{layout.fc2}.weight" not in mlp:
        return new  # the MLP was frozen
    keys = {frozenset(state) for state in states.values()}
    stacked = [key for key in stacked_parameters(layer.experts) if layout.sources(key)[0] in states]
    for key in keys.pop():
        values = {name: state[key] for name, state in states.items() if key in state}
        # A number for the whole tensor, such as Adam's step, is the same for all tensors that were updated together.
        single = all(not torch.is_tensor(value) or value.numel() == 1 for value in values.values())
        if keys or not (single or all(value.shape == mlp[name].shape for name, value in values.items())):
            raise UpcycleError("this optimizer keeps state that is not one number per weight; use Adam or a relative")
        copies = None if single else to_experts(layout, values, layer.num_experts, G)
        for name in stacked:
            number = values[layout.sources(name)[0]] if single else copies[name]
            new.setdefault(name, {})[key] = copy.deepcopy(number)
    return new

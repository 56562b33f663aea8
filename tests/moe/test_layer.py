import copy
import math

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

import vmoe
from vmoe.moe import SparseMoE


def test_is_a_drop_in_for_timms_mlp():
    ours, theirs = SparseMoE(in_features=8, hidden_features=16), Mlp(in_features=8, hidden_features=16)
    for shape in ((2, 5, 8), (7, 8), (2, 3, 4, 8)):
        x = torch.randn(shape)
        assert ours(x).shape == theirs(x).shape == shape
    one = SparseMoE(8, 16, num_experts=1, capacity_factor=None)
    for name in ("fc1", "fc2"):
        getattr(one.experts, name).weight.data[0] = getattr(theirs, name).weight
        getattr(one.experts, name).bias.data[0] = getattr(theirs, name).bias
    torch.testing.assert_close(one(x), theirs(x))  # a single expert has weight 1


def test_compiled_is_eager_without_recompiling_per_batch():
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = SparseMoE(
        8, 16, num_experts=4, num_selected_experts=2, noise_std=0.0, capacity_factor=0.6, group_size=10,
        batch_priority=True, modalities=("image", "text"), local_entropy_loss=0.1,
    )  # fmt: skip
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        x, mask, modality = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.7, (torch.arange(9) >= 5).long().expand(3, 9)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with vmoe.record_routing(module) as record:
                y = module(leaf, mask, modality)
                (y.square().sum() + record.auxiliary_loss()).backward()
            results.append((y, leaf.grad, *(parameter.grad for parameter in layer.parameters())))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_by_inductor():
    torch.manual_seed(0)
    layer = SparseMoE(8, 16, num_experts=4, capacity_factor=0.5, noise_std=0.0, batch_priority=True)
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_bfloat16_and_autocast_keep_the_gate_in_float32():
    torch.manual_seed(0)
    layer = SparseMoE(16, 32, num_experts=4, num_selected_experts=2, noise_std=0.0, capacity_factor=None)
    x = torch.randn(3, 10, 16)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16), vmoe.record_routing(layer) as record:
        y = layer(x)
    assert y.dtype == torch.bfloat16  # like timm's Mlp
    assert record.layers[""].gates.dtype == record.auxiliary_loss().dtype == torch.float32
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    y.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    low = copy.deepcopy(layer).bfloat16()
    with vmoe.record_routing(low) as record:
        assert low(x.bfloat16()).dtype == torch.bfloat16
    assert record.layers[""].gates.dtype == torch.float32


def test_same_seed_same_bits():
    layer = SparseMoE(16, 32, num_experts=4, capacity_factor=0.7, batch_priority=True)
    x = torch.randn(4, 50, 16)

    def run():
        torch.manual_seed(3)
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        return [y.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_masked_tokens_change_nothing():
    torch.manual_seed(0)
    layer = SparseMoE(6, 8, num_experts=3, capacity_factor=0.6, noise_std=0.0, z_loss=0.1).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    padded = torch.cat([x, torch.full((2, 4, 6), math.nan, dtype=torch.float64)], dim=1)
    mask = torch.arange(13).expand(2, 13) < 9
    with vmoe.record_routing(layer) as plain:
        y = layer(x)
    with vmoe.record_routing(layer) as masked:
        y_padded = layer(padded, mask)
    torch.testing.assert_close(y_padded[:, :9], y)
    assert (y_padded[:, 9:] == 0).all()
    (y_padded[:, :9].sum() + masked.auxiliary_loss()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    for name, value in plain.layers[""].metrics.items():
        torch.testing.assert_close(masked.layers[""].metrics[name], value, msg=name)


def test_nothing_is_dropped_in_eval_by_default():
    torch.manual_seed(0)
    layer = SparseMoE(6, 8, num_experts=4, capacity_factor=0.1, group_size=56)
    x = torch.randn(16, 7, 6)
    with vmoe.record_routing(layer) as record:
        layer(x)
    assert record.layers[""].metrics["share_dropped"] > 0.1
    layer.eval()
    with vmoe.record_routing(layer) as record:
        together = layer(x)
    assert record.layers[""].kept[record.layers[""].mask].all()
    assert "load_loss" not in record.layers[""].losses  # no noise in eval
    torch.testing.assert_close(together[3:4], layer(x[3:4]))


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "soft"])
def test_activation_checkpointing_counts_a_loss_once(router):
    layer = SparseMoE(6, 8, num_experts=4, num_tokens=20, router=router, importance_loss=1.0)
    x = torch.randn(2, 20, 6)
    gradients, calls = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with vmoe.record_routing(layer) as record:
            y = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
            (y.sum() + record.auxiliary_loss()).backward()
        calls.append(len(record.calls))
        gradients.append([leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert calls == [1, 1]
    torch.testing.assert_close(*gradients)


def attached_and_recorded(**kwargs):
    torch.manual_seed(0)
    recorded = SparseMoE(6, 8, num_experts=4, importance_loss=0.7, z_loss=0.3, **kwargs)
    attached = copy.deepcopy(recorded)
    attached.auxiliary_loss = "attach"
    return recorded, attached


@pytest.mark.parametrize(("scale", "recompute"), [(1.0, None), (0.5, True), (1024.0, False)])
def test_attached_losses_have_the_gradient_of_recorded_ones(scale, recompute):
    recorded, attached = attached_and_recorded()
    batches = torch.randn(3, 2, 10, 6)
    vmoe.set_auxiliary_loss_scale(scale)
    try:
        for step, x in enumerate(batches):  # accumulated over three backward passes
            torch.manual_seed(step)
            with vmoe.record_routing(recorded) as record:
                loss = recorded(x).square().mean() + record.auxiliary_loss()
            (scale * loss).backward()
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            y = attached(leaf) if recompute is None else checkpoint(attached, leaf, use_reentrant=recompute)
            (scale * y.square().mean()).backward()
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    for ours, theirs in zip(attached.parameters(), recorded.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_attaching_changes_no_output_and_nothing_in_eval():
    recorded, attached = attached_and_recorded(noise_std=0.0)
    x = torch.randn(2, 10, 6)
    assert torch.equal(attached(x), recorded(x))
    attached.eval()
    attached(x).sum().backward()
    recorded.eval()
    recorded(x).sum().backward()
    torch.testing.assert_close(attached.router.weight.grad, recorded.router.weight.grad)


def test_the_attached_scale_reaches_compiled_code():
    torch._dynamo.reset()
    _, attached = attached_and_recorded(noise_std=0.0)
    compiled = torch.compile(attached, fullgraph=True, backend="aot_eager")
    gradients = []
    try:
        for scale in (1.0, 3.0):
            vmoe.set_auxiliary_loss_scale(scale)
            attached.zero_grad()
            (compiled(torch.ones(1, 10, 6)) * 0).sum().backward()  # only the auxiliary losses have a gradient
            gradients.append(attached.router.weight.grad.clone())
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def test_modalities_have_their_own_losses_and_statistics():
    torch.manual_seed(0)
    layer = SparseMoE(
        6, 8, num_experts=4, capacity_factor=0.5, modalities=("image", "text"),
        local_entropy_loss={"text": 0.1}, global_entropy_loss=0.2, global_entropy_min_experts={"image": 3},
    )  # fmt: skip
    x = torch.randn(2, 10, 6)
    modality = (torch.arange(10) >= 7).long().expand(2, 10)
    with vmoe.record_routing(layer) as record:
        layer(x, None, modality)
    routing = record.layers[""]
    p_text = routing.tokens(routing.gates)[:, 7:].reshape(-1, 4)
    entropy = -(p_text * p_text.log()).sum(-1).mean()
    torch.testing.assert_close(routing.losses["text/local_entropy_loss"], entropy)
    p_image = routing.tokens(routing.gates)[:, :7].reshape(-1, 4).mean(0)
    threshold = (math.log(3) + (p_image * p_image.log()).sum()).clamp(min=0)
    torch.testing.assert_close(routing.losses["image/global_entropy_loss"], threshold)
    assert routing.losses["text/local_entropy_loss"].requires_grad
    assert not routing.losses["image/local_entropy_loss"].requires_grad  # its weight is zero
    assert torch.equal(routing.load, routing.load_by_modality["image"] + routing.load_by_modality["text"])
    weighted = sum(layer.losses.weights[name] * loss for name, loss in routing.losses.items())
    torch.testing.assert_close(routing.auxiliary_loss, weighted)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number >= 1, got 0"),
        ({"num_selected_experts": 9}, "num_selected_experts must be 1..num_experts"),
        ({"router": "tok_k"}, "router must be one of"),
        ({"capacity_factor": -1}, "capacity_factor must be > 0, or None .or infinity. for no limit, got -1"),
        ({"eval_capacity_factor": 0}, "eval_capacity_factor must be > 0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be > 0"),
        ({"group_size": 0}, "group_size must be a whole number >= 1"),
        ({"group_size": 3.5}, "group_size must be a whole number >= 1"),
        ({"noise_std": math.nan}, "noise_std must be >= 0"),
        ({"noise_std": -1.0}, "noise_std must be >= 0"),
        ({"importance_loss": -1.0}, "importance_loss must be >= 0"),
        ({"auxiliary_loss": "yes"}, "auxiliary_loss must be one of .'record', 'attach'., got 'yes'"),
        ({"local_entropy_loss": {"sound": 1.0}}, "names \\['sound'\\], but the modalities are \\['image'\\]"),
        ({"global_entropy_min_experts": 99}, "global_entropy_min_experts must be 1..num_experts .8., got 99"),
    ],
)
def test_settings_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SparseMoE(8, 16, **kwargs)


ROUTERS = {
    "top_k": {"num_selected_experts": 2, "batch_priority": True, "z_loss": 0.1, "gshard_loss": 0.1},
    "groups": {"group_size": 4, "capacity_rounding": "round", "bias_update_rate": 0.1, "local_entropy_loss": 0.1},
    "attached": {"learned_noise": True, "auxiliary_loss": "attach", "auxiliary_loss_scope": "batch"},
    "dropless": {"capacity_factor": None, "expert_mlp": "swiglu"},
    "expert_choice": {"router": "expert_choice", "load_loss": 0.0},
    "soft": {"router": "soft", "num_slots": 2, "load_loss": 0.0, "global_entropy_loss": 0.1},
}


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 3)], ids=str)
def test_an_empty_batch_trains_with_zeros(settings, norm_layer, shape):
    """In a job of several processes one of them may have no token: it takes part in all exchanges."""
    layer = SparseMoE(8, 16, 3, num_experts=4, norm_layer=norm_layer, num_shared_experts=1, **settings)
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        with vmoe.record_routing(layer) as record:
            y = layer(torch.randn(*shape, 8, requires_grad=True), mask)
            loss = y.sum() + record.auxiliary_loss()
        loss.backward()
        assert y.shape == (*shape, 3)
        assert loss == 0
        assert all((parameter.grad == 0).all() for parameter in layer.parameters())
        assert all(value.isfinite() for value in record.layers[""].metrics.values())


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_padding_alone_trains_with_zeros(settings):
    layer = SparseMoE(8, 16, num_experts=4, **settings)
    with vmoe.record_routing(layer) as record:
        y = layer(torch.full((2, 5, 8), torch.nan), torch.zeros(2, 5, dtype=torch.bool))
        (y.sum() + record.auxiliary_loss()).backward()
    assert (y == 0).all()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())
    assert all(value.isfinite() for value in record.layers[""].metrics.values())


class Unit(nn.Module):
    """An activation that learns, and is not finite at zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return self.scale * h / h.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_unused_rows_reach_no_parameter(settings, filled_memory):
    """Neither those of norms nor of activations: unused rows of compiled code, rows without a token, slots of a
    modality without tokens. None may hold zeros, where an activation need not be finite."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "group_size" in settings else torch.float32
    settings = {**settings, "expert_mlp": "mlp", "learned_noise": False}
    modalities = {"modalities": ("image", "text")} if settings.get("router") in ("expert_choice", "soft") else {}
    layer = SparseMoE(
        8, 16, num_experts=4, noise_std=0.0, act_layer=Unit, norm_layer=nn.LayerNorm, bias=False,
        **settings, **modalities,
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 12, 8, dtype=dtype, requires_grad=True)
    mask = torch.arange(24).view(2, 12) % 5 > 0
    modality = torch.zeros(2, 12, dtype=torch.long)
    modality[0, 5:] = len(modalities)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = run(x, mask, modality if modalities else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for eager, own in zip(*results):
        assert eager.isfinite().all()
        torch.testing.assert_close(own, eager, **tolerance)


def test_settings_of_a_compiled_layer_may_be_changed():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = SparseMoE(8, 16, num_experts=4, num_selected_experts=2, noise_std=0.0)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 9, 8)
    others = {"capacity": 3, "batch_priority": True, "group_size": 6}
    for changes in ({"capacity_factor": 1.0}, {"capacity_factor": 0.5}, {"eval_capacity_factor": 0.5}, others):
        for name, value in changes.items():
            setattr(layer, name, value)
            assert getattr(layer, name) == getattr(layer.settings, name) == value
        layer.train("eval_capacity_factor" not in changes)
        torch.testing.assert_close(compiled(x), layer(x), msg=str(changes))


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_second_derivatives(settings):
    """Also where the gradient that comes from outside needs none, as in a gradient penalty."""
    torch.manual_seed(0)
    layer = SparseMoE(4, 6, num_experts=3, num_shared_experts=1, **settings).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), x)

    assert torch.autograd.gradgradcheck(run, (x, *parameters.values()), fast_mode=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert gradient.requires_grad
    penalty = torch.autograd.grad(gradient.square().sum(), list(layer.experts.parameters()), allow_unused=True)
    assert sum(grad is not None for grad in penalty) >= 3


def test_a_group_size_above_the_call_costs_nothing():
    layer = SparseMoE(8, 16, group_size=1000)
    with vmoe.record_routing(layer) as record:
        layer(torch.randn(2, 5, 8))
    assert record.layers[""].gates.shape[:2] == (1, 10)


@pytest.mark.parametrize("frozen", [True, False])
def test_tensorboard_draws_no_wrong_graph(tmp_path, frozen):
    layer = SparseMoE(8, 16).requires_grad_(not frozen)
    with SummaryWriter(tmp_path) as writer, pytest.raises(RuntimeError, match=r"use torch\.export or torch\.compile"):
        writer.add_graph(layer, torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "settings", [{"group_size": 7, "eval_capacity_factor": 1.1}, {"router": "soft", "num_slots": 2}]
)
def test_an_exported_layer_takes_any_batch(settings):
    torch.manual_seed(0)
    layer, batch = SparseMoE(8, 16, num_experts=2, num_tokens=5, **settings).eval(), torch.export.Dim("batch", min=1)
    deferred = {"prefer_deferred_runtime_asserts_over_guards": True}
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 5, 8),), dynamic_shapes=({0: batch},), **deferred)
        for size in (1, 3, 7):
            x = torch.randn(size, 5, 8)
            torch.testing.assert_close(program.module()(x), layer(x))
    assert not [node for node in program.graph.nodes if "vmoe" in str(node.target)]  # it needs no vmoe


def test_calls_that_cannot_be_right_are_named():
    layer, x = SparseMoE(8, 16).eval().requires_grad_(False), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match=r"use torch\.export or torch\.compile"):
        torch.jit.trace(layer, x)  # it would take the example's routing for all inputs
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot .* use torch\.export or torch\.compile"):
        torch.jit.script(torch.nn.Sequential(layer))
    with pytest.raises(ValueError, match="the tokens have 7 channels, and the layer takes 8"):
        layer(x[..., :7])
    with pytest.raises(ValueError, match=r"mask must have the tokens' shape \(2, 5\), got \(5, 2\)"):
        layer(x, torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be a tensor of bool, got torch\.float32"):
        layer(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"modality must be a tensor of int, got torch\.bool"):
        layer(x, None, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="finite"):
        vmoe.set_auxiliary_loss_scale(math.inf)


def test_an_attached_layer_counts_once_with_the_scale_of_its_forward_pass():
    recorded, attached = attached_and_recorded(noise_std=0.0)
    x = torch.randn(2, 10, 6)
    values = []
    try:
        for layer in (recorded, attached):
            with vmoe.record_routing(layer) as record:
                loss = layer(x).sum() + record.auxiliary_loss()
            vmoe.set_auxiliary_loss_scale(7.0 if layer is attached else 1.0)  # for the next forward pass
            loss.backward()
            values.append(record.auxiliary_loss().item())
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    assert values[0] == values[1]
    torch.testing.assert_close(attached.router.weight.grad, recorded.router.weight.grad)


def test_gradients_through_torch_func():
    layer = SparseMoE(6, 8, num_experts=3, noise_std=0.0, capacity_factor=0.5)
    x = torch.randn(2, 5, 6)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x), leaf.grad)


def test_arguments_by_name_are_those_by_position():
    layer = SparseMoE(8, num_experts=4).eval()
    x, mask = torch.randn(2, 5, 8), torch.rand(2, 5) < 0.7
    assert torch.equal(layer(x_BTD=x, mask_BT=mask), layer(x, mask))
    traced = torch.fx.Tracer()

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = layer

        def forward(self, tokens):
            return self.moe(x_BTD=tokens)

    named = Named()
    graph = torch.fx.GraphModule(named, traced.trace(named))
    assert torch.equal(graph(x), layer(x))

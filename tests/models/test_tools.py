"""Tools that walk models: hooks, summaries, attributions and graph tracers see tensors from every part of the layer."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmoe
from vmoe.models.flops import model_profile

PRESETS = [None, "mixtral", "expert_choice", "soft", "noisy_topk", "deepseek"]
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "num_experts": 4, "backend": "reference"}


def make(preset=None, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", router_preset=preset, **{**TINY, **kwargs})
    if not kwargs.get("features_only"):
        torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_see_tensors_only(preset, training):
    model, seen = make(preset).train(training), {}

    def note(module, inputs, output):
        seen[module] = [*inputs, *(output if isinstance(output, tuple) else (output,))]

    handles = [module.register_forward_hook(note) for module in model.modules()]
    handles += [module.register_full_backward_hook(lambda *_: None) for module in model.modules()]
    x = torch.randn(2, 3, 48, 48, requires_grad=True)
    torch.manual_seed(1)
    with vmoe.record_routing(model) as record:
        hooked = model(x)
    (hooked.sum() + record.auxiliary_loss()).backward()
    for handle in handles:
        handle.remove()
    router = model.blocks[1].mlp.router
    assert router in seen
    assert all(isinstance(each, torch.Tensor) for each in seen[router])
    kinds = {type(each) for values in seen.values() for each in values}
    assert kinds <= {torch.Tensor, torch.nn.Parameter, int, type(None)}  # Experts also take their most rows
    torch.manual_seed(1)
    assert torch.equal(model(x), hooked)


def test_a_hook_changes_the_routing():
    model = make().eval()
    handle = model.blocks[1].mlp.router.register_forward_hook(
        lambda _module, _inputs, logits: 0 * logits - torch.arange(4)
    )
    with vmoe.record_routing(model) as record, handle:
        model(torch.randn(2, 3, 48, 48))
    assert (record.layers["blocks.1.mlp"].expert_index == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_torchinfo(preset):
    torchinfo = pytest.importorskip("torchinfo", reason="needs torchinfo (pip install -e '.[test]')")
    model = make(preset)
    for mode in ("train", "eval"):
        summary = torchinfo.summary(model, (2, 3, 48, 48), depth=5, verbose=0, mode=mode)
        assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())


def test_captum():
    attr = pytest.importorskip("captum.attr", reason="needs captum (pip install -e '.[test]')")
    model, x = make().eval(), torch.randn(2, 3, 48, 48)
    router, layer = model.blocks[1].mlp.router, model.blocks[1].mlp
    with vmoe.record_routing(model) as record:
        model(x)
    logits = attr.LayerActivation(model, router).attribute(x)
    torch.testing.assert_close(logits.softmax(-1), record.layers["blocks.1.mlp"].gates)
    assert attr.LayerGradientXActivation(model, router).attribute(x, target=1).abs().sum() > 0
    assert attr.LayerIntegratedGradients(model, router).attribute(x, target=1, n_steps=3).shape == logits.shape
    assert attr.LayerGradCam(model, layer).attribute(x, target=1).shape[0] == 2
    method = attr.IntegratedGradients(model)
    attributions, delta = method.attribute(x[:1], target=1, n_steps=8, return_convergence_delta=True)
    assert attributions.shape == x[:1].shape
    assert delta.isfinite().all()


def test_which_counters_count_right():
    model, x = make(num_selected_experts=1).eval(), torch.randn(1, 3, 48, 48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == model_profile(model)["gflops_per_image"] * 1e9
    thop = pytest.importorskip("thop", reason="needs thop")  # docs/integrations.md names it as one that counts wrong
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert thop.profile(model, (x,), verbose=False)[1] < parameters


def test_graph_tracers_keep_the_layer_whole():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x, name = make().eval(), torch.randn(2, 3, 48, 48), "blocks.1.mlp"
    with vmoe.record_routing(model) as record:
        y = model(x)
    seen = {}
    model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: seen.update(mlp=output))
    model(x)
    train_nodes, eval_nodes = feature_extraction.get_graph_node_names(model)
    assert name in train_nodes
    assert name in eval_nodes
    for create in (timm.models.create_feature_extractor, feature_extraction.create_feature_extractor):
        extractor = create(model, [name, "head"])
        with vmoe.record_routing(extractor) as traced:
            features = extractor(x)
        assert torch.equal(features[name], seen["mlp"])
        assert torch.equal(features["head"], y)
        assert torch.equal(traced.layers[name].expert_index, record.layers[name].expert_index)
        extractor.train()
        with vmoe.record_routing(extractor) as traced:
            extractor(x)
        assert traced.auxiliary_loss() > 0


def test_features_of_timm():
    model, x = make().eval(), torch.randn(2, 3, 48, 48)
    last, between = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, model.forward_features(x))
    maps = make(features_only=True, out_indices=(0, 1)).eval()(x)
    assert [each.shape for each in maps] == [each.shape for each in between] == [(2, 32, 6, 6)] * 2
    layers = model.get_intermediate_layers(x, n=2, reshape=True, norm=True)
    for ours, theirs in zip(layers, between):
        assert torch.equal(ours, theirs)

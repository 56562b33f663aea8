import pytest
import torch
from torch import nn

import vmoe
from vmoe.inspection.accumulate import split_modalities
from vmoe.models import limoe, tokens
from vmoe.models.limoe import LIMoE
from vmoe.models.tokens import PackedTokens, RowTokens
from vmoe.moe import SparseMoE
from vmoe.moe.router import TopKRouter

END = 19


def model_of(**kwargs) -> LIMoE:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "context_length": 6, "vocab_size": 20, "eot_token_id": END}
    sizes |= {"embed_dim": 8, "width": 16, "depth": 2, "num_heads": 2, "num_experts": 4, "noise_std": 0.0}
    model = LIMoE(**{**sizes, **kwargs}).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def captions(lengths=(6, 1, 3, 2)) -> torch.Tensor:
    text = torch.randint(0, END, (len(lengths), 6))
    for row, length in zip(text, lengths):
        row[length - 1] = END
    return text


def pictures(number: int = 4) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, dtype=torch.float64)


@pytest.fixture(autouse=True)
def leave_out_all_padding(monkeypatch):
    """The captions here are too short for a multiple of the usual number."""
    monkeypatch.setattr(tokens, "NUM_TOKENS_MULTIPLE_OF", 1)


def features_and_gradients(model, call, packed):
    """What `call` gives, {name: gradient}, the recorded loads, and how often tokens were packed."""
    calls, of = [], PackedTokens.of
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limoe.PackedTokens, "of", lambda rows: calls.append(rows) or of(rows))
        if not packed:
            patch.setattr(LIMoE, "can_pack", lambda self, x: False)
        with vmoe.record_routing(model) as record:
            features = call()
        loss = record.auxiliary_loss() if model.training else 0
        for feature in features:
            loss = loss + (feature * torch.linspace(-1, 1, feature.numel()).view(feature.shape)).sum()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    loads = {name: call.load_by_modality for name, call in record.layers.items()}
    return features, gradients, loads, len(calls)


def assert_packed_is_rows(model, call, times=1):
    features, gradients, loads, calls = features_and_gradients(model, call, packed=True)
    expected, expected_gradients, expected_loads, none = features_and_gradients(model, call, packed=False)
    assert (calls, none) == (times, 0)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-8, atol=1e-11, msg=name)
    for name, load in loads.items():
        assert all(torch.equal(own, expected_loads[name][modality]) for modality, own in load.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"pool": "map"}, {"num_experts": 0}, {"router": "expert_choice"}, {"router": "soft"}, {"group_size": 7}],
    ids=lambda kwargs: ",".join(f"{name}={value}" for name, value in kwargs.items()) or "plain",
)
def test_packed_tokens_give_what_rows_give(kwargs, training):
    model, image, text = model_of(**kwargs).train(training), pictures(), captions()
    assert_packed_is_rows(model, lambda: model(image, text)[:2])


PACKED = [
    {"num_shared_experts": 1},
    {"noise_std": 1.0},
    {"num_selected_experts": 3, "capacity_factor": 0.5, "noise_std": 1.0},
    {"capacity_factor": 0.3, "capacity_multiple_of": 1},
    {"capacity_factor": 0.3, "batch_priority": False},  # the order in the batch decides
    {"capacity_factor": 0.06, "capacity_rounding": "round"},  # room by the number of places in the batch, not of tokens
    {"capacity_factor": 0.3, "auxiliary_loss": "attach"},
    {"router_preset": "noisy_topk"},
    {"router_preset": "deepseek"},
]
AS_ROWS = [
    {"router": "expert_choice"},
    {"router": "soft"},
    {"group_size": 7},
    {"input_jitter": 0.1},
    {"random_threshold": 0.9},
    {"router_preset": "switch"},  # jitter too
    {"num_shared_experts": 1, "expert_drop": 0.3},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", [*PACKED, *AS_ROWS], ids=str)
def test_sparse_layers_route_packed_tokens_as_they_route_rows(kwargs, training, monkeypatch):
    """The same choices, drops and random numbers, and the same record; so do the layers that want rows."""
    rows, unpack = [], PackedTokens.unpack
    monkeypatch.setattr(PackedTokens, "unpack", lambda self, x: rows.append(x) or unpack(self, x))
    model, image, text = model_of(**kwargs).train(training), pictures(), captions()
    if kwargs.get("router_preset") == "noisy_topk":
        for layer in (module for module in model.modules() if isinstance(module, SparseMoE)):
            nn.init.normal_(layer.router.weight), nn.init.normal_(layer.router.noise_weight)

    def call():
        torch.manual_seed(0)
        return model(image, text)[:2]

    assert_packed_is_rows(model, call)
    of_heads = 1  # after the last block
    wants_rows = kwargs in AS_ROWS[:3] or (training and kwargs in AS_ROWS)
    assert len(rows) == of_heads + (1 if wants_rows else 0)
    records = []
    for packed in (True, False):
        monkeypatch.setattr(LIMoE, "can_pack", lambda self, x, packed=packed: packed)
        with vmoe.record_routing(model) as record:
            call()
        records += record.layers.values()
    ours, theirs = records
    assert (ours.places is not None) == (not wants_rows)
    assert ours.batch_shape == theirs.batch_shape == (4, 4 + 6)
    assert torch.equal(ours.modality_BT, theirs.modality_BT)
    real = theirs.tokens(theirs.mask)
    assert torch.equal(ours.tokens(ours.mask), real)
    for name in ("expert_index", "kept"):
        assert torch.equal(ours.tokens(getattr(ours, name))[real], theirs.tokens(getattr(theirs, name))[real])
    for name in ("gates", "combine_weights"):
        torch.testing.assert_close(ours.tokens(getattr(ours, name))[real], theirs.tokens(getattr(theirs, name))[real])
    torch.testing.assert_close(ours.metrics, theirs.metrics)
    split = [split_modalities(record) for record in (ours, theirs)]
    assert [own["text"].real_BT.shape for own in split] == [(4, 6)] * 2


@pytest.mark.parametrize(("part", "shape"), [("", (4, 4 + 6, 16)), ("router", (1, 4 * (4 + 6), 16))])
def test_a_hook_on_a_sparse_layer_or_its_router_sees_rows(part, shape):
    model, inputs = model_of(), []
    image, text = pictures(), captions()
    expected = model.eval()(image, text)
    (layer,) = (module for module in model.modules() if isinstance(module, SparseMoE))
    layer.get_submodule(part).register_forward_pre_hook(lambda module, args: inputs.append([x.shape for x in args[:1]]))
    torch.testing.assert_close(model(image, text), expected)
    assert inputs == [[shape]]


class OwnRouter(TopKRouter):
    """As a user may have written one."""

    def forward(self, x_GND):
        return super().forward(2 * x_GND)


class OwnLayer(SparseMoE):
    def forward(self, x_BTD, mask_BT=None, modality_BT=None):
        return 2 * super().forward(x_BTD, mask_BT, modality_BT)


@pytest.mark.parametrize("own", ["router", "layer"])
def test_routers_and_layers_of_others_see_rows(own):
    model, image, text = model_of(), pictures(), captions()
    (layer,) = (module for module in model.modules() if isinstance(module, SparseMoE))
    (layer.router if own == "router" else layer).__class__ = OwnRouter if own == "router" else OwnLayer
    assert_packed_is_rows(model, lambda: model(image, text)[:2])


def test_places_that_a_layer_does_not_take_are_errors():
    layer = SparseMoE(8, num_experts=2)
    x_SD, mask_BT, place_S = torch.randn(3, 8), torch.ones(2, 2, dtype=torch.bool), torch.tensor([3, 0, 1])
    assert layer(x_SD, mask_BT, None, place_S).shape == (3, 8)
    with pytest.raises(ValueError, match="needs a mask"):
        layer(x_SD, None, None, place_S)
    with pytest.raises(ValueError, match="modality of the same shape"):
        layer(x_SD, mask_BT, torch.zeros(2, 3, dtype=torch.long), place_S)
    with pytest.raises(ValueError, match=r"place_S must have the tokens' shape \(3,\), got \(2,\)"):
        layer(x_SD, mask_BT, None, place_S[:2])
    for settings in ({"router": "expert_choice"}, {"group_size": 2}):
        with pytest.raises(ValueError, match="takes_packed"):
            SparseMoE(8, num_experts=2, **settings)(x_SD, mask_BT, None, place_S)


@pytest.mark.parametrize("multiple", [4, 5, 7, 64])
def test_some_padding_is_kept_for_a_round_number_of_tokens(multiple, monkeypatch):
    monkeypatch.setattr(tokens, "NUM_TOKENS_MULTIPLE_OF", multiple)
    model, image, text = model_of(), pictures(), captions()
    assert_packed_is_rows(model, lambda: model(image, text)[:2])
    P, L = 4, 6
    mask_BT = torch.arange(P + L) < P + torch.tensor([[6], [1], [3], [2]])
    packed = PackedTokens.of(RowTokens(P, mask_BT, torch.zeros_like(mask_BT).long(), torch.zeros(4, 1, 1, L)))
    S, real, all_tokens = len(packed.place_S), int(mask_BT.sum()), mask_BT.numel()
    assert min(-(-real // multiple) * multiple, all_tokens) == S
    assert packed.place_S.unique().numel() == S
    assert mask_BT.flatten()[packed.place_S[:real]].all()


def test_captions_alone():
    model, text, full = model_of(), captions(), captions((6, 6))
    assert_packed_is_rows(model, lambda: [model.encode_text(text)])
    assert_packed_is_rows(model, lambda: [model.encode_text(text[:, :3])])
    assert_packed_is_rows(model, lambda: [model.encode_text(full)])  # nothing to leave out


def test_pictures_alone_are_rows():
    model, image = model_of(), pictures()
    assert_packed_is_rows(model, lambda: [model.encode_image(image)], times=0)


def test_gradient_checkpointing():
    model, image, text = model_of(), pictures(), captions()
    _, gradients, _, _ = features_and_gradients(model, lambda: model(image, text)[:2], packed=True)
    model.set_grad_checkpointing()
    assert_packed_is_rows(model, lambda: model(image, text)[:2])
    _, recomputed, _, _ = features_and_gradients(model, lambda: model(image, text)[:2], packed=True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_stochastic_depth_drops_rows_so_they_stay():
    model, image, text = model_of(drop_path_rate=0.5), pictures(), captions()
    torch.manual_seed(0)
    _, _, _, calls = features_and_gradients(model, lambda: model(image, text)[:2], packed=True)
    assert calls == 0
    model.eval()
    assert_packed_is_rows(model, lambda: model(image, text)[:2])


def test_an_empty_batch():
    model = model_of()
    none = torch.zeros(0, 6, dtype=torch.long)
    assert model.encode_text(none).shape == (0, 8)
    image_features, text_features, _ = model(pictures(0), none)
    assert image_features.shape == text_features.shape == (0, 8)


def test_the_default_device_changes_nothing():
    model, image, text = model_of().eval(), pictures(), captions()
    features = model(image, text)
    with torch.device("meta"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(image, text), features))


@pytest.mark.parametrize("P", [0, 3])
def test_where_tokens_lie(P):
    mask_BL = torch.tensor([[True, True, False], [True, False, False]])
    mask_BT = torch.cat([torch.ones(2, P, dtype=torch.bool), mask_BL], dim=1)
    rows = RowTokens(P, mask_BT, torch.zeros(2, P + 3, dtype=torch.long), torch.zeros(2, 1, 1, 3))
    packed = PackedTokens.of(rows)
    x_BTD = torch.arange(1.0, 2 * (P + 3) + 1).view(2, P + 3, 1).repeat(1, 1, 2)
    x_SD = packed.pack(x_BTD)
    words = [x_BTD[0, P], x_BTD[0, P + 1], x_BTD[1, P]]
    assert torch.equal(x_SD, torch.cat([x_BTD[:, :P].flatten(0, 1), torch.stack(words)]))
    assert torch.equal(packed.unpack(x_SD), x_BTD * mask_BT[..., None])
    assert torch.equal(packed.join([part for part, _ in packed.sequences(x_SD)]), x_SD)
    assert torch.equal(rows.join([part for part, _ in rows.sequences(x_BTD)]), x_BTD)
    for (ours, _), (theirs, _) in zip(packed.sequences(x_SD), rows.sequences(x_BTD * mask_BT[..., None]), strict=True):
        assert torch.equal(ours, theirs)
    x_SD.requires_grad_()
    assert torch.autograd.gradcheck(packed.unpack, x_SD.double())
    assert torch.autograd.gradcheck(packed.pack, x_BTD.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: [part for part, _ in packed.sequences(x)], x_SD.double())

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from timm.layers import set_fused_attn

import vmoe
from vmoe.models.limoe import LIMOE_CONFIGS, LIMoE
from vmoe.moe.config import PRESETS

SMALL_VOCABULARY = {"vocab_size": 64, "eot_token_id": 63}
CLIPS_VOCABULARY = {"vocab_size": 49408, "eot_token_id": 49407}


def tiny(**kwargs) -> LIMoE:
    torch.manual_seed(0)
    return LIMoE(**{**LIMOE_CONFIGS["limoe_tiny_patch12_48"], **SMALL_VOCABULARY, **kwargs})


def pairs(B: int = 6):
    """Images, and texts of 3 to 8 tokens, of which six are different."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 63, (6, 16), generator=generator)
    for row, length in enumerate((3, 4, 7, 8, 3, 4)):
        text[row, length - 1 :] = 0
        text[row, length - 1] = 63
    return torch.randn(B, 3, 48, 48, generator=generator), text[torch.arange(B) % 6]


def test_open_clips_zero_shot_classifier_works_as_it_stands():
    model = tiny(**CLIPS_VOCABULARY).eval()
    tokenizer = vmoe.get_tokenizer(model)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, ["cat", "dog", "car"], ["{}", "a {}"])
    assert weights.shape == (128, 3)
    expected = F.normalize(model.encode_text(tokenizer(["dog", "a dog"]), normalize=True).mean(0), dim=-1)
    torch.testing.assert_close(weights[:, 1], expected)


def test_training_routes_patches_and_text_tokens_together():
    model = tiny()
    image, text = pairs()
    with vmoe.record_routing(model) as record:
        model(image, text)
    routing = record.layers["blocks.1.mlp"]
    assert routing.batch_shape == (6, 16 + 16)
    real = routing.tokens(routing.mask)
    assert real[:, :16].all()
    lengths = (text != 0).sum(1)
    assert torch.equal(real[:, 16:].sum(1), lengths)
    assert set(routing.load_by_modality) == {"image", "text"}
    for name in ("image/share_dropped", "text/share_dropped", "text/local_entropy_loss", "image/global_entropy_loss"):
        assert torch.isfinite(routing.metrics[name])
    # Text tokens compete with patches: with capacity for one in four, both lose some.
    tight = tiny(capacity_factor=0.25)
    with vmoe.record_routing(tight) as record:
        tight(image, text)
    assert record.layers["blocks.1.mlp"].metrics["share_dropped"] > 0.5
    # Alone only its own tokens are routed.
    with vmoe.record_routing(model) as record:
        model.encode_text(text)
    assert record.layers["blocks.1.mlp"].load_by_modality["image"].sum() == 0
    assert record.layers["blocks.1.mlp"].mask.sum() == (text != 0).sum()
    with vmoe.record_routing(model) as record:
        model.encode_image(image)
    assert record.layers["blocks.1.mlp"].load_by_modality["text"].sum() == 0


def test_attention_stays_within_an_image_and_a_caption():
    image, text = pairs()
    model = tiny(num_experts=0).double()  # without experts nothing else could mix them
    image = image.double()
    image_features, text_features, _ = model(image, text)
    other = torch.randn_like(image)
    assert torch.equal(model(other, text)[1], text_features)
    assert torch.equal(model(image, text.flip(0))[0], image_features)


@pytest.mark.parametrize(("pool", "fused"), [("avg", True), ("map", True), ("map", False)])
def test_padding_after_a_text_changes_nothing(pool, fused):
    set_fused_attn(fused)  # timm's pooling takes masks in another way than PyTorch's fused kernel
    try:
        model = tiny(pool=pool, depth=2, **CLIPS_VOCABULARY).eval()
    finally:
        set_fused_attn(True)
    tokenizer = vmoe.get_tokenizer(model)
    text = tokenizer(["a cat", "two dogs run"])
    features = model.encode_text(text)
    torch.testing.assert_close(model.encode_text(text[:, :8]), features, atol=1e-5, rtol=1e-5)
    noisy = text.clone()
    noisy[noisy == 0] = 77  # whatever stands after the end of the text is not read
    torch.testing.assert_close(model.encode_text(noisy), features)
    exclaimed = tokenizer(["wow!!! cat"])  # "!" has token id 0 inside a word
    changed = exclaimed.clone()
    changed[0, 1] = 320
    assert not torch.allclose(model.encode_text(exclaimed), model.encode_text(changed))


def test_autocast_keeps_the_loss_finite():
    with torch.autocast("cpu", torch.bfloat16):
        loss = ClipLoss()(*tiny(depth=2)(*pairs()))
    loss.backward()
    assert torch.isfinite(loss)


def test_a_result_does_not_depend_on_the_batch():
    model = tiny(depth=2, capacity_factor=0.3).eval()
    image, text = pairs(64)
    with torch.no_grad():
        image_features, text_features, _ = model(image, text)
        for b in (0, 17, 63):
            one = model(image[b : b + 1], text[b : b + 1])
            torch.testing.assert_close(one[0][0], image_features[b], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one[1][0], text_features[b], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(image, text[:5])[0], image_features, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = tiny(depth=1, moe_layers=[0], noise_std=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image, text = pairs()
    for ours, theirs in zip(compiled(image, text), model(image, text)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_mistakes_are_named():
    model = tiny()
    image, text = pairs()
    with pytest.raises(ValueError, match="training takes pairs, got 6 images and 2 texts"):
        model(image, text[:2])
    with pytest.raises(ValueError, match="text has 20 tokens, the model takes 16"):
        model.encode_text(torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="pool must be"):
        tiny(pool="token")
    with pytest.raises(ValueError, match="names \\['sound'\\]"):
        tiny(local_entropy_loss={"sound": 1.0})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_router_takes_both_modalities(preset):
    model = tiny(router_preset=preset, depth=2, num_experts=4, num_selected_experts=1)
    image, text = pairs()
    with vmoe.record_routing(model) as record:
        loss = ClipLoss()(*model(image, text)) + record.auxiliary_loss()
    loss.backward()
    assert model.blocks[1].mlp.experts.fc2.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        together = model(image, text)
        torch.testing.assert_close(together[0], model.encode_image(image, normalize=True), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[1], model.encode_text(text, normalize=True), atol=1e-5, rtol=1e-5)
        # One more pair in the batch, or other words beside a image, change nothing.
        torch.testing.assert_close(model(image[:1], text[:1])[0], together[0][:1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(image, text.flip(0))[0], together[0], atol=1e-5, rtol=1e-5)


def test_losses_are_off_where_the_router_needs_none():
    assert set(tiny().blocks[1].mlp.losses.weights) >= {"z_loss"}
    for router in ("expert_choice", "soft"):
        weights = tiny(router=router).blocks[1].mlp.losses.weights
        assert not any(weights.values())
    assert tiny(router="expert_choice", z_loss=0.1).blocks[1].mlp.losses.weights["z_loss"] == 0.1
    for num_experts in (0, 4):
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_expert'"):
            tiny(num_experts=num_experts, num_expert=3)


def test_a_preset_goes_over_what_the_name_stands_for():
    def layer(**kwargs):
        return vmoe.create_model("limoe_tiny_patch12_48", depth=2, **SMALL_VOCABULARY, **kwargs).blocks[1].mlp

    assert (layer(router_preset="dbrx").num_experts, layer(router_preset="dbrx").num_selected_experts) == (16, 4)
    assert layer(router_preset="dbrx", num_experts=5).num_experts == 5
    weights = layer(router_preset="limoe").losses.weights
    assert weights["text/local_entropy_loss"] == 0.01  # which the preset does not have
    assert weights == layer().losses.weights


def test_expert_choice_keeps_the_exact_capacity():
    model = tiny(depth=2, router="expert_choice", capacity_factor=1.0).eval()
    text = torch.randint(1, 63, (3, 16))
    text[:, 7:] = 63
    with vmoe.record_routing(model) as record:
        model.encode_text(text)
    assert (record.layers["blocks.1.mlp"].load == 3).all()  # ceil(8 words / 8 experts) in each of three texts


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 0},
        {"num_experts": 4, "num_selected_experts": 2, "capacity_factor": 0.7},
        {"num_experts": 4, "group_size": 8},
        {"num_experts": 4, "router": "expert_choice", "capacity_factor": 1.0},
    ],
)
def test_packing_in_training_on_a_cpu_changes_no_result(settings):
    model = tiny(depth=2, **settings).train()
    image, text = torch.randn(5, 3, 48, 48), torch.randint(1, 63, (5, 16))
    text = text.scatter(1, torch.tensor([[2], [15], [1], [7], [7]]), model.eot_token_id)
    assert model.packs(image)
    outcomes = []
    for packs in (True, False):
        model.zero_grad()
        model.packs = lambda x, packs=packs: packs
        torch.manual_seed(1)
        with vmoe.record_routing(model) as record:
            features, words, _ = model(image, text)
            loss = (features * torch.linspace(-1, 1, 128)).sum() + (words**3).sum() + record.auxiliary_loss()
        loss.backward()
        routing = [(call.expert_index, call.kept, call.mask, call.modality) for call in record.layers.values()]
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        outcomes.append((features, words, loss, gradients, routing))
    for own, other in zip(*outcomes):
        torch.testing.assert_close(own, other)


def test_padding_is_packed_only_where_that_helps():
    assert not tiny(depth=2).eval().packs(torch.zeros(1))
    assert not tiny(depth=2, drop_path_rate=0.1).train().packs(torch.zeros(1))

import pytest
import torch
from timm.layers import set_fused_attn

import vmoe
from vmoe.models.text import POOLS, TextTransformer, text_mask

TINY = {"vocab_size": 50, "context_length": 8, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
EOT = 49


def tiny(**kwargs) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(**{**TINY, "num_experts": 4, "eot_token_id": EOT, **kwargs})


def texts() -> torch.Tensor:
    """Three texts of 3, 8 and 5 tokens with their end."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, EOT, (3, 8), generator=generator)
    for row, length in enumerate((3, 8, 5)):
        text[row, length - 1] = EOT
        text[row, length:] = 0
    return text


def test_mask_ends_with_the_first_end_of_text():
    text = torch.tensor([[5, EOT, 7, EOT], [1, 2, 3, 4]])
    assert text_mask(text, EOT).tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_over_real_tokens(pool):
    model = tiny(pool=pool, num_classes=0).eval()
    text = texts()
    pooled = model(text)
    x, mask = model.forward_features(text)
    for b, length in enumerate((3, 8, 5)):
        words = x[b, :length]
        if pool == "map":
            expected = model.attn_pool(words[None])[0]
        else:
            expected = {"last": words[-1], "first": words[0], "gap": words.mean(0), "gmp": words.amax(0)}[pool]
        torch.testing.assert_close(pooled[b], expected, atol=1e-5, rtol=1e-5)
        assert mask[b].sum() == length


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("fused", [True, False])
def test_padding_changes_nothing(pool, fused):
    set_fused_attn(fused)  # timm's own attention takes masks in another way than PyTorch's fused kernel
    try:
        model = tiny(pool=pool).eval()
    finally:
        set_fused_attn(True)
    text = texts()
    features = model(text)
    noisy = torch.where(text_mask(text, EOT), text, 7)
    torch.testing.assert_close(model(noisy), features)
    torch.testing.assert_close(model(text[:1, :3]), features[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(text[2:]), features[2:], atol=1e-5, rtol=1e-5)  # whoever else is in the batch
    changed = text.clone()
    changed[0, 1] = (changed[0, 1] + 1) % EOT
    assert not torch.allclose(model(changed)[0], features[0])


@pytest.mark.parametrize("pool", POOLS)
def test_without_an_end_of_text_every_position_is_read(pool):
    model = tiny(pool=pool, eot_token_id=None).eval()
    text = texts()
    changed = text.clone()
    changed[0, -1] = 3  # far behind the first end-of-text token
    assert not torch.allclose(model(changed)[0], model(text)[0])
    with vmoe.record_routing(model) as record:
        model(text)
    assert record.layers["blocks.1.mlp"].mask.all()


def test_padding_is_not_routed():
    model = tiny()
    with vmoe.record_routing(model) as record:
        model(texts())
    routing = record.layers["blocks.1.mlp"]
    assert routing.mask.sum() == 3 + 8 + 5
    assert set(routing.load_by_modality) == {"text"}


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_other_routers_keep_texts_apart(router):
    model = tiny(router=router).eval()
    text = texts()
    torch.testing.assert_close(model(text[:1]), model(text)[:1], atol=1e-5, rtol=1e-5)
    noisy = torch.where(text_mask(text, EOT), text, 7)
    torch.testing.assert_close(model(noisy), model(text), atol=1e-5, rtol=1e-5)


def test_positions_and_qk_norm():
    without = tiny(pos_embed="none", pool="gap", eot_token_id=None).eval()
    text = texts()
    torch.testing.assert_close(without(text.flip(1)), without(text), atol=1e-5, rtol=1e-5)
    model = tiny(qk_norm=True, pool="map")
    names = {name for name in model.state_dict() if "_norm." in name}
    owners = ("blocks.0.attn", "blocks.1.attn", "attn_pool")
    assert names == {f"{owner}.{which}_norm.weight" for owner in owners for which in "qk"}
    before = model.eval()(text)
    with torch.no_grad():  # scaled queries and keys are normed away, up to the norm's epsilon
        model.blocks[0].attn.qkv.weight[:32] *= 100
        model.blocks[0].attn.qkv.bias[:32] *= 100
    torch.testing.assert_close(model(text), before, atol=2e-3, rtol=1e-2)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="pool must be one of"):
        tiny(pool="avg")
    with pytest.raises(ValueError, match="pos_embed must be 'learn' or 'none' for text, got 'sincos2d'"):
        tiny(pos_embed="sincos2d")
    with pytest.raises(ValueError, match="text has 9 tokens, the model takes 8"):
        tiny()(torch.ones(1, 9, dtype=torch.long))
    for num_experts in (0, 4):
        with pytest.raises(TypeError, match="unexpected keyword argument 'num_expert'"):
            tiny(num_experts=num_experts, num_expert=3)
    assert tiny(num_experts=0)(texts()).isfinite().all()

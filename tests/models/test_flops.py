import open_clip
import timm
import torch

import vmoe
from vmoe.models.flops import count_parameters, forward_flops, model_profile

T, D, H, E = 37, 128, 512, 8  # tokens (36 patches and the class token), width, hidden width, experts of the tiny model


def tiny(**kwargs):
    return timm.create_model("vmoe_tiny_patch8_48", num_classes=10, **kwargs)


def test_dense_model_equals_the_hand_count():
    attention = 2 * T * D * 3 * D + 2 * T * D * D + 2 * 2 * T * T * D
    by_hand = 2 * 36 * (3 * 8 * 8) * D + 6 * (attention + 2 * 2 * T * D * H) + 2 * D * 10
    assert model_profile(tiny(num_experts=0))["gflops_per_image"] == by_hand / 1e9


def test_experts_count_each_routed_row_once():
    dense = model_profile(tiny(num_experts=0))["gflops_per_image"]
    gates = 3 * 2 * T * D * E
    for k in (1, 2):
        sparse = model_profile(tiny(num_selected_experts=k))["gflops_per_image"]
        assert round((sparse - dense) * 1e9) == gates + 3 * (k - 1) * 2 * 2 * T * D * H


def test_pooling_by_attention_counts_its_products():
    pooled, plain = (
        model_profile(tiny(num_experts=0, global_pool=pool))["gflops_per_image"] for pool in ("map", "avg")
    )
    latent = 2 * 2 * D * D + 2 * 2 * D * H  # one query, its output and MLP
    assert round((pooled - plain) * 1e9) == latent + 2 * 36 * D * 2 * D + 2 * 2 * 36 * D


def test_attention_of_open_clips_models_counts_its_products():
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    model = open_clip.CLIP(32, vision, {"context_length": 16, "vocab_size": 99, "width": 48, "heads": 4, "layers": 2})
    by_hand = (
        2 * 16 * 3 * 8 * 8 * 64 + 2 * (2 * 17 * 64 * 4 * 64 + 4 * 17 * 17 * 64 + 2 * 2 * 17 * 64 * 256) + 2 * 64 * 32
    )
    with torch.no_grad():
        assert forward_flops(lambda: model.eval().encode_image(torch.zeros(1, 3, 32, 32))) == by_hand


def test_grouped_matrix_multiplication_counts_each_row_once():
    counted = forward_flops(
        lambda: torch.nn.functional.grouped_mm(
            torch.zeros(48, 32, dtype=torch.bfloat16),
            torch.zeros(3, 32, 16, dtype=torch.bfloat16),
            offs=torch.tensor([16, 32, 48], dtype=torch.int32),
        )
    )
    assert counted == 2 * 48 * 32 * 16


def test_dropped_rows_cost_nothing():
    roomy, tight = tiny(), tiny(eval_capacity_factor=0.5)
    tight.load_state_dict(roomy.state_dict())
    assert model_profile(tight)["gflops_per_image"] < model_profile(roomy)["gflops_per_image"]


def test_active_parameters_hold_k_of_e_experts():
    expert = D * H + H + H * D + D
    dense_total, dense_active = count_parameters(tiny(num_experts=0))
    assert dense_total == dense_active
    total, active = count_parameters(tiny(num_selected_experts=2))
    assert total == dense_total + 3 * ((E - 1) * expert + E * D)
    assert active == dense_active + 3 * (expert + E * D)


def test_contrastive_model_has_both_sides():
    model = vmoe.create_model("limoe_tiny_patch8_48", depth=2).train()
    profile = model_profile(model)
    assert set(profile) == {"parameters_total", "parameters_active", "gflops_per_image", "gflops_per_text"}
    assert 0 < profile["gflops_per_text"] < profile["gflops_per_image"]
    assert model.training


def test_active_parameters_of_the_other_routers():
    expert = D * H + H + H * D + D
    total, active = count_parameters(tiny(router="expert_choice", capacity_factor=1.5))
    assert total - active == 3 * (E - 1.5) * expert
    total, active = count_parameters(tiny(router="soft"))
    assert total == active
    total, active = count_parameters(tiny(router_preset="deepseek"))  # the shared expert is always active
    routed = 3 * D * H + 2 * H + D  # SwiGLU
    assert total - active == 3 * (E - 2) * routed


def test_the_meta_device_counts_the_same():
    image, text = {"depth": 2}, {"depth": 2, "vocab_size": 64, "eot_token_id": 63}
    for name, kwargs in {
        "vmoe_tiny_patch8_48": image,
        "softmoe_tiny_patch8_48": image,
        "limoe_tiny_patch8_48": text,
        "two_tower_tiny_patch8_48": {"image": image, "text": text},
    }.items():
        with torch.device("meta"):
            model = vmoe.create_model(name, **kwargs)
        assert model_profile(model) == model_profile(vmoe.create_model(name, **kwargs)), name

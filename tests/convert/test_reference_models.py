"""Configs and weights both ways, over random configs; what cannot be converted says so."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.convert import CheckpointError, ConfigError, from_reference, reference_config, to_reference
from vmoe.convert.layout import zoom_positions


@st.composite
def routers(draw, tokens, experts):
    kind = draw(st.sampled_from(["top_k", "choice", "soft"]))
    if kind == "soft":
        slots = draw(st.sampled_from([{"num_slots": 2}, {"capacity_factor": 1.3}, {}]))
        slots = slots if slots or tokens >= experts else {"num_slots": 1}
        return {"name": "SoftRouter", "noise_std": draw(st.sampled_from([0.0, 0.5])), **slots}
    dispatcher = {"name": "einsum"} | draw(
        st.sampled_from(
            [
                {"capacity": 2},
                {"capacity_factor": 0.7},
                {"capacity_factor": 1.5, "capacity_ceil_or_round": "ceil", "capacity_multiple_of": None},
                {"capacity_factor": 9.0, "capacity_ceil_or_round": "round", "capacity_multiple_of": 3},
            ]
        )
    )
    if kind == "choice":
        return {"name": "NoisyTopItemsPerExpertRouter", "dispatcher": dispatcher}
    dispatcher["batch_priority"] = draw(st.booleans())
    dispatcher["name"] = draw(st.sampled_from(["einsum", "indices"]))
    weights = draw(st.sampled_from([{}, {"gshard_loss_weight": 0.1, "load_loss_weight": 0.0}]))
    return {"num_selected_experts": draw(st.integers(1, experts)), "dispatcher": dispatcher, **weights}


@st.composite
def encoders(draw, width, tokens, heads):
    depth = draw(st.integers(1, 3))
    encoder = {"num_layers": depth, "mlp_dim": draw(st.sampled_from([7, width, 3 * width + 1])), "num_heads": heads}
    if draw(st.booleans()):
        encoder["attention_qk_norm"] = draw(st.booleans())
    if draw(st.booleans()):
        encoder["dropout_rate"] = 0.0
    layers = draw(st.lists(st.integers(0, depth), max_size=2))
    if layers:
        experts = draw(st.sampled_from([1, 2, 3, 5, 6, 7]))
        moe = {"layers": layers, "num_experts": experts, "group_size": draw(st.sampled_from([tokens, 2 * tokens]))}
        width = draw(st.sampled_from([{}, {"mlp_dim": 10}]))
        encoder["moe"] = {**moe, **width, "router": draw(routers(tokens, experts))}
    return encoder


@st.composite
def vision_configs(draw):
    heads = draw(st.sampled_from([1, 2, 3]))
    width = heads * draw(st.sampled_from([8, 12]))
    classifier = draw(st.sampled_from(["token", "0", "gap", "map"]))
    position = draw(st.sampled_from([None, {"name": "learned"}, {"name": "none"}, {"name": "sincos2d"}]))
    encoder = draw(encoders(width, 4 + (classifier == "token"), heads))
    if position is not None:
        encoder["position_emb"] = position
    config = {"num_classes": draw(st.sampled_from([None, 0, 3])), "hidden_size": width, "encoder": encoder}
    if draw(st.booleans()):
        config["representation_size"] = draw(st.sampled_from([None, 5]))
    return {**config, "patch_size": draw(st.sampled_from([[4, 4], [4, 8]])), "classifier": classifier, "image_size": 8}


@st.composite
def two_tower_configs(draw):
    image = draw(vision_configs())
    image["num_classes"] = 6
    if image["patch_size"] == [4, 8]:
        image["patch_size"] = [4, 4]
    text = {"vocab_size": 9, "num_classes": 6, "hidden_size": 8, "encoder": draw(encoders(8, 5, 2))}
    text["pool_type"] = draw(st.sampled_from(["last", "first", "gap", "gmp", "map"]))
    return {"image": image, "text": text, **draw(st.sampled_from([{}, {"scale_init": 10.0, "bias_init": -10.0}]))}


def random_params(config, context_length=5):
    """Arrays of the reference's names and shapes, without help of the code that reads them back."""
    rng = np.random.default_rng(0)
    arrays = {}

    def put(name, *shape):
        arrays[name] = rng.standard_normal(shape).astype(np.float32)

    def norm(name, width):
        put(f"{name}/scale", width)
        put(f"{name}/bias", width)

    def dense(name, *shape, lead=()):
        put(f"{name}/kernel", *lead, *shape)
        put(f"{name}/bias", *lead, *shape[1:])

    def attention(name, width, heads, qk_norm):
        for part in ("query", "key", "value"):
            put(f"{name}/{part}/kernel", width, heads, width // heads)
            put(f"{name}/{part}/bias", heads, width // heads)
            if qk_norm and part != "value":
                put(f"{name}/{part}_ln/scale", width // heads)
        put(f"{name}/out/kernel", heads, width // heads, width)
        put(f"{name}/out/bias", width)

    def mlp(name, width, hidden, lead=()):
        dense(f"{name}/Dense_0", width, hidden, lead=lead)
        dense(f"{name}/Dense_1", hidden, width, lead=lead)

    def tower(config, prefix, tokens, pool):
        width, encoder = config["hidden_size"], config["encoder"]
        hidden, heads, qk = encoder["mlp_dim"], encoder["num_heads"], encoder.get("attention_qk_norm", False)
        if encoder.get("position_emb", {}).get("name", "learned") == "learned":
            put(f"{prefix}Encoder/posembed_input/pos_embedding", 1, tokens, width)
        moe = encoder.get("moe", {})
        for i in range(encoder["num_layers"]):
            block = f"{prefix}Encoder/encoderblock_{i}"
            norm(f"{block}/LayerNorm_0", width)
            norm(f"{block}/LayerNorm_1", width)
            attention(f"{block}/SelfAttention", width, heads, qk)
            if i not in moe.get("layers", ()):
                mlp(f"{block}/Mlp", width, hidden)
                continue
            E, router = moe["num_experts"], moe["router"]
            mlp(f"{block}/Moe/Mlp", width, moe.get("mlp_dim", hidden), lead=(E,))
            if router.get("name", "").startswith("SoftRouter"):
                slots = router.get("num_slots") or round(moe["group_size"] * router.get("capacity_factor", 1.0) / E)
                put(f"{block}/Moe/Router/mu", width, E, slots)
                put(f"{block}/Moe/Router/scale")
            else:
                put(f"{block}/Moe/Router/dense/kernel", width, E)
        norm(f"{prefix}Encoder/encoder_norm", width)
        if pool == "map":
            put(f"{prefix}MapHead/probe", 1, 1, width)
            attention(f"{prefix}MapHead/MultiHeadDotProductAttention", width, heads, qk)
            norm(f"{prefix}MapHead/LayerNorm", width)
            mlp(f"{prefix}MapHead/Mlp", width, hidden)
        features = width
        if config.get("representation_size"):
            features = config["representation_size"]
            dense(f"{prefix}pre_logits", width, features)
        if config["num_classes"]:
            dense(f"{prefix}head", features, config["num_classes"])

    def image(config, prefix):
        rows, columns = (8 // step for step in config["patch_size"])
        width = config["hidden_size"]
        put(f"{prefix}embedding/kernel", *config["patch_size"], 3, width)
        put(f"{prefix}embedding/bias", width)
        if config["classifier"] == "token":
            put(f"{prefix}cls", 1, 1, width)
        tower(config, prefix, rows * columns + (config["classifier"] == "token"), config["classifier"])

    if "text" not in config:
        image(config, "")
        return arrays
    image(config["image"], "img/")
    text = config["text"]
    put("txt/Embed_0/embedding", text["vocab_size"], text["hidden_size"])
    tower(text, "txt/", context_length, text["pool_type"])
    put("s")
    if config.get("bias_init") is not None:
        put("b")
    return arrays


@settings(max_examples=15, deadline=None)
@given(st.one_of(vision_configs(), vision_configs(), two_tower_configs()))
def test_there_and_back_is_the_same(config):
    params = random_params(config)
    before = copy.deepcopy(config)
    model = from_reference(config, params)
    assert config == before
    back = to_reference(model)
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[name], params[name]) for name in params)
    canonical = reference_config(model)
    again = from_reference(json.loads(json.dumps(canonical)), back)
    assert reference_config(again) == canonical
    assert not model.training
    images = torch.randn(2, 3, 8, 8)
    inputs = (images, torch.randint(9, (2, 5))) if "text" in config else (images,)
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)


VISION = {
    "num_classes": 3,
    "patch_size": [4, 4],
    "hidden_size": 8,
    "classifier": "gap",
    "encoder": {
        "num_layers": 2,
        "mlp_dim": 12,
        "num_heads": 2,
        "moe": {
            "layers": [1],
            "num_experts": 3,
            "group_size": 4,
            "router": {"dispatcher": {"name": "einsum", "capacity_factor": 1.0, "batch_priority": True}},
        },
    },
}
ROUTER, DISPATCHER = "encoder.moe.router", "encoder.moe.router.dispatcher"


def changed(key, value, config=VISION):
    config = copy.deepcopy(config)
    *folders, leaf = key.split(".")
    node = config
    for folder in folders:
        node = node[folder]
    node[leaf] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "MlpMixer", "name = 'MlpMixer' cannot be converted"),
        ("classifier", "cls", "classifier = 'cls' cannot be converted: it must be one of"),
        ("hidden_size", "8", "hidden_size = '8' cannot be converted: it must be a whole number"),
        ("colour", "red", "not known to the converter: colour = 'red'"),
        ("encoder.num_heads", 3, "encoder.num_heads = 3 .* a divisor of hidden_size = 8"),
        ("encoder.dtype", "bfloat16", "encoder.dtype = 'bfloat16' .* torch.autocast"),
        ("encoder.position_emb", {"name": "rope"}, "encoder.position_emb.name = 'rope'"),
        ("encoder.position_emb", 3, "encoder.position_emb must be a dictionary"),
        ("encoder.moe.mlp_dim", "24", "encoder.moe.mlp_dim = '24' .* a whole number"),
        ("encoder.moe.layers", "last2", "encoder.moe.layers = 'last2'"),
        ("encoder.moe.ensemble_size", 2, "ensemble_size = 2 .* a divisor of num_experts = 3"),
        ("encoder.moe.ensemble_size", 3, "ensemble_size = 3 .* a divisor of group_size = 4"),
        ("encoder.moe.ensemble_size", 0, "ensemble_size = 0 .* a whole number >= 1"),
        (f"{ROUTER}.name", "kl.KLRouter", "encoder.moe.router.name = 'kl.KLRouter'"),
        (f"{ROUTER}.name", "other.module.SoftRouter", "cannot be converted: it must be one of"),
        (f"{ROUTER}.name", "SoftRouter(num_slots=3)", "with its arguments as keys beside it"),
        ("encoder.dropout_rate", None, "encoder.dropout_rate = None .* >= 0 and < 1"),
        (f"{ROUTER}.num_selected_experts", 4, r"1\.\.num_experts, 3"),
        (f"{ROUTER}.deterministic", False, "there is no noise outside training here"),
        (f"{DISPATCHER}.name", "magic", "dispatcher.name = 'magic'"),
        (f"{DISPATCHER}.capacity", 3, "either capacity_factor or capacity, got 1.0 and 3"),
        (f"{DISPATCHER}.capacity_factor", None, "either capacity_factor or capacity, got None and None"),
        (f"{DISPATCHER}.capacity_factor", 0.0, "large enough for one token"),
        (f"{DISPATCHER}.capacity_ceil_or_round", "floor", "capacity_ceil_or_round = 'floor'"),
        (f"{DISPATCHER}.batch_priority", "False", "batch_priority = 'False' .* true or false"),
        (f"{DISPATCHER}.capacity_factor", math.inf, "capacity_factor = inf .* a finite number"),
        (f"{DISPATCHER}.capacity_factor", 1e308, "capacity_factor = 1e\\+308"),
        (DISPATCHER, {"name": "einsum", "batch_priority": 0, "capacity": -1}, "dispatcher.capacity = -1 .* >= 1"),
        (ROUTER, {"name": "SoftRouter", "capacity_factor": 0.01}, "router.capacity_factor = 0.01"),
        (ROUTER, {"name": "SoftRouter", "num_slots": 0}, "router.num_slots = 0"),
        (f"{ROUTER}.noise_std", -1, "router.noise_std = -1 .* >= 0"),
        ("encoder.moe", 0, "encoder.moe must be a dictionary, got 0"),
        ("encoder.moe.group_size", 0, "group_size = 0 .* >= 1"),
        ("encoder.moe.num_experts", 10**30, "num_experts = 10+ .* a whole number"),
        ("encoder.dropout_rate", 1.0, "encoder.dropout_rate = 1.0 .* >= 0 and < 1"),
        ("encoder.num_layers", 0, "num_layers = 0 .* >= 1"),
        ("encoder.position_emb", {"name": "sincos2d", "temperature": 0}, "temperature = 0 .* > 0"),
        ("hidden_size", math.inf, "hidden_size = inf .* a whole number >= 1"),
        ("num_classes", -3, "num_classes = -3 .* >= 0"),
        ("image_size", "16", "image_size = '16' .* a whole number >= 1, or two of them"),
        ("image_size", [8, 8, 8], r"image_size = \[8, 8, 8\] .* or two of them"),
        ("image_size", 2, r"image_size = 2 .* at least one patch, \(4, 4\)"),
        ("patch_size", None, "patch_size = None .* or two of them"),
    ],
)
def test_what_cannot_be_converted_names_the_key_and_the_value(key, value, message):
    with pytest.raises(ConfigError, match=message):
        from_reference(changed(key, value), random_params({**VISION, "image_size": 8}))


def test_an_ensemble_there_and_back():
    config = {**VISION, "image_size": 8, "name": "VisionTransformerMoeEnsemble"}
    config = changed("encoder.moe", {**VISION["encoder"]["moe"], "num_experts": 4, "ensemble_size": 2}, config)
    params = random_params(config)
    with pytest.raises(CheckpointError, match=r"Router/dense/kernel has shape \(8, 4\), the model's is \(8, 2, 2\)"):
        from_reference(config, params)
    gate = "Encoder/encoderblock_1/Moe/Router/dense/kernel"
    params[gate] = params[gate].reshape(8, 2, 2)  # as the reference makes an ensemble of a V-MoE
    model = from_reference(config, params)
    back = to_reference(model)
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[name], params[name]) for name in params)
    again = from_reference(json.loads(json.dumps(reference_config(model))), back)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(again(images), model(images))
    with pytest.raises(ConfigError, match=r"num_selected_experts = 3 .* 1\.\.num_experts / ensemble_size, 2"):
        from_reference(changed(f"{ROUTER}.num_selected_experts", 3, config), params)
    with pytest.raises(ConfigError, match=r"encoder.moe.router.name = 'SoftRouter'"):
        from_reference(changed(f"{ROUTER}.name", "SoftRouter", config), params)


def test_an_ensemble_of_one_and_what_ensembles_overlook():
    """The reference's encoder of ensembles has learned positions and no QK norm, whatever its config says."""
    plain = {**VISION, "image_size": 8}
    params = random_params(plain)
    expected = from_reference(plain, params)(images := torch.randn(3, 3, 8, 8))
    named = {**plain, "name": "VisionTransformerMoeEnsemble"}
    config = changed("encoder.moe.ensemble_size", 1, named)
    gate = "Encoder/encoderblock_1/Moe/Router/dense/kernel"
    model = from_reference(config, {**params, gate: params[gate][:, None]})
    assert torch.equal(model(images), expected)
    config = changed("encoder.position_emb", {"name": "sincos2d"}, changed("encoder.attention_qk_norm", True, config))
    assert torch.equal(from_reference(config, params)(images), expected)
    with pytest.raises(ConfigError, match=r"attention_qk_norm = True cannot be converted: it must be false"):
        from_reference({**config, "classifier": "map"}, params)
    with pytest.raises(ConfigError, match=r"the config has no encoder.moe.ensemble_size, which the reference needs"):
        from_reference(named, params)
    with pytest.raises(ConfigError, match=r"encoder.moe.ensemble_size = None .* a whole number >= 1"):
        from_reference(changed("encoder.moe.ensemble_size", None, named), params)


def test_wrong_arguments_name_themselves():
    params = random_params(VISION)
    with pytest.raises(ConfigError, match="image_size = 0 cannot be converted"):
        from_reference({**VISION, "image_size": 8}, params, image_size=0)
    with pytest.raises(CheckpointError, match="params must be a dictionary of arrays, got list"):
        from_reference(VISION, [1])
    params["Encoder/posembed_input/pos_embedding"] = np.zeros(4, np.float32)
    with pytest.raises(CheckpointError, match=r"pos_embedding has shape \(4,\)"):
        from_reference({**VISION, "image_size": 8}, params)


def test_numbers_and_flags_in_other_words():
    config = changed("hidden_size", 8.0, {**VISION, "image_size": 8.0})
    config["encoder"]["moe"]["router"] |= {"deterministic": None}
    config["encoder"] |= {"attention_qk_norm": 0}
    plain = from_reference({**VISION, "image_size": 8}, random_params(VISION))
    assert reference_config(from_reference(config, random_params(VISION))) == reference_config(plain)
    config["encoder"]["moe"]["router"]["dispatcher"]["batch_priority"] = 0
    again = reference_config(from_reference(config, random_params(VISION)))
    assert again["encoder"]["moe"]["router"]["dispatcher"]["batch_priority"] is False


def test_keys_that_the_reference_needs():
    moe = {key: value for key, value in VISION["encoder"]["moe"].items() if key != "group_size"}
    config = changed("encoder.moe", moe)
    with pytest.raises(ConfigError, match="the config has no encoder.moe.group_size, which the reference needs"):
        from_reference(config, random_params(VISION))


def test_weights_that_do_not_fit_are_named():
    params = random_params(VISION)
    params["Encoder/extra"] = params["head/bias"]
    params["head/bias"] = params["head/bias"][:2]
    params["embedding/bias"] = params["embedding/bias"].astype(np.int32)
    del params["Encoder/encoder_norm/bias"]
    with pytest.raises(CheckpointError) as error:
        from_reference(VISION, params)
    for message in (
        "Encoder/encoder_norm/bias is missing",
        "Encoder/extra is not part of the model",
        "head/bias has shape (2,), the model's is (3,)",
        "embedding/bias is of type int32",
    ):
        assert message in str(error.value)
    with pytest.raises(CheckpointError, match=r"params holds no weights of a V-MoE .* it holds conv1/kernel"):
        from_reference(VISION, {"conv1/kernel": np.zeros(3)})


def test_nested_and_prefixed_parameters_and_other_types():
    params = random_params(VISION)
    model = from_reference(VISION, params)
    nested: dict = {"params": {}, "step": np.int32(3)}
    for name, array in params.items():
        node = nested["params"]
        *folders, leaf = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = torch.tensor(array).bfloat16() if leaf == "scale" else array.astype(np.float64)
    other = from_reference(VISION, nested)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-2, atol=0)
        assert other.state_dict()[name].dtype == torch.float32


def config_dict(values):
    """Like ml_collections' ConfigDict, which is no dictionary."""
    return SimpleNamespace(to_dict=lambda: values)


def test_config_objects():
    params = random_params(VISION)
    config = config_dict({**VISION, "encoder": config_dict(VISION["encoder"])})
    assert reference_config(from_reference(config, params)) == reference_config(from_reference(VISION, params))


# --- image sizes -----------------------------------------------------------------------------------------------------


def scipy_zoom(grid, size):
    """scipy.ndimage.zoom(..., order=1), which the reference calls, for one row; computed with numpy.interp."""
    position = np.arange(size) * ((len(grid) - 1) / (size - 1))
    return np.interp(position, np.arange(len(grid)), grid)


def test_positions_are_zoomed_like_the_references():
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((1, 17, 3)).astype(np.float32)
    ours = zoom_positions(positions, (4, 4), (6, 3))
    assert np.array_equal(ours[:, :1], positions[:, :1])
    grid = positions[0, 1:].reshape(4, 4, 3)
    rows = np.stack([[scipy_zoom(grid[:, j, d], 6) for d in range(3)] for j in range(4)])  # (4, 3, 6)
    both = np.stack([[scipy_zoom(rows[:, d, i], 3) for d in range(3)] for i in range(6)])  # (6, 3, 3)
    np.testing.assert_allclose(ours[0, 1:].reshape(6, 3, 3), both.transpose(0, 2, 1), atol=1e-6)
    # Corners and constants stay.
    positions = np.arange(225, dtype=np.float32).reshape(1, 225, 1)
    zoomed = zoom_positions(positions, (15, 15), (26, 26)).reshape(26, 26)
    assert [zoomed[i, j] for i in (0, -1) for j in (0, -1)] == [0, 14, 210, 224]
    assert np.array_equal(zoom_positions(np.ones((1, 9, 2)), (3, 3), (1, 5)), np.ones((1, 5, 2)))


def test_another_image_size():
    params = random_params({**VISION, "classifier": "token"})
    config = {**VISION, "classifier": "token", "image_size": 16}
    model = from_reference(config, params)
    zoomed = zoom_positions(params["Encoder/posembed_input/pos_embedding"], (2, 2), (4, 4))
    assert np.array_equal(model.pos_embed.detach(), zoomed)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert from_reference({**config, "image_size": 8}, params, image_size=16).pos_embed.shape == (1, 17, 8)


def test_another_grid_of_as_many_patches():
    params = random_params({**VISION, "classifier": "token"})
    config = {**VISION, "classifier": "token"}
    positions = params["Encoder/posembed_input/pos_embedding"]
    wide = zoom_positions(positions, (2, 2), (1, 4))
    assert not np.array_equal(wide, positions)
    for own in ({}, {"image_size": 8}, {"image_size": 12}):
        model = from_reference({**config, **own}, params, image_size=(4, 16))
        assert np.array_equal(model.pos_embed.detach(), wide)
    model = from_reference({**config, "image_size": [4, 16]}, params)  # what the config says of the checkpoint
    assert np.array_equal(model.pos_embed.detach(), positions)
    back = from_reference({**config, "image_size": [4, 16]}, params, image_size=8)
    assert np.array_equal(back.pos_embed.detach(), zoom_positions(positions, (1, 4), (2, 2)))


def test_positions_that_are_no_square_need_an_image_size():
    params = random_params({**VISION, "classifier": "token"})
    with pytest.raises(CheckpointError, match="cannot be resized: 5 position embeddings .* without a class token"):
        from_reference(VISION, params, image_size=16)
    params = random_params(VISION)
    params["Encoder/posembed_input/pos_embedding"] = np.zeros((1, 6, 8), np.float32)
    with pytest.raises(ConfigError, match="image_size is not in the config and cannot be inferred from .* 6 patches"):
        from_reference(VISION, params)
    assert from_reference({**VISION, "image_size": [8, 12]}, params).patch_embed.grid_size == (2, 3)


def test_any_image_size_without_learned_positions():
    config = changed("encoder.position_emb", {"name": "sincos2d"})
    model = from_reference(config, random_params(config))
    for size in (8, 12):
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)

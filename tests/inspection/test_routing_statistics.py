"""Routing statistics against direct computations on tiny models."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmoe
from vmoe.data import BadSample, ImageDataset, LoaderConfig, build_transform
from vmoe.data.dataset import Sample
from vmoe.evaluation.inference import changed
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.inspection.accumulate import Agreement, ModalityTokens
from vmoe.inspection.forward import sparse_layers, token_decoder
from vmoe.inspection.information import normalized_mutual_information
from vmoe.inspection.routing_statistics import gather_statistics, route_images, sample_routing
from vmoe.models.factory import preprocess_config, save_pretrained
from vmoe.models.text import text_mask
from vmoe.utils.config import ConfigError

CLASSES = ["red", "green", "blue"]
CAPTIONS = [
    "a red apple",
    "skyscrapers",
    "the blue sea",
    "a green green frog",
    "apple",
    "one more",
    "a sea",
    "x",
    "frog",
]
NUM = len(CAPTIONS)
SMALL = {"depth": 4, "num_heads": 2, "num_experts": 4}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, **SMALL}


def batches(size, on_bad="fail"):
    return LoaderConfig(batch_size=size, num_workers=0, on_bad=on_bad)


LIMOE = {"img_size": 16, "patch_size": 4, "width": 32, "embed_dim": 16, "context_length": 8, **SMALL}


class Images(ImageDataset):
    """Random images with labels, captions, both or neither; some may be broken."""

    def __init__(self, labels=True, captions=False, broken=(), image_ids=None):
        pixels = np.random.default_rng(0).integers(0, 255, (NUM, 16, 16, 3), dtype=np.uint8)
        self.images = [Image.fromarray(own) for own in pixels]
        self.classes = CLASSES if labels else None
        self.has_captions = captions
        self.broken = broken
        self.image_ids = image_ids
        if image_ids is not None:
            self.images = [self.images[image_ids.index(own)] for own in image_ids]

    @property
    def captions(self):
        return CAPTIONS if self.has_captions else None

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        if index in self.broken:
            raise BadSample(f"{index}.png", "is broken")
        label = index % 3 if self.classes else None
        return Sample(self.images[index], label, CAPTIONS[index] if self.has_captions else None, f"{index}.png")


def load(model, folder, **extra):
    """The model with all that goes with it; its file is in the folder."""
    file = Path(folder) / "model.safetensors"
    save_pretrained(model, file, extra)
    tokenizer = vmoe.get_tokenizer(model) if hasattr(model, "encode_text") else None
    transform = build_transform(preprocess_config(model), None)
    return LoadedModel(model.eval(), tokenizer, transform, torch.device("cpu"), "float32", "a run", file)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, num_selected_experts=2, **VIT)
    return load(model, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def limoe(tmp_path_factory):
    torch.manual_seed(0)
    return load(vmoe.create_model("limoe_tiny_patch8_48", **LIMOE), tmp_path_factory.mktemp("limoe"))


def direct(loaded, dataset):
    """(record of all samples in one call, token ids or None)"""
    images = torch.stack([loaded.transform(dataset[i].image) for i in range(len(dataset))])
    with torch.no_grad(), vmoe.record_routing(loaded.model) as record:
        if loaded.tokenizer is None:
            loaded.model(images)
            return record, None
        ids = loaded.tokenizer(CAPTIONS)
        loaded.model(images, ids)
    return record, ids


@pytest.mark.parametrize("factor", [None, 0.7])
def test_sums_of_a_classifier_are_those_of_a_direct_computation(classifier, factor):
    dataset = Images()
    with changed(sparse_layers(classifier).values(), eval_capacity_factor=factor):
        record, _ = direct(classifier, dataset)
        found = gather_statistics(classifier, dataset, batches(NUM))  # one batch: a drop depends on the others
    assert [layer.name for layer in found.layers] == list(record.layers) == ["blocks.1.mlp", "blocks.3.mlp"]
    for layer in found.layers:
        call = record.layers[layer.name]
        gates = call.tokens(call.gates).double()
        expert, kept = call.tokens(call.expert_index), call.tokens(call.kept)
        asked_E, kept_E = [0] * 4, [0] * 4
        table_EC = np.zeros((4, 3), int)
        for b, t, k in np.ndindex(*expert.shape):
            e = int(expert[b, t, k])
            asked_E[e] += 1
            kept_E[e] += int(kept[b, t, k])
            table_EC[e, b % 3] += int(kept[b, t, k])
        assert layer.tokens == {"image": NUM * 17}  # 16 patches and the class token
        assert layer.asked["image"].tolist() == asked_E
        assert layer.kept["image"].tolist() == kept_E
        assert (layer.expert_class == table_EC).all()
        np.testing.assert_allclose(layer.importance["image"], gates.sum((0, 1)).numpy(), rtol=1e-12)
        entropy = -(gates * gates.log()).sum(-1).mean().item()
        assert layer.entropy["image"] == pytest.approx(entropy, rel=1e-12)
        assert layer.share_dropped["image"] == pytest.approx(1 - sum(kept_E) / sum(asked_E))
        assert (layer.share_dropped["image"] > 0) == (factor is not None)
        assert layer.eval_capacity_factor == factor
    assert found.texts_from is None
    assert found.num_samples == NUM


def test_text_tokens_and_patches_of_a_limoe_are_counted_apart(limoe):
    dataset = Images(labels=False, captions=True)
    record, ids = direct(limoe, dataset)
    real = text_mask(ids, limoe.tokenizer.eot_token_id)
    found = gather_statistics(limoe, dataset, batches(4))
    assert found.texts_from == "captions"
    assert found.modalities == ["image", "text"]
    names = token_decoder(limoe.tokenizer)
    for layer in found.layers:
        call = record.layers[layer.name]
        assert layer.tokens == {"image": NUM * 16, "text": int(real.sum())}
        for modality in ("image", "text"):
            assert layer.kept[modality].tolist() == call.load_by_modality[modality].tolist()
            gate = call.tokens(call.gates)[:, :16] if modality == "image" else call.tokens(call.gates)[:, 16:][real]
            np.testing.assert_allclose(
                layer.importance[modality], gate.double().flatten(0, -2).sum(0).numpy(), rtol=1e-6
            )
            assert layer.entropy[modality] == pytest.approx(call.metrics[f"{modality}/gate_entropy"].item(), rel=1e-5)
        words = Counter()
        expert = call.tokens(call.expert_index)[:, 16:, 0]
        for b, t in np.argwhere(real.numpy()):
            words[names([int(ids[b, t])])[0], int(expert[b, t])] += 1
        assert {
            (word, e): n for word, own in layer.expert_token.items() for e, n in enumerate(own.tolist()) if n
        } == words
        assert layer.expert_class is None
    assert "sky…" in found.layers[0].expert_token
    assert sum(found.layers[0].expert_token["apple"]) == 2


@pytest.mark.parametrize("captions", [False, True])
def test_batches_make_no_difference_where_nothing_is_dropped(limoe, captions):
    results = [gather_statistics(limoe, Images(captions=captions), batches(size)) for size in (1, 4)]
    for other in results[1:]:
        for ours, theirs in zip(results[0].layers, other.layers, strict=True):
            for modality in ours.tokens:
                assert ours.tokens[modality] == theirs.tokens[modality]
                assert (ours.kept[modality] == theirs.kept[modality]).all()
                np.testing.assert_allclose(ours.importance[modality], theirs.importance[modality], rtol=1e-6)
            assert (ours.expert_class == theirs.expert_class).all()
            assert {word: own.tolist() for word, own in ours.expert_token.items()} == {
                word: own.tolist() for word, own in theirs.expert_token.items()
            }
            for one, two in zip(ours.typical_patches, theirs.typical_patches, strict=True):
                assert [(p.sample, p.row, p.column) for p in one] == [(p.sample, p.row, p.column) for p in two]
        for modality, matrix in results[0].agreement.items():
            np.testing.assert_allclose(matrix, other.agreement[modality], atol=1e-12)


def test_typical_patches_are_the_largest_gate_values_one_per_image(classifier):
    dataset = Images()
    record, _ = direct(classifier, dataset)
    found = gather_statistics(classifier, dataset, batches(2), num_patches=3)
    total = 0
    for layer in found.layers:
        call = record.layers[layer.name]
        gates, expert = call.tokens(call.gates)[:, 1:].numpy(), call.tokens(call.expert_index)[:, 1:].numpy()
        for e, patches in enumerate(layer.typical_patches):
            best = sorted(-np.where((expert[b] == e).any(-1), gates[b, :, e], 0).max() for b in range(NUM))[:3]
            assert [patch.weight for patch in patches] == pytest.approx([-w for w in best if w], rel=1e-5)
            assert len({patch.sample for patch in patches}) == len(patches)
            total += len(patches)
            for patch in patches:
                assert e in expert[patch.sample, patch.row * 4 + patch.column]
                whole = np.array(classifier.transform.geometry(dataset[patch.sample].image))
                own = whole[patch.row * 4 : patch.row * 4 + 4, patch.column * 4 : patch.column * 4 + 4]
                assert (patch.pixels == own).all()
    assert total > 12


def test_captions_of_one_image_give_one_typical_patch(limoe):
    ids = [f"image {i // 3}" for i in range(NUM)]
    found = gather_statistics(limoe, Images(captions=True, image_ids=ids), batches(2))
    for own in found.layers[0].typical_patches:
        assert {patch.sample for patch in own} <= {0, 3, 6}


def test_limited_capacity_is_for_this_call_only(classifier):
    layers = sparse_layers(classifier).values()
    before = [layer.settings for layer in layers]
    found = gather_statistics(classifier, Images(), eval_capacity_factor=0.5, batch_priority=True)
    assert found.layers[0].eval_capacity_factor == 0.5
    assert found.layers[0].batch_priority
    assert found.layers[0].share_dropped["image"] > 0.4
    assert (found.layers[0].kept["image"] <= found.layers[0].asked["image"]).all()
    with pytest.raises(BadSample):
        gather_statistics(classifier, Images(broken=[4]), eval_capacity_factor=0.5)
    assert [layer.settings for layer in layers] == before
    assert gather_statistics(classifier, Images()).layers[0].share_dropped["image"] == 0


def test_bad_samples_are_skipped_and_counted(classifier):
    found = gather_statistics(classifier, Images(broken=[0, 4]), batches(4, "skip"), num_images=NUM)
    assert (found.num_samples, found.num_skipped) == (NUM - 2, 2)
    assert found.sample_index == [1, 2, 3, 5, 6, 7, 8]
    assert found.layers[0].tokens["image"] == (NUM - 2) * 17
    with pytest.raises(ValueError, match="no image was read"):
        gather_statistics(classifier, Images(broken=range(NUM)), batches(4, "skip"))


def test_without_captions_the_class_names_are_the_texts(limoe):
    found = gather_statistics(limoe, Images(), templates=["{}", "a {}"])
    assert found.texts_from == "class names"
    layer = found.layers[0]
    assert layer.expert_token["red"].sum() == 2
    assert layer.expert_token["a"].sum() == 3
    assert layer.expert_class.sum() == layer.kept["image"].sum() == NUM * 16
    assert found.samples[0].text == []
    assert {name for name, _ in found.samples[0].top_classes} == set(CLASSES)
    bare = gather_statistics(limoe, Images(labels=False))
    assert (bare.texts_from, bare.modalities, bare.samples[0].top_classes) == (None, ["image"], [])


def test_images_are_spaced_evenly_and_complete(limoe):
    dataset = Images(captions=True)
    record, ids = direct(limoe, dataset)
    found = gather_statistics(limoe, dataset, batches(4), num_images=3)
    assert found.sample_index == [0, 4, 8]
    call = record.layers["blocks.3.mlp"]
    expert, weight = call.tokens(call.expert_index).numpy(), call.tokens(call.combine_weights).numpy()
    for index, sample in zip(found.sample_index, found.samples, strict=True):
        assert (sample.image == np.array(dataset.images[index])).all()
        assert (sample.path, sample.label, sample.caption) == (f"{index}.png", index % 3, CAPTIONS[index])
        assert sample.patches[1].expert.shape == (4, 4, 1)
        assert (sample.patches[1].expert.reshape(16, 1) == expert[index, :16]).all()
        real = int(text_mask(ids, limoe.tokenizer.eot_token_id)[index].sum())
        assert len(sample.text_tokens) == real == len(sample.text[1].expert)
        assert sample.text_tokens[0] == "<start_of_text>"
        assert sample.text_tokens[-1] == "<end_of_text>"
        np.testing.assert_allclose(sample.text[1].weight, weight[index, 16 : 16 + real], rtol=1e-5)
        probabilities = [probability for _, probability in sample.top_classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
    scores = vmoe.zero_shot_classify(limoe.model, limoe.tokenizer, [dataset.images[4]], CLASSES)[0]
    assert dict(found.samples[1].top_classes) == pytest.approx(dict(zip(CLASSES, scores.tolist())), rel=1e-4)
    assert gather_statistics(limoe, dataset, num_images=0).samples == []


def test_pairs_without_classes_are_named_by_the_captions(limoe):
    found = gather_statistics(limoe, Images(labels=False, captions=True), num_images=2, num_patches=0)
    assert all(layer.typical_patches == [[]] * 4 for layer in found.layers)
    assert {name for name, _ in found.samples[0].top_classes} == {CAPTIONS[0], CAPTIONS[-1]}
    assert found.class_names is None


def test_a_classifier_names_images_by_its_own_classes(tmp_path):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, **VIT)
    loaded = load(model, tmp_path, class_names=["ours", "theirs"])
    found = gather_statistics(loaded, Images(), num_images=1)
    assert {name for name, _ in found.samples[0].top_classes} == {"ours", "theirs"}
    probabilities = model(loaded.transform(Images().images[0])[None]).softmax(1)[0].tolist()
    assert dict(found.samples[0].top_classes) == pytest.approx(dict(zip(["ours", "theirs"], probabilities)), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "expert_choice"},
        {"router": "soft"},
        {"num_shared_experts": 1},
        {"num_selected_experts": 4},
        {"num_selected_experts": 2, "normalize_weights": True, "group_size": 7},
    ],
)
@pytest.mark.parametrize("name", ["vmoe_tiny_patch8_48", "limoe_tiny_patch8_48"])
def test_every_kind_of_routing(tmp_path, settings, name):
    torch.manual_seed(0)
    kwargs = {**VIT, "num_classes": 3} if name.startswith("vmoe") else LIMOE
    if settings.get("router") == "soft":
        settings = {"num_slots": 2, **settings}
    loaded = load(vmoe.create_model(name, **{**kwargs, **settings}), tmp_path)
    dataset = Images(captions=name.startswith("limoe"))
    record, _ = direct(loaded, dataset)
    found = gather_statistics(loaded, dataset, batches(4))
    K = settings.get("num_selected_experts", 1)
    for layer in found.layers:
        call = record.layers[layer.name]
        per_token = layer.router == "top_k"
        assert layer.num_selected_experts == (K if per_token else 4)
        for modality, tokens in layer.tokens.items():
            if layer.router == "soft":
                assert layer.kept[modality].sum() == pytest.approx(tokens, rel=1e-5)
                np.testing.assert_allclose(layer.kept[modality], layer.importance[modality], rtol=1e-5)
            else:
                assert layer.kept[modality].tolist() == call.load_by_modality[modality].tolist()
                metric = "share_dropped" if call.modality is None else f"{modality}/share_dropped"
                assert layer.share_dropped[modality] == pytest.approx(call.metrics[metric].item(), abs=1e-6)
            assert 0 <= layer.entropy[modality] <= math.log(4) + 1e-9
        assert layer.expert_class.sum() == pytest.approx(layer.kept["image"].sum())
        if "text" in layer.tokens:
            assert sum(own.sum() for own in layer.expert_token.values()) == pytest.approx(layer.kept["text"].sum())
    assert found.samples[0].patches[0].expert.shape == (4, 4, K if found.layers[0].router == "top_k" else 4)
    assert sum(len(own) for own in found.layers[0].typical_patches) > 4


def test_two_towers_have_layers_of_one_modality_each(tmp_path):
    torch.manual_seed(0)
    sizes = {"depth": 2, "num_heads": 2, "num_experts": 4}
    model = vmoe.create_model(
        "two_tower_tiny_patch8_48",
        image={"img_size": 16, "patch_size": 4, "embed_dim": 32, **sizes},
        text={"width": 32, "context_length": 8, **sizes, "num_experts": 3},
    )
    found = gather_statistics(load(model, tmp_path), Images(captions=True), batches(4))
    assert [(layer.name, list(layer.tokens)) for layer in found.layers] == [
        ("visual.blocks.1.mlp", ["image"]),
        ("text.blocks.1.mlp", ["text"]),
    ]
    assert np.isnan(found.agreement["image"]).tolist() == [[False, True], [True, True]]
    assert np.isnan(found.agreement["text"]).tolist() == [[True, True], [True, False]]
    image, text = found.layers
    assert not image.expert_token
    assert text.expert_class is None
    assert text.typical_patches == [[], [], []]
    sample = found.samples[0]
    assert sample.patches[1] is None
    assert sample.text[0] is None
    assert sample.text[1].expert.shape == (len(sample.text_tokens), 1)


def test_upcycled_models_of_timm_and_open_clip(tmp_path):
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    torch.manual_seed(0)
    dense = vmoe.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=3, depth=4)
    sparse = vmoe.upcycle(dense, num_experts=4, layers="last2")
    found = gather_statistics(load(sparse, tmp_path), Images())
    assert [layer.name for layer in found.layers] == ["blocks.1.mlp", "blocks.3.mlp"]
    assert found.samples[0].patches[0].expert.shape[:2] == (4, 4)

    text = {"context_length": 9, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    clip = CLIP(16, {"layers": 2, "width": 32, "patch_size": 4, "image_size": 16, "head_width": 16}, text)
    clip = vmoe.upcycle(clip, num_experts=4, layers="last1")
    classifier = load(sparse, tmp_path)
    loaded = classifier._replace(model=clip.eval(), tokenizer=SimpleTokenizer(context_length=9))
    found = gather_statistics(loaded, Images(captions=True), batches(4))
    real = text_mask(loaded.tokenizer(CAPTIONS), loaded.tokenizer.eot_token_id).sum()
    assert found.layers[1].tokens == {"text": int(real)}  # its padding is routed, and not counted
    assert "!" not in found.layers[1].expert_token
    assert found.samples[0].patches[0].expert.shape[:2] == (4, 4)


def test_agreement_is_normalised_mutual_information_of_first_choices(classifier):
    dataset = Images()
    record, _ = direct(classifier, dataset)
    one, other = (call.tokens(call.expert_index)[..., 0].flatten().tolist() for call in record.layers.values())

    def entropy(values):
        return -sum(n / len(one) * math.log(n / len(one)) for n in Counter(values).values())

    shared = entropy(one) + entropy(other) - entropy(zip(one, other))
    matrix = gather_statistics(classifier, dataset, batches(2)).agreement["image"]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(2 * shared / (entropy(one) + entropy(other)), abs=1e-12)
    assert 0 < matrix[0, 1] < 1
    assert np.diag(matrix).tolist() == pytest.approx([1, 1])


def test_relabelled_experts_agree_and_independent_ones_do_not():
    assert normalized_mutual_information(np.array([[0, 5, 0], [9, 0, 0], [0, 0, 2]])) == pytest.approx(1)
    assert normalized_mutual_information(np.array([[2, 4], [3, 6]])) == pytest.approx(0, abs=1e-12)
    assert normalized_mutual_information(np.array([[7, 0], [0, 0]])) == 1
    assert normalized_mutual_information(np.array([[7, 3], [0, 0]])) == 0
    assert 0 < normalized_mutual_information(np.array([[7, 3], [2, 8]])) < 1


def test_one_image_is_routed_as_in_the_whole(limoe, classifier):
    dataset = Images(captions=True)
    whole = gather_statistics(limoe, dataset, num_images=NUM).samples[3]
    [one] = route_images(limoe, [dataset.images[3]], [CAPTIONS[3]], CLASSES)
    assert one.text_tokens == whole.text_tokens
    assert one.caption == CAPTIONS[3]
    for ours, theirs in zip([*one.patches, *one.text], [*whole.patches, *whole.text], strict=True):
        assert (ours.expert == theirs.expert).all()
        np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-5)
    assert one.top_classes[0] == (whole.top_classes[0][0], pytest.approx(whole.top_classes[0][1], rel=1e-4))
    alone = sample_routing(limoe, dataset.images[3])
    assert (alone.text, alone.text_tokens, alone.top_classes) == ([], [], [])
    assert sample_routing(classifier, dataset.images[3]).top_classes[0][0].startswith("class ")
    with pytest.raises(ValueError, match="a run holds a classifier, which reads no text"):
        sample_routing(classifier, dataset.images[3], "red")
    with pytest.raises(ValueError, match="has 3 classes, but 2 names"):
        route_images(classifier, dataset.images[:1], class_names=["a", "b"])


def test_mistakes_are_named(tmp_path, classifier):
    dense = timm.create_model("vmoe_tiny_patch8_48", num_classes=3, **{**VIT, "num_experts": 0})
    loaded = classifier._replace(model=dense, checkpoint="runs/dense")
    with pytest.raises(ConfigError, match="runs/dense holds a dense model"):
        gather_statistics(loaded, Images())
    with pytest.raises(ConfigError, match="runs/dense holds a dense model"):
        sample_routing(loaded, Images().images[0])
    with pytest.raises(ConfigError, match="eval_capacity_factor must be > 0, got 0"):
        gather_statistics(classifier, Images(), eval_capacity_factor=0)
    with pytest.raises(ValueError, match="num_images and num_patches must be >= 0, got -1"):
        gather_statistics(classifier, Images(), num_images=-1)


def test_tokens_are_read_back_by_any_tokenizer():
    class OfHuggingFace:
        all_special_ids = (0,)

        def decode(self, tokens):
            return ["[CLS]", " apple", "##s"][tokens[0]]

    class Wrapper:
        tokenizer = OfHuggingFace()

    assert token_decoder(OfHuggingFace())([0, 1, 2]) == ["[CLS]", "apple", "##s"]
    assert token_decoder(Wrapper())([1]) == ["apple"]
    with pytest.raises(ValueError, match=r"has no decode\(\)"):
        token_decoder(object())


def test_layers_that_see_other_tokens_are_not_compared():
    def tokens(length):
        expert_BTK = np.arange(2 * length).reshape(2, length, 1) % 3
        ones = np.ones(expert_BTK.shape)
        return ModalityTokens(ones[..., 0] > 0, np.ones((2, length, 3)), expert_BTK, ones, ones > 0, ones > 0)

    agreement = Agreement({"a": 3, "b": 3, "c": 3})
    for _ in range(2):
        agreement.add("image", {"a": tokens(4), "b": tokens(2), "c": tokens(4)})
    matrix = agreement.matrices()["image"]
    assert np.isnan(matrix[1]).all()
    assert matrix[0, 2] == pytest.approx(1)


def test_likeliest_names_have_their_indices_among_the_classes(limoe, tmp_path):
    dataset = Images()
    dataset.classes, dataset.prompt_names = ["crane", "crane", "dog"], ["crane bird", "crane machine", "dog"]
    [sample] = gather_statistics(limoe, dataset, num_images=1).samples
    assert sorted(sample.top_labels) == [0, 1, 2]
    assert [dataset.prompt_names[c] for c in sample.top_labels] == [name for name, _ in sample.top_classes]
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, **VIT)
    other = load(model, tmp_path, class_names=["ours", "theirs"])
    assert gather_statistics(other, dataset, num_images=1).samples[0].top_labels == []  # not the data's classes

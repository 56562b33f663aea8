import pytest
import torch
from PIL import Image

from vmoe.evaluation import evaluate_zero_shot, zero_shot_classify
from vmoe.evaluation.zero_shot import resolve_templates

NAMES = [f"number {i}" for i in range(20)]


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_right_and_wrong_labels(word_model, batch_size, make_batches, tokenize):
    labels = [i if i < 15 else 0 for i in range(20)]
    loader = make_batches(list(range(20)), labels=labels, batch_size=batch_size)
    result = evaluate_zero_shot(word_model, tokenize, loader, NAMES, device="cpu")
    assert result["top1"] == 0.75
    assert result["num_samples"] == 20


def test_constant_model_scores_nothing(constant_model, make_batches, tokenize):
    loader = make_batches(list(range(20)), labels=list(range(20)))
    result = evaluate_zero_shot(constant_model, tokenize, loader, NAMES, device="cpu")
    assert result["top1"] == result["top5"] == 0


def test_duplicate_and_empty_names_are_errors(word_model, tokenize):
    with pytest.raises(ValueError, match="given twice: 'number 3'"):
        evaluate_zero_shot(word_model, tokenize, [], [*NAMES, "number 3"], device="cpu")
    with pytest.raises(ValueError, match="name 1 is empty"):
        evaluate_zero_shot(word_model, tokenize, [], ["number 1", " "], device="cpu")


def test_templates(tmp_path):
    def filled(templates):
        return [template("cat") for template in resolve_templates(templates)]

    assert resolve_templates(None) == ["{}"]
    assert filled(["a {}.", "the {0} {}"]) == ["a cat.", "the {0} cat"]
    assert len(filled("openai_imagenet")) == 80
    assert filled("a photo of {}") == ["a photo of cat"]
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}\n\nthe {}\n", encoding="utf-8")
    assert filled(str(file)) == ["a photo of a cat", "the cat"]
    with pytest.raises(ValueError, match=r"'a photo' must contain \{\}"):
        resolve_templates(["a photo"])
    with pytest.raises(ValueError, match=r"'nowhere\.txt': no such file"):
        resolve_templates("nowhere.txt")


def test_equals_open_clip(word_model, tokenize):
    from open_clip import build_zero_shot_classifier

    templates = ["{}", "{}1"]
    images = torch.arange(10).float()[:, None, None, None].expand(-1, 3, 2, 2)
    weights = build_zero_shot_classifier(word_model, tokenize, NAMES, templates)
    expected = (word_model.logit_scale.exp() * word_model.encode_image(images, normalize=True) @ weights).softmax(dim=1)
    for batch_size in (1, 3, 64):
        found = zero_shot_classify(word_model, tokenize, images, NAMES, templates, batch_size=batch_size)
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert found.shape == (10, 20)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(10))


def test_classify_one_picture_as_tensor_file_and_image(tmp_path):
    import vmoe

    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", depth=2, width=32, num_heads=2, embed_dim=16).eval()
    tokenizer = vmoe.get_tokenizer(model)
    picture = Image.effect_noise((60, 80), 90).convert("RGB")
    picture.save(tmp_path / "noise.png")
    by_image = vmoe.zero_shot_classify(model, tokenizer, picture, ["cat", "dog"])
    by_file = vmoe.zero_shot_classify(model, tokenizer, [tmp_path / "noise.png", picture], ["cat", "dog"])
    assert by_image.shape == (1, 2)
    torch.testing.assert_close(by_file, by_image.expand(2, 2))
    (tmp_path / "broken.png").write_bytes((tmp_path / "noise.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.png"):
        vmoe.zero_shot_classify(model, tokenizer, str(tmp_path / "broken.png"), ["cat", "dog"])

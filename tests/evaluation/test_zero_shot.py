import pytest
import torch
from PIL import Image

from vmoe.evaluation import evaluate_zero_shot, zero_shot_classify
from vmoe.evaluation.class_names import prompt_names, published_set
from vmoe.evaluation.zero_shot import resolve_class_names, resolve_templates

NAMES = [f"number {i}" for i in range(20)]


@pytest.mark.parametrize("batch_size", [1, 7, 20])
def test_right_and_wrong_labels(word_model, batch_size, make_batches, tokenize):
    labels = [i if i < 15 else 0 for i in range(20)]
    loader = make_batches(list(range(20)), labels=labels, batch_size=batch_size)
    result = evaluate_zero_shot(word_model, tokenize, loader, NAMES, device="cpu")
    assert result["top1"] == 0.75
    assert result["num_samples"] == 20


def test_duplicate_and_empty_names_are_errors(word_model, tokenize):
    with pytest.raises(ValueError, match="given twice: 'number 3'"):
        evaluate_zero_shot(word_model, tokenize, [], [*NAMES, "number 3"], device="cpu")
    with pytest.raises(ValueError, match="name 1 is empty"):
        evaluate_zero_shot(word_model, tokenize, [], ["number 1", " "], device="cpu")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "class_names must be a list of texts, got 'cat'; write a list"),
        ([["cat", "dog"]], r"class_names must be a list of texts, one for each class, got the entry \['cat', 'dog'\]"),
        (["cat", None], "got the entry None"),
        ({"cat", "dog"}, "class_names must be a list of texts, got {.*}; write a list"),
        (None, "class_names must be a list of texts, got None; write a list"),
    ],
)
def test_class_names_that_are_no_list_of_texts(word_model, tokenize, names, message):
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(word_model, tokenize, [], names, device="cpu")
    if names != "cat":  # the name of a file or of a published set
        with pytest.raises(ValueError, match=message):
            zero_shot_classify(word_model, tokenize, torch.zeros(1, 3, 8, 8), names)
    else:
        with pytest.raises(ValueError, match="class_names 'cat': no such file; .* a list of texts, or one of"):
            zero_shot_classify(word_model, tokenize, torch.zeros(1, 3, 8, 8), names)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (3, "templates must be a list of texts, got 3; write a list"),
        (str.upper, "templates must be a list of texts, got .*; write a list"),
        ([["{}"]], r"template \['{}'\] must be a text with {} for the class name, or a function"),
        ([None], "template None must be a text with {}"),
    ],
)
def test_templates_that_are_no_list_of_texts(templates, message):
    with pytest.raises(ValueError, match=message):
        resolve_templates(templates)


def test_names_that_are_the_same_to_the_tokenizer_are_errors(word_model, tokenize, limoe):
    for names, pair in (
        (["fox", "cat", "dog", "Cat"], "'cat' and 'Cat'"),
        (["red fox", "cat", "red  fox"], "'red fox' and 'red  fox'"),
        (["cat", "very " * 99 + "old", "very " * 99 + "young"], "old' and '.*young'"),
    ):
        for templates in (None, ["a {}", "{}s"]):
            with pytest.raises(ValueError, match=rf"class names .*{pair} are the same to the tokenizer"):
                zero_shot_classify(*limoe, torch.zeros(1, 3, 48, 48), names, templates)
    # One template that tells two names apart is enough.
    tokenizer = limoe[1]
    assert tokenizer(["very " * 99 + "old", "very " * 99 + "young"]).unique(dim=0).shape[0] == 1
    last_word = ["{}", lambda name: name.split()[-1]]
    names = ["very " * 99 + "old", "very " * 99 + "young"]
    assert zero_shot_classify(*limoe, torch.zeros(1, 3, 48, 48), names, last_word).shape == (1, 2)
    with pytest.raises(ValueError, match="'number 1' and 'figure 1' are the same"):
        evaluate_zero_shot(word_model, tokenize, [], ["number 1", "figure 1"], device="cpu")


@pytest.mark.parametrize("template", ["{} " + "very " * 99, "very " * 14 + "{}", lambda name: "very " * 14 + name])
def test_a_template_that_fits_no_name_is_an_error(limoe, template):
    """LIMoE takes 16 tokens here: a text's start and end, and 14 between."""
    with pytest.raises(ValueError, match=r"template '.*\{\}.*' does not fit: .* more than the 16 tokens"):
        zero_shot_classify(*limoe, torch.zeros(1, 3, 48, 48), ["cat", "dog"], ["a {}", template])


def test_prompts_that_are_cut_are_counted_once(limoe, caplog):
    fitting, template = "very " * 12 + "old", "a {}"
    names = [fitting, "very " * 13 + "young", "very " * 14 + "dear"]
    for _ in range(2):
        zero_shot_classify(*limoe, torch.zeros(1, 3, 48, 48), names, [template, "{}"])
    shown = f"a {names[1]}"
    assert [record.getMessage() for record in caplog.records] == [
        f"3 of 6 prompts are longer than the model's context and are cut, such as '{shown}'"
    ]


def test_published_names_in_the_order_of_the_data_keep_their_equal_pairs():
    classes = sorted(prompt_names("imagenet"))
    assert resolve_class_names("imagenet", classes) == classes
    with pytest.raises(ValueError, match="given twice: 'missile'"):
        resolve_class_names([*classes, "one more"])


def test_names_in_another_order_than_the_classes_are_a_warning(tmp_path, caplog):
    file = tmp_path / "names.txt"
    file.write_text("dog\ncat\nred fox\n")
    assert resolve_class_names(str(file), ["cat", "dog", "fox"]) == ["dog", "cat", "red fox"]
    assert "another order than the data's classes: 'cat' is called 'dog', 'dog' is called 'cat'" in caplog.text
    caplog.clear()
    assert resolve_class_names(["zero", "one", "two"], ["2", "0", "1"]) == ["zero", "one", "two"]
    assert not caplog.text
    names = [f"animal {letter}" for letter in "abcdefghijk"]
    resolve_class_names(names, sorted(map(str, range(11))))
    assert "label 0 is '0', 1 is '1', 2 is '10', 3 is '2', 4 is '3', ...; check that class_names" in caplog.text


def test_templates(tmp_path):
    def filled(templates):
        return [template("cat") for template in resolve_templates(templates)]

    assert filled(None) == ["cat"]
    assert filled(["a {}.", "the {0} {}"]) == ["a cat.", "the {0} cat"]
    assert len(filled("openai_imagenet")) == 80
    assert filled("a photo of {}") == ["a photo of cat"]
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}\n\nthe {}\n", encoding="utf-8")
    assert filled(str(file)) == filled(file) == ["a photo of a cat", "the cat"]
    with pytest.raises(ValueError, match=r"'a photo' must be a text with \{\}"):
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


def test_classify_one_image_as_tensor_file_and_image(tmp_path):
    import vmoe

    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", depth=2, width=32, num_heads=2, embed_dim=16).eval()
    tokenizer = vmoe.get_tokenizer(model)
    image = Image.effect_noise((60, 80), 90).convert("RGB")
    image.save(tmp_path / "noise.png")
    by_image = vmoe.zero_shot_classify(model, tokenizer, image, ["cat", "dog"])
    by_file = vmoe.zero_shot_classify(model, tokenizer, [tmp_path / "noise.png", image], ["cat", "dog"])
    assert by_image.shape == (1, 2)
    torch.testing.assert_close(by_file, by_image.expand(2, 2))
    (tmp_path / "broken.png").write_bytes((tmp_path / "noise.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.png"):
        vmoe.zero_shot_classify(model, tokenizer, str(tmp_path / "broken.png"), ["cat", "dog"])


@pytest.fixture(scope="module")
def limoe():
    import vmoe

    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", depth=2, width=32, num_heads=2, embed_dim=16).eval()
    return model, vmoe.get_tokenizer(model)


def _images(count):
    return [Image.effect_noise((50 + index, 40), 90).convert("RGB") for index in range(count)]


def test_images_of_mixed_kinds_in_any_iterable(limoe, tmp_path):
    from vmoe.data import build_transform
    from vmoe.models.factory import preprocess_config

    images = _images(5)
    images[1].save(tmp_path / "one.png")
    transform = build_transform(preprocess_config(limoe[0]), None)
    expected = zero_shot_classify(*limoe, torch.stack([transform(one) for one in images]), ["cat", "dog"])
    mixed = [images[0], tmp_path / "one.png", transform(images[2]), images[3].convert("RGBA"), images[4]]
    for batch_size in (1, 2, 64):
        found = zero_shot_classify(*limoe, (one for one in mixed), ["cat", "dog"], batch_size=batch_size)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert zero_shot_classify(*limoe, str(tmp_path / "one.png"), ["cat", "dog"]).shape == (1, 2)
    assert zero_shot_classify(*limoe, transform(images[0]), ["cat", "dog"]).shape == (1, 2)


def test_files_are_read_as_they_are_needed(limoe, tmp_path):
    """A generator of many files is not drawn out at once."""
    _images(1)[0].save(tmp_path / "one.png")
    drawn = []

    def files():
        for index in range(6):
            drawn.append(index)
            yield tmp_path / ("one.png" if index < 2 else "missing.png")

    with pytest.raises(ValueError, match=r"missing\.png: no such file"):
        zero_shot_classify(*limoe, files(), ["cat", "dog"], batch_size=2)
    assert drawn == [0, 1, 2]


def test_no_images_give_no_rows(limoe):
    for nothing in ([], iter(()), torch.empty(0, 3, 48, 48)):
        assert zero_shot_classify(*limoe, nothing, ["cat", "dog", "fox"]).shape == (0, 3)


def test_what_is_no_image_is_named(limoe):
    for images, error in (
        (torch.zeros(48, 48), r"shape \(3, H, W\), or all of them \(B, 3, H, W\), got \(48, 48\)"),
        (torch.zeros(2, 1, 48, 48), r"got \(1, 48, 48\)"),
        ([torch.zeros(1, 3, 48, 48)], r"got \(1, 3, 48, 48\)"),
        ([torch.zeros(3, 48, 48), torch.zeros(3, 40, 40)], "equal size"),  # PyTorch's own message
    ):
        with pytest.raises((ValueError, RuntimeError), match=error):
            zero_shot_classify(*limoe, images, ["cat", "dog"])
    with pytest.raises(TypeError, match="got int"):
        zero_shot_classify(*limoe, [3], ["cat", "dog"])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        zero_shot_classify(*limoe, [], ["cat", "dog"], batch_size=0)


def test_published_names_come_with_their_templates(limoe):
    image = _images(1)[0]
    found = zero_shot_classify(*limoe, image, "cifar10")
    expected = zero_shot_classify(*limoe, image, prompt_names("cifar10"), published_set("cifar10").templates)
    torch.testing.assert_close(found, expected)
    bare = zero_shot_classify(*limoe, image, "cifar10", ["{}"])
    assert not torch.allclose(found, bare, atol=1e-4)
    with pytest.raises(
        ValueError, match="'cats': no such file; give a file with one per line, a list of texts, or one of"
    ):
        zero_shot_classify(*limoe, image, "cats")


def test_class_names_from_a_file_must_fit_the_data(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n", encoding="utf-8")
    assert resolve_class_names(str(file)) == resolve_class_names(file) == ["cat", "dog"]
    with pytest.raises(ValueError, match="has 2 names, and the data 3 classes"):
        resolve_class_names(str(file), ["a", "b", "c"])
    file.write_text("cat\ncat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="given twice: 'cat'"):
        resolve_class_names(str(file))


def test_a_model_of_open_clip(tmp_path):
    """Its own preprocessing and tokenizer; probabilities as in open_clip's README."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    model.visual.preprocess_cfg = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    images = _images(3)
    images[0].save(tmp_path / "one.png")
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(one) for one in images]), normalize=True)
        words = model.encode_text(tokenizer(["cat", "dog"]), normalize=True)
        expected = (model.logit_scale.exp() * image @ words.T).softmax(dim=-1)
    found = zero_shot_classify(model, tokenizer, [tmp_path / "one.png", *images[1:]], ["cat", "dog"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class _FirstWord(torch.nn.Module):
    """Matches the number in an image's first pixel with the position of a name in ImageNet's list."""

    def __init__(self, names):
        super().__init__()
        position = {name: index for index, name in reversed(list(enumerate(names)))}
        self.position = [position[name] for name in names]
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image, normalize=True):
        return torch.eye(1000)[[self.position[int(number)] for number in image[:, 0, 0, 0]]]

    def encode_text(self, tokens, normalize=True):
        return torch.eye(1000)[tokens[:, 0]]


def test_equal_names_of_imagenet_count_for_the_first_of_them(make_batches):
    """ImageNet's list says "missile" (657, 744) and "sunglasses" (836, 837) twice: no top-1 for the second of them."""
    names = prompt_names("imagenet")
    model = _FirstWord(names)
    numbers = [0, 657, 744, 836, 837]

    def tokenize(texts):
        return torch.tensor([[names.index(text)] for text in texts])

    result = evaluate_zero_shot(model, tokenize, make_batches(numbers, labels=numbers), names, device="cpu")
    assert result["top1"] == 3 / 5
    assert result["top5"] == 1
    with pytest.raises(ValueError, match="given twice: 'missile'"):
        evaluate_zero_shot(model, tokenize, [], ["missile", "missile", "cat"], device="cpu")

"""Calls of a model with the batches of data loaders: what reaches it, and what is left out."""

import pytest
import torch
from torch import nn

from vmoe.models.calls import call

IMAGES, TEXT = torch.zeros(2, 3, 8, 8), torch.zeros(2, 16, dtype=torch.long)
PATCHES, COORD = torch.zeros(2, 4, 192), torch.zeros(2, 4, 2, dtype=torch.long)
NAFLEX = {"patches": PATCHES, "patch_coord": COORD, "patch_valid": torch.ones(2, 4, dtype=torch.bool)}
LABELS = torch.zeros(2, dtype=torch.long)


class Images(nn.Module):
    def forward(self, *args):
        return args


class ImagesAndText(Images):
    encode_text = None


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [
        (IMAGES, (IMAGES,)),
        ([IMAGES], (IMAGES,)),
        ((IMAGES, LABELS), (IMAGES,)),
        ((IMAGES, torch.rand(2, 5)), (IMAGES,)),  # soft labels
        ((IMAGES, LABELS, ["a.jpg", "b.jpg"]), (IMAGES,)),
        ({"image": IMAGES, "label": LABELS}, (IMAGES,)),
        (NAFLEX, (NAFLEX,)),
        ((NAFLEX, LABELS), (NAFLEX,)),
        ({"image": NAFLEX, "label": LABELS}, (NAFLEX,)),
        ((PATCHES, COORD, NAFLEX["patch_valid"]), (PATCHES, COORD, NAFLEX["patch_valid"])),
        ((PATCHES, LABELS), (PATCHES,)),
    ],
)
def test_labels_and_paths_are_no_arguments(batch, arguments):
    for model in (Images(), ImagesAndText(), nn.DataParallel(ImagesAndText())):
        assert list(map(id, call(model, batch))) == list(map(id, arguments))


def test_whole_numbers_of_two_dimensions_are_text_where_a_model_has_text():
    for batch in ((IMAGES, TEXT), (IMAGES, TEXT, LABELS), {"image": IMAGES, "text": TEXT, "label": LABELS}):
        assert call(ImagesAndText(), batch) == (IMAGES, TEXT)
        assert call(Images(), batch) == (IMAGES,)  # labels (B, 1), or one column for each class
    assert call(ImagesAndText(), {"text": TEXT}) == (TEXT,)


def test_a_dict_without_inputs_is_refused():
    with pytest.raises(ValueError, match=r"a batch must have 'image', 'text' or 'patches', got the keys \['images'\]"):
        call(Images(), {"images": IMAGES})

import csv

import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as expected_matrix

from vmoe.evaluation.classification import Predictions
from vmoe.evaluation.confusion import confusion_matrix, write_class_files


def rows(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_the_matrix_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    label_N, predicted_N = (torch.randint(0, 7, (200,), generator=generator) for _ in range(2))
    label_N[label_N == 5] = 4  # a class without images
    assert (
        confusion_matrix(label_N, predicted_N, 7).tolist()
        == expected_matrix(label_N, predicted_N, labels=range(7)).tolist()
    )


def test_the_files_by_hand(tmp_path):
    names = ["cat", 'a "quoted", name', "$x$ 狐", "none"]
    label_N, predicted_N = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 0, 1])
    ranks = (label_N != predicted_N).long()
    predictions = Predictions(torch.arange(6), label_N, ranks, predicted_N, torch.full((6,), 0.5), torch.ones(6), 4, 0)
    confusion = confusion_matrix(label_N, predicted_N, 4)
    files = [tmp_path / name for name in ("per_class.csv", "confusion.csv", "confusion.png")]
    assert write_class_files(files, predictions.per_class(names), confusion) == files
    header, *table = rows(files[0])
    assert header == ["class", "top1", "num_samples", "most_confused_with", "num_confused"]
    assert table[0] == ["cat", "0.3333333333333333", "3", names[1], "2"]
    assert table[1:] == [
        [names[1], "1.0", "1", "", "0"],
        [names[2], "0.0", "2", "cat", "1"],
        ["none", "", "0", "", "0"],
    ]
    assert rows(files[1]) == [
        ["class", *names],
        *([name, *map(str, row)] for name, row in zip(names, confusion.tolist(), strict=True)),
    ]
    with Image.open(files[2]) as image:
        assert min(image.size) > 300
    assert len(list(tmp_path.iterdir())) == 3


def test_many_classes_fit_on_the_image(tmp_path):
    names = [f"class {index}" for index in range(200)]
    per_class = [{"class": name, "top1": 1.0, "num_samples": 2} for name in names]
    files = [tmp_path / name for name in ("per_class.csv", "confusion.csv", "confusion.png")]
    *_, file = write_class_files(files, per_class, 2 * torch.eye(200).long())
    with Image.open(file) as image:
        assert max(image.size) < 2000

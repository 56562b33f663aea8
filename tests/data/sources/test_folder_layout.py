"""Trees with something amiss: every mistake is named, nothing is skipped silently."""

import logging

import pytest

from tests.data.sources.test_folder import image_folder
from vmoe.data.sources.folder_layout import TreeReader, is_junk


@pytest.fixture
def tree(tmp_path, photo):
    """FOLDER/cat/1.png, FOLDER/dog/1.png."""
    root = tmp_path / "FOLDER"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        photo.save(root / name / "1.png")
    return root


def complaint(root):
    with pytest.raises(ValueError) as caught:
        image_folder(root)
    return str(caught.value)


def test_a_class_without_images_is_named(tree):
    (tree / "cow").mkdir()
    assert complaint(tree).startswith(f"{tree}/cow: holds no image; there must be one folder of images per class")


def test_a_class_whose_only_content_is_junk_is_empty(tree, caplog):
    (tree / "cow").mkdir()
    (tree / "cow" / ".DS_Store").touch()
    assert complaint(tree).startswith(f"{tree}/cow: holds no image")
    assert f"own: path {tree}/cow/.DS_Store" in caplog.text


def test_junk_beside_a_mistake_is_logged_once(tree, caplog):
    (tree / ".DS_Store").touch()
    (tree / "stray").touch()
    complaint(tree)
    assert [record.getMessage().partition("own: ")[2] for record in caplog.records] == [f"path {tree}/.DS_Store"]


def test_a_file_that_is_no_image_is_named(tree):
    (tree / "dog" / "notes.txt").touch()
    (tree / "dog" / "list.csv").touch()
    message = complaint(tree)
    assert message.startswith(f"{tree}/dog/list.csv: not an image (2 such in this folder)")
    assert ".jpeg" in message


def test_files_and_folders_at_the_wrong_level_are_shown_beside_the_expected_tree(tree, photo):
    photo.save(tree / "stray.png")
    assert complaint(tree).splitlines() == [
        f"{tree}: beside the class folders lies file stray.png; move or remove",
        "  expected                                  found",
        "  FOLDER/                                   FOLDER/",
        "  ├── cat/        (one folder per class)    ├── cat/",
        "  │   ├── 1.jpg                             │   └── 1.png",
        "  │   └── 2.png                             ├── dog/",
        "  └── dog/                                  └── stray.png",
        "      └── 1.jpg",
        "All layouts are in docs/evaluation.md.",
    ]
    (tree / "stray.png").unlink()
    (tree / "dog" / "puppies").mkdir()
    assert f"{tree}: dog/ holds folder puppies, and only images may be there\n" in complaint(tree)


def test_a_folder_too_high_or_too_low_is_shown(tree):
    message = complaint(tree.parent)
    assert "FOLDER/ holds 2 folders (cat, dog), and only images may be there" in message
    assert "│   └── 1.png" not in message
    message = complaint(tree / "cat")
    assert "there is file 1.png, and no class folder; there must be one folder of images per class" in message


def test_an_empty_or_missing_folder_is_told(tmp_path):
    assert "there is no class folder" in complaint(tmp_path)
    assert "(empty)" in complaint(tmp_path)
    assert complaint(tmp_path / "gone") == f"{tmp_path}/gone: no such folder; check the data source's path"
    (tmp_path / "file").touch()
    assert complaint(tmp_path / "file").startswith(f"{tmp_path}/file: a file, and a folder is needed")


def test_what_operating_systems_leave_behind_is_skipped_with_a_warning(tree, caplog, photo):
    names = [".DS_Store", "cat/Thumbs.db", "cat/._1.png", "dog/desktop.ini", "dog/.hidden.png"]
    for name in names:
        (tree / name).touch()
    (tree / "__MACOSX").mkdir()
    photo.save(tree / "__MACOSX" / "1.png")
    with caplog.at_level(logging.WARNING, "vmoe.data"):
        folder = image_folder(tree)
    assert folder.names == ["cat/1.png", "dog/1.png"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"skipped, hidden or an operating system's own: 6 paths (as {tree}/.DS_Store, {tree}/__MACOSX, "
        f"{tree}/cat/._1.png)"
    )


@pytest.mark.parametrize("name", ["notes.txt", "DS_Store", "thumbs.jpg", "readme", "MACOSX"])
def test_nothing_else_is_junk(name):
    assert not is_junk(name)


def test_a_clean_tree_gives_no_warning(tree, caplog):
    assert len(image_folder(tree)) == 2
    assert not caplog.records


def test_the_file_of_class_names_may_lie_beside_the_classes(tree):
    (tree / "names.txt").write_text("Katze\nHund\n")
    assert image_folder(tree, tree / "names.txt").classes == ["Katze", "Hund"]
    assert "beside the class folders lies file names.txt" in complaint(tree)


@pytest.mark.parametrize(
    ("names", "message"),
    [("pet\npet\n", "'pet' is given twice; names of classes must differ"), ("pet\n \n", "class folder dog is empty")],
)
def test_class_names_that_cannot_be_told_apart_are_refused(tree, tmp_path, names, message):
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(ValueError, match=message):
        image_folder(tree, tmp_path / "names.txt")


def test_a_long_folder_is_cut_in_the_drawing(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    error = str(TreeReader(tmp_path, "FOLDER/").error("wrong"))
    assert "└── ... (4 more)" in error
    assert "3.txt" not in error


def test_the_folder_of_the_mistake_is_opened_in_the_drawing(tmp_path, photo):
    for name in ("a", "b", "c", "d", "e/inner"):
        (tmp_path / name).mkdir(parents=True)
        photo.save(tmp_path / name / "1.png")
    first, *drawn, _ = complaint(tmp_path).splitlines()
    assert first == f"{tmp_path}: e/ holds folder inner, and only images may be there"
    assert [line[44:] for line in drawn] == [
        "found",
        f"{tmp_path.name}/",
        "├── a/",
        "├── b/",
        "├── e/",
        "│   └── inner/",
        "└── ... (2 more)",
    ]
    error = str(TreeReader(tmp_path, "FOLDER/").error("wrong", "e/inner"))
    assert "│       └── 1.png" in error


def test_images_in_any_case_and_linked_folders_count(tree, tmp_path, photo):
    photo.save(tree / "cat" / "2.JPEG", "JPEG")
    (tmp_path / "elsewhere").mkdir()
    photo.save(tmp_path / "elsewhere" / "3.png")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    folder = image_folder(tree)
    assert folder.names == ["cat/1.png", "cat/2.JPEG", "dog/1.png", "linked/3.png"]
    assert folder.labels == [0, 0, 1, 2]

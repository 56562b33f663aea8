"""Trees with something amiss: every mistake is named, nothing is skipped silently."""

import logging

import pytest

from tests.data.sources.test_folder import image_folder
from vmoe.data.sources.folder_layout import is_junk


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
    assert message.startswith(f"{tree}/dog: holds 2 files (list.csv, notes.txt), no image (.jpg, ")
    assert ".jpeg" in message


def test_the_expected_tree_is_shown_with_what_is_there(tree, photo):
    photo.save(tree / "stray.png")
    assert complaint(tree) == (
        f"{tree}: holds file stray.png beside its folders; move or remove; found cat/, dog/, stray.png; expected "
        "CLASS/IMAGE, such as cat/1.jpg (see docs/evaluation.md)"
    )
    (tree / "stray.png").unlink()
    for number in range(4):
        (tree / "dog" / f"puppies{number}").mkdir()
    found = "holds 4 folders (as puppies0, puppies1, puppies2), and only images may be there"
    assert complaint(tree).startswith(f"{tree}/dog: {found}; found as puppies0/, puppies1/, puppies2/; expected ")


def test_a_folder_too_high_or_too_low_is_shown(tree):
    assert "FOLDER: holds 2 folders (cat, dog), and only images may be there" in complaint(tree.parent)
    assert complaint(tree / "cat").startswith(f"{tree}/cat: holds no folders, only file 1.png; found 1.png; ")


def test_an_empty_or_missing_folder_is_told(tmp_path):
    assert complaint(tmp_path).startswith(f"{tmp_path}: holds no folders; found nothing; ")
    assert complaint(tmp_path / "gone") == f"{tmp_path}/gone: no such folder"
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
    assert "holds file names.txt beside its folders" in complaint(tree)


def test_images_in_any_case_and_linked_folders_count(tree, tmp_path, photo):
    photo.save(tree / "cat" / "2.JPEG", "JPEG")
    (tmp_path / "elsewhere").mkdir()
    photo.save(tmp_path / "elsewhere" / "3.png")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    folder = image_folder(tree)
    assert folder.names == ["cat/1.png", "cat/2.JPEG", "dog/1.png", "linked/3.png"]
    assert folder.labels == [0, 0, 1, 2]

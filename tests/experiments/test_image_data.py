"""Folders of images with a class each: what is read, and what every wrong one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsify.errors import DataError, DataFileError
from sparsify.experiments import images
from sparsify.experiments.images import decoded, read_image_folder, shown_size
from tests.data_folders import Content, class_folders, picture, written

pytest.importorskip("PIL")
JPEG = picture(3, "JPEG", (64, 48))
PNG = picture(3, "PNG", (64, 48))


def test_classes_are_in_lexicographic_order_and_every_image_is_a_sample(tmp_path: Path) -> None:
    files = class_folders(classes=("dog", "Cat", "10", "9")) | {"dog/more/a/deep.JPG": JPEG, ".DS_Store": b"x"}
    data = read_image_folder(written(tmp_path, files))
    assert data.labels == ("10", "9", "Cat", "dog")
    every = [*data.train, *data.val]
    assert len(every) == 17 and not data.notes
    for one in every:
        assert one.image.relative_to(tmp_path).parts[0] == data.labels[one.label] and one.where == str(one.image)
    assert {one.label for one in data.val} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("files", "split", "note"),
    [
        (class_folders("train/") | class_folders("val/", 2, first=9), "given: val/", None),
        (class_folders("Train/") | class_folders("Validation/", 2, first=9), "given: Validation/", None),
        (class_folders("train/") | class_folders("val/", 2), "given: val/", "4 of the 4 samples"),
        (class_folders("train/") | class_folders("test/", 2, first=9), "given: test/", "the test data are measured"),
        (class_folders("train/") | class_folders("val/", 1) | {"test/x/a.png": None}, "given: val/", "not used: test/"),
        (class_folders("data/train/") | class_folders("data/valid/", first=9), "given: valid/", "read from data/"),
        (class_folders("train/"), "seeded", None),
        (class_folders() | {"dog/notes.txt": "x"}, "seeded", "no images by their endings, left out:.*notes.txt"),
        (class_folders("train/") | class_folders("val/", 2, ["dog"], 9), "given: val/", "val/ has no image of cat"),
        (class_folders(classes=("train", "car", "bus")), "seeded", None),
    ],
)
def test_folders_say_which_part_they_are(
    tmp_path: Path, files: dict[str, Content], split: str, note: str | None
) -> None:
    data = read_image_folder(written(tmp_path, files))
    assert data.split.startswith(split)
    assert (pytest.importorskip("re").search(note, " ".join(data.notes)) is not None) if note else not data.notes


FAULTS: list[tuple[dict[str, Content], str]] = [
    ({}, "no folder of a class in it, expected .*/CLASS/IMAGE"),
    ({"a.png": PNG}, "a.png: an image in no folder of a class"),
    (class_folders() | {"a.png": PNG}, "a.png: an image in no folder of a class"),
    (class_folders(classes=["dog"]), "one class only, 'dog', expected folders of two classes"),
    (class_folders("data/"), "one class only, 'data'.*Its folders cat, dog may be the classes: give .*data"),
    (class_folders() | {"bird": None}, "bird: no image of the class 'bird'"),
    (class_folders() | {"dog/z.png": "hello"}, "z.png: not an image that can be read"),
    (class_folders() | {"dog/z.png": b""}, "z.png: an empty file"),
    (class_folders() | {"dog/z.jpg": JPEG[: len(JPEG) // 2]}, "z.jpg: .*[Tt]runcated.*expected a whole image file"),
    (class_folders() | {"dog/z.png": PNG[: len(PNG) // 2]}, "z.png: image file is truncated"),
    (class_folders() | {"dog/z.png": PNG[:60] + b"????" + PNG[64:]}, "z.png: .*expected a whole image file"),
    (class_folders("train/") | class_folders("val/", 1, ["bird"]), "val/bird: the class 'bird' is not in the training"),
    (class_folders("train/") | class_folders("val/") | class_folders("valid/"), "both val/ and valid/"),
    (class_folders("val/") | class_folders("test/"), "no folder called train among test, val"),
    (class_folders("train/") | class_folders("") | class_folders("val/"), "dog?.*|cat: a folder beside train/"),
    (class_folders(count=1), "2 samples, 2 different, are too few to keep some back"),
]


@pytest.mark.parametrize(("files", "message"), FAULTS, ids=[message[:40] for _, message in FAULTS])
def test_a_wrong_folder_is_an_error_with_its_place(tmp_path: Path, files: dict[str, Content], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_image_folder(written(tmp_path, files))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("broken", [JPEG[: len(JPEG) // 2], PNG[: len(PNG) // 2]])
def test_of_many_images_a_cut_off_one_is_found_by_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bytes
) -> None:
    root = written(tmp_path, class_folders() | {"dog/z.png": broken})
    monkeypatch.setattr(images, "DECODED_WHOLE", 0)
    with pytest.raises(DataError, match=r"z\.png"):
        read_image_folder(root)
    (root / "dog" / "z.png").write_bytes(PNG)
    assert len(read_image_folder(root).train) == 7


def test_links_are_followed_but_not_for_ever_and_not_nowhere(tmp_path: Path) -> None:
    root = written(tmp_path / "d", class_folders() | {"../far/9.png": PNG})
    (root / "dog" / "more").symlink_to(tmp_path / "far")
    assert len(read_image_folder(root).train) == 7
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"gone\.png: a link that leads nowhere"):
        read_image_folder(root)
    (root / "dog" / "gone.png").unlink()
    (root / "dog" / "round").symlink_to(root / "dog")
    with pytest.raises(DataError, match="round: a link to a folder that it is in"):
        read_image_folder(root)


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    written(tmp_path, {"a.png": PNG})
    with pytest.raises(DataError, match="a file, expected a folder with one folder of images"):
        read_image_folder(tmp_path / "a.png")
    with pytest.raises(DataFileError, match="no such file or folder"):
        read_image_folder(tmp_path / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    root = written(tmp_path, class_folders())
    (root / "dog").chmod(0)
    with pytest.raises(DataFileError, match="dog: cannot be read: Permission denied"):
        read_image_folder(root)


def test_images_are_shown_turned_and_in_eight_bits(tmp_path: Path) -> None:
    np, pil = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    exif = pil.Exif()
    exif[0x0112] = 6
    written(tmp_path, {"turned.jpg": picture(0, "JPEG", (64, 48), exif=exif)})
    assert shown_size(tmp_path / "turned.jpg", True) == (48, 64) == decoded(tmp_path / "turned.jpg").size
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pil.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(decoded(tmp_path / "deep.png", channels=1)), deep >> 8)
    assert np.array_equal(np.asarray(decoded(tmp_path / "deep.png"))[..., 2], deep >> 8)
    pil.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(DataError, match="values of 32 bits"):
        decoded(tmp_path / "f.tiff")
    pil.new("RGBA", (3, 2), (1, 2, 3, 9)).save(tmp_path / "clear.png")
    assert decoded(tmp_path / "clear.png").getpixel((0, 0)) == (1, 2, 3)


def test_an_image_of_too_many_pixels_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("PIL.Image"), "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"a.png: Image size \(3072 pixels\) exceeds"):
        shown_size(written(tmp_path, {"a.png": PNG}) / "a.png", False)
    (tmp_path / "b.png").write_bytes(picture(0, "PNG", (40, 30)))
    with pytest.raises(DataError, match=r"b.png: Image size \(1200 pixels\) exceeds"):
        shown_size(tmp_path / "b.png", False)


def test_the_fingerprint_sees_another_pixel(tmp_path: Path) -> None:
    one = read_image_folder(written(tmp_path / "a", class_folders()))
    assert one.fingerprint == read_image_folder(written(tmp_path / "b", class_folders())).fingerprint
    other = read_image_folder(written(tmp_path / "c", class_folders() | {"dog/0.png": picture(77)}))
    assert one.fingerprint != other.fingerprint

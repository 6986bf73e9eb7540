"""ImageFolder trees and ImageNet's flat validation folder, with the labels they publish."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_ffcv import DataError
from data_ffcv.sources import open_source
from tests.data_ffcv.sources.images import random_pixels, save

SYNSETS = ("n01440764", "n01443537", "n01484850")
MAPPING = (
    "n01484850 great white shark\nn01440764 tench, Tinca tinca\n\nn01443537 goldfish, Carassius\n"
)


def number_image(number: int) -> np.ndarray:
    return random_pixels(4, 5, seed=number)


def write_tree(root: Path) -> list[tuple[str, int]]:
    """Writes images named by their seeds; returns (file, seed) in the order to expect."""
    files = [
        f"{SYNSETS[0]}/a_1.JPEG",
        f"{SYNSETS[0]}/deep/er/2.png",
        f"{SYNSETS[1]}/3.Jpg",
        f"{SYNSETS[2]}/4.webp",
        f"{SYNSETS[2]}/5.TIF",
    ]
    for number, file in enumerate(files):
        save(root / file, number_image(number))
    for ignored in (".hidden/6.png", f"{SYNSETS[0]}/.7.png", f"{SYNSETS[1]}/.cache/8.png", "9.png"):
        save(root / ignored, number_image(0))
    (root / SYNSETS[0] / "notes.txt").write_text("no image")
    return [(file, number) for number, file in enumerate(files)]


def write_flat(root: Path, count: int = 4) -> list[str]:
    names = [f"ILSVRC2012_val_{number:08}" for number in range(1, count + 1)]
    for number, name in enumerate(names):
        save(root / f"{name}.JPEG", number_image(number))
    return names


def test_class_folders(tmp_path: Path):
    expected = write_tree(tmp_path)
    source = open_source("imagefolder", tmp_path)
    assert source.classes == SYNSETS
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 2, 2]
    assert len(source) == 5
    for index, (file, number) in enumerate(expected):
        assert source.name(index) == str(tmp_path / file)
        assert np.array_equal(source.read(index).image, number_image(number))


def test_linked_class_folder_is_followed(tmp_path: Path):
    save(tmp_path / "elsewhere" / "1.png", number_image(1))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    assert len(open_source("imagefolder", tmp_path / "root")) == 1


def test_classes_of_a_beton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tree(tmp_path / "val")
    info = SimpleNamespace(classes=("n0", *SYNSETS[::-1]))
    monkeypatch.setattr("data_ffcv.beton.info.inspect_beton", {Path("train.beton"): info}.get)
    source = open_source("imagefolder", tmp_path / "val", classes="train.beton")
    assert source.classes == info.classes and source.labels.tolist() == [3, 3, 2, 1, 1]


def test_class_numbers_that_count_something_else(tmp_path: Path):
    write_flat(tmp_path / "val", 1)
    (tmp_path / "labels").write_text("ILSVRC2012_val_00000001 20121231235959\n")
    with pytest.raises(DataError, match="labels has the class number 20121231235959; count"):
        open_source("imagefolder", tmp_path / "val", labels=tmp_path / "labels")


def test_names_that_are_no_text_are_kept(tmp_path: Path):
    save(tmp_path / "ä" / "ö 1.png", number_image(1))
    os.rename(tmp_path / "ä" / "ö 1.png", os.fsencode(tmp_path / "ä") + b"/\xff.png")
    source = open_source("imagefolder", tmp_path)
    assert np.array_equal(source.read(0).image, number_image(1))


def test_class_names_that_are_no_text_can_be_printed_and_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path / "a" / "1.png", number_image(1))
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")
    source = open_source("imagefolder", tmp_path)
    assert source.classes == ("\\udcff",)
    assert np.array_equal(source.read(0).image, number_image(1))
    info = SimpleNamespace(classes=("other", *source.classes))
    monkeypatch.setattr("data_ffcv.beton.info.inspect_beton", {Path("train.beton"): info}.get)
    assert open_source("imagefolder", tmp_path, classes="train.beton").labels.tolist() == [1]


@pytest.mark.parametrize(("link", "target"), [("loop", "loop"), ("a/loop", "."), ("a/x", "../a")])
def test_links_that_go_round_are_named(tmp_path: Path, link: str, target: str):
    save(tmp_path / "a" / "1.png", number_image(1))
    (tmp_path / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"{tmp_path}/{link}.* cannot be read \(Too many levels"):
        open_source("imagefolder", tmp_path)


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "a" / "1.png", number_image(1))
    scandir = os.scandir

    def refuse(folder: Path):  # root may list everything, so taking the right away is no test
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"{tmp_path}/a cannot be read \(Permission denied\)"):
        open_source("imagefolder", tmp_path)


def test_given_classes_number_the_folders(tmp_path: Path):
    write_tree(tmp_path / "val")
    (tmp_path / "classes.txt").write_text(MAPPING + "n02000000 no image of this one\n")
    source = open_source("imagefolder", tmp_path / "val", classes=tmp_path / "classes.txt")
    assert source.classes == (SYNSETS[2], SYNSETS[0], SYNSETS[1], "n02000000")
    assert source.labels.tolist() == [1, 1, 2, 0, 0]


def test_class_names_may_have_spaces(tmp_path: Path):
    save(tmp_path / "val" / "great white shark" / "1.png", number_image(1))
    (tmp_path / "classes.txt").write_text("tench\r\ngreat white shark\r\n")
    source = open_source("imagefolder", tmp_path / "val", classes=tmp_path / "classes.txt")
    assert source.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "classes", "expected_classes", "expected_labels"),
    [
        ("{name}.JPEG {number}", None, ("0", "1", "2"), [2, 0, 2, 1]),
        ("{name} {synset}", None, SYNSETS, [2, 0, 2, 1]),
        ("{name}.JPEG {synset}", MAPPING, (SYNSETS[2], *SYNSETS[:2]), [0, 1, 0, 2]),
        ("{name}.JPEG {number}", MAPPING, (SYNSETS[2], *SYNSETS[:2]), [2, 0, 2, 1]),
        (
            "{name},{synset} 1 2 3 4 {synset} 5 6 7 8",
            MAPPING,
            (SYNSETS[2], *SYNSETS[:2]),
            [0, 1, 0, 2],
        ),
    ],
)
def test_flat_folder_with_labels(
    tmp_path: Path, line: str, classes: str | None, expected_classes, expected_labels
):
    names = write_flat(tmp_path / "val")
    lines = ["ImageId,PredictionString"] if "," in line else []
    for name, number in zip(names, [2, 0, 2, 1], strict=True):
        lines.append(line.format(name=name, number=number, synset=SYNSETS[number]))
    (tmp_path / "labels").write_text("\n".join([*lines[: len(lines) - 4], *lines[-4:][::-1]]))
    if classes:
        (tmp_path / "classes").write_text(classes)
    source = open_source(
        "imagefolder",
        tmp_path / "val",
        labels=tmp_path / "labels",
        classes=tmp_path / "classes" if classes else None,
    )
    assert source.classes == expected_classes
    for index, number in enumerate([3, 2, 1, 0]):
        assert source.name(index) == str(tmp_path / "val" / f"{names[number]}.JPEG")
        assert np.array_equal(source.read(index).image, number_image(number))
        assert source.labels[index] == expected_labels[number]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("\n".join(map(str, range(1, 50001))), r"order of the devkit's own; use LOC_val_solution"),
        ("{0} 1\n{1} 1\n{2} 1\n", r"has no label for: .*0004; every image"),
        ("{0} 1\n{1} 1\n{2} 1\n{3} 1\n{3} 1\n", "names twice: .*0004;"),
        ("{0} 1\n{1} 1\n{2} 1\n{3} 1\nghost.JPEG 1\n", "does not hold: ghost;"),
        ("{0} 1\n{1}\n", r"without a class: .*0002; every line"),
        ("\n", "labels is empty"),
        ("ImageId,PredictionString\n{0},n01440764 1 2 3 4\n{1},\n", r"without a class: .*0002;"),
        ("ImageId,PredictionString\n", "labels is empty"),
        ("{0} 1\n{1} 1\n{2} 3\n{3} 1\n", "not among the 3 given: 3;"),
        ("{0} n01440764\n{1} n0\n{2} 0\n{3} 1\n", "not among the 3 given: 0, 1, n0;"),
        ("\xff", "not a UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, labels: str | None, words: str):
    names = write_flat(tmp_path / "val")
    (tmp_path / "classes").write_text(MAPPING)
    if labels is not None:
        (tmp_path / "labels").write_bytes(labels.format(*names).encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        open_source(
            "imagefolder",
            tmp_path / "val",
            labels=tmp_path / "labels",
            classes=tmp_path / "classes",
        )
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("odd", ["-1", "2.0", "ant"])
def test_numbers_beside_other_words_are_no_class_names(tmp_path: Path, odd: str):
    names = write_flat(tmp_path / "val", 2)
    (tmp_path / "labels").write_text(f"{names[0]} 10\n{names[1]} {odd}\n")
    with pytest.raises(DataError, match="labels mixes"):
        open_source("imagefolder", tmp_path / "val", labels=tmp_path / "labels")


def test_flat_images_that_labels_cannot_tell_apart(tmp_path: Path):
    for name in ("1.png", "1.jpg"):
        save(tmp_path / "val" / name, number_image(1))
    (tmp_path / "labels").write_text("1 0\n")
    with pytest.raises(DataError, match=r"holds 1\.jpg and 1\.png"):
        open_source("imagefolder", tmp_path / "val", labels=tmp_path / "labels")


@pytest.mark.parametrize(
    ("files", "classes", "words"),
    [
        (["1.png"], None, "no class folder; .* or pass labels"),
        (["train/a/1.png", "val/a/1.png"], None, r"holds parts \(train, val\), not classes"),
        (["a/1.png", "b/readme.txt"], None, "b holds no image"),
        (["a/1.png", "b/1.png"], "a", "no class of .*classes: b"),
        (["a/1.png"], "a\nb\na", "names a twice"),
        (["a/1.png"], "\n", "is empty"),
    ],
)
def test_wrong_folders_are_named(tmp_path: Path, files: list[str], classes: str | None, words: str):
    for file in files:
        save(tmp_path / "root" / file, number_image(1))
    if classes is not None:
        (tmp_path / "classes").write_text(classes)
    with pytest.raises(DataError, match=words):
        open_source(
            "imagefolder",
            tmp_path / "root",
            classes=tmp_path / "classes" if classes is not None else None,
        )


@pytest.mark.parametrize(
    ("format", "settings", "words"),
    [
        ("imagenet", {}, "format must be one of imagefolder"),
        ("imagefolder", {"ignore_index": 0}, "ignore_index is not for imagefolder"),
        ("cifar10", {"classes": "c"}, "classes is not for cifar10"),
        ("webdataset", {"download": True}, "download is not for webdataset"),
        ("imagefolder", {}, "nowhere is not a folder"),
    ],
)
def test_wrong_settings_are_named(format: str, settings: dict, words: str):
    with pytest.raises(DataError, match=words):
        open_source(format, "nowhere", **settings)

"""WebDataset tars: what the webdataset package reads, and what is wrong by name."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_ffcv import DataError
from data_ffcv.sources import open_source
from data_ffcv.sources.tars import expand_braces
from tests.data_ffcv.sources.images import encode, random_pixels, smooth_image


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def pixels_of(number: int) -> bytes:
    return encode(Image.fromarray(random_pixels(4, 5, seed=number)), "PNG")


def sample(key: str, number: int, label: str = "cls") -> dict[str, bytes]:
    text = (
        json.dumps({"label": number % 3, "caption": "x"}) if label == "json" else f"{number % 3}\n"
    )
    return {f"{key}.png": pixels_of(number), f"{key}.{label}": text.encode()}


@pytest.mark.parametrize("form", ["folder", "pattern", "one"])
@pytest.mark.parametrize("label", ["cls", "json"])
def test_samples_in_order(tmp_path: Path, form: str, label: str):
    for tar in range(2):
        members = {}
        for number in range(5 * tar, 5 * tar + 5):
            members |= sample(f"some/folder.x/{number:04}", number, label)
        write_tar(tmp_path / f"part-{tar:03}.tar", members)
    path = {"folder": "", "pattern": "part-{000..001}.tar", "one": "part-001.tar"}[form]
    source = open_source("webdataset", tmp_path / path)
    numbers = range(10) if form != "one" else range(5, 10)
    assert source.classes == tuple("012") and source.labels.dtype == np.int64
    assert source.labels.tolist() == [number % 3 for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(source.read, list(range(len(source))) * 5))
    for index, read in enumerate(samples):
        number = numbers[index % len(source)]
        assert np.array_equal(read.image, random_pixels(4, 5, seed=number))
    assert (
        source.name(0) == f"{tmp_path}/part-00{numbers[0] // 5}.tar, some/folder.x/{numbers[0]:04}"
    )


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_same_samples_as_the_webdataset_package(tmp_path: Path, format: int):
    webdataset = pytest.importorskip("webdataset")
    members = {}
    for number in range(6):
        key = f"{'long-folder/' * (number + (format != tarfile.USTAR_FORMAT) * 12)}N{number}"
        suffix = ("jpg", "JPEG", "png", "webp", "seg.txt.png", "ppm")[number]
        if number == 4:
            members[f"{key}.{suffix}"] = pixels_of(number)
            suffix = "jpg"
        codec = {"jpg": "JPEG", "webp": "WEBP"}.get(suffix.lower(), suffix.upper())
        members[f"{key}.{suffix}"] = encode(smooth_image(20, 30, number), codec)
        members[f"{key}.cls"] = str(number).encode()
        members[f"{key}.json"] = b'{"label": 77}'
    members["README"] = b"no suffix, so no sample"
    write_tar(tmp_path / "a.tar", members, format)
    source = open_source("webdataset", tmp_path / "a.tar")
    reference = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil")
    samples = [read for read in reference if "cls" in read]
    assert len(samples) == len(source) == 6
    for index, expected in enumerate(samples):
        key = next(suffix for suffix in expected if suffix in ("jpg", "jpeg", "png", "webp", "ppm"))
        assert source.name(index).endswith(expected["__key__"])
        assert source.labels[index] == expected["cls"]
        assert np.array_equal(source.read(index).image, expected[key])


def test_class_names(tmp_path: Path):
    members = {}
    for number, name in enumerate(("cat", "ant", "cat")):
        members |= {f"{number}.png": pixels_of(number), f"{number}.cls": name.encode()}
    write_tar(tmp_path / "a.tar", members)
    source = open_source("webdataset", tmp_path / "a.tar")
    assert source.classes == ("ant", "cat") and source.labels.tolist() == [1, 0, 1]
    (tmp_path / "classes").write_text("cat\nbee\n")
    with pytest.raises(DataError, match=r"a\.tar names classes .* the 2 given: ant"):
        open_source("webdataset", tmp_path / "a.tar", classes=tmp_path / "classes")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": b"", "b.png": b"", "b.cls": b"0"}, "a has no label"),
        ({"a.cls": b"0"}, "a has no image"),
        ({"a.cls": b"0", "a.png": b"", "a.jpg": b""}, r"a has several images \(.png, .jpg\)"),
        ({"a.png": b"", "a.json": b"{}"}, "a has no label"),
        ({"a.png": b"", "a.json": b"{"}, "a has no label"),
        ({"a.png": b"", "a.json": b'{"label": null}'}, "a has no label .*label is None"),
        ({"a.png": b"", "a.cls": b" \n"}, "a has no label"),
        ({"a.png": b"", "a.cls": b"\xff"}, "a has no label"),
        ({"a.png": b"", "a.PNG": b"", "a.cls": b"0"}, "holds a.PNG twice"),
        ({"README": b""}, "holds no sample"),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, members: dict[str, bytes], words: str):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=rf"x\.tar.* {words}"):
        open_source("webdataset", tmp_path)


def test_wrong_tars_are_named(tmp_path: Path):
    path = tmp_path / "x.tar"
    write_tar(path, {name: part for n in range(9) for name, part in sample(str(n), n).items()})
    whole = path.read_bytes()
    for wrong in (whole[:700], whole[:3000], whole[: 512 * 36], whole + whole, b"", b"text" * 500):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"x\.tar (is not a complete|holds no sample)"):
            open_source("webdataset", path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(DataError, match=r"x\.tar is not a complete, uncompressed tar"):
        open_source("webdataset", path)
    with pytest.raises(DataError, match=r"y-1\.tar does not exist; .* a-\{000\.\.146\}\.tar"):
        open_source("webdataset", tmp_path / "{x,y-1}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar"):
        open_source("webdataset", tmp_path / "empty")


def test_braces_expand_as_in_the_shell():
    assert expand_braces("a-{08..11}.tar") == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{9..11}{x,yz}") == ["9x", "9yz", "10x", "10yz", "11x", "11yz"]
    assert expand_braces("plain.tar") == ["plain.tar"]

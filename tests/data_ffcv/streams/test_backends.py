"""Both backends, and a folder in place of a file, give the same batches bit for bit."""

import gc
import importlib.util
import itertools
import logging
import os
import random
import shutil
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from data_ffcv import Augmentation, DataError, inspect_images, open_eval_loader
from data_ffcv.beton.images import BetonImages
from data_ffcv.beton.info import BetonInfo
from data_ffcv.convert import convert
from data_ffcv.streams import pipeline
from data_ffcv.streams.settings import ffcv_problem
from tests.data_ffcv.conftest import UNIT
from tests.data_ffcv.streams.draws import (
    CROP,
    WHOLE,
    assert_same,
    draw,
    eval_loader,
    sample_numbers,
    stream,
)

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed"
)


@pytest.fixture(scope="module")
def mixed_beton(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder`, some images raw and some as JPEG."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.beton"
    return convert("imagefolder", image_folder, path, write_mode="proportion").path


@needs_ffcv
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "augmentation",
    [
        CROP,
        Augmentation("pad_crop", 28, flip=True),
        Augmentation("random_resized_crop", 16, auto_augment="rand-m9-mstd0.5-inc1"),
    ],
    ids=["crop", "pad", "randaugment"],
)
def test_threads_give_what_ffcv_gives(grey_beton: Path, augmentation, num_workers: int):
    settings = {"augmentation": augmentation, "start_batch": 3}
    ours = draw(grey_beton, 4, backend="threads", num_workers=num_workers, **settings)
    assert_same(ours, draw(grey_beton, 4, backend="ffcv", **settings))


@needs_ffcv
def test_backends_agree_on_jpeg_and_raw_in_one_file(mixed_beton: Path):
    info = inspect_images(mixed_beton)
    assert {0, 1} == set(info.samples.modes.tolist())
    batches = [draw(mixed_beton, 4, batch_size=4, backend=b) for b in ("threads", "ffcv")]
    assert_same(*batches)


def test_a_folder_gives_what_its_raw_file_gives(image_folder: Path, colour_beton: Path):
    settings = {"batch_size": 3, "start_batch": 1, "num_workers": 2}
    assert_same(draw(image_folder, 5, **settings), draw(colour_beton, 5, **settings))
    whole = Augmentation("center_crop", 24, resize=32)
    loaders = [
        open_eval_loader(path, augmentation=whole, batch_size=3, **UNIT)
        for path in (image_folder, colour_beton)
    ]
    assert_same(*(list(loader) for loader in loaders))
    folder, file = (inspect_images(path) for path in (image_folder, colour_beton))
    assert (folder.classes, folder.num_classes) == (file.classes, file.num_classes)
    for name in ("min_height", "max_height", "min_width", "max_width"):
        assert getattr(folder, name) == getattr(file, name)


def test_a_damaged_image_of_a_folder_is_named(image_folder: Path, tmp_path: Path):
    (tmp_path / "ant").mkdir()
    broken = tmp_path / "ant" / "half.png"
    broken.write_bytes((image_folder / "ant" / "0.png").read_bytes()[:300])
    with stream(tmp_path, batch_size=1) as batches:
        for _ in range(2):
            with pytest.raises(DataError, match=r"half\.png cannot be read .*fix or remove"):
                next(batches)


def test_threads_end_with_their_stream(grey_beton: Path):
    draw(grey_beton, 1, backend="threads")
    num_threads = threading.active_count()
    for _ in range(3):
        batches = stream(grey_beton, num_workers=2, backend="threads")
        next(batches)
        batches.close()
        next(iter(eval_loader(grey_beton, backend="threads")))
    forgotten = stream(grey_beton, backend="threads")
    next(forgotten)
    del forgotten
    gc.collect()
    assert threading.active_count() == num_threads


@pytest.mark.parametrize("backend", ["threads", pytest.param("ffcv", marks=needs_ffcv)])
def test_corrupt_jpeg_raises_in_the_consumer(image_folder: Path, tmp_path: Path, backend: str):
    info = convert("imagefolder", image_folder, tmp_path / "j.beton", write_mode="jpg")
    content = bytearray(info.path.read_bytes())
    start = content.rindex(b"\xff\xd8\xff")
    content[start + 300 : start + 800] = bytes(500)
    info.path.write_bytes(content)
    with stream(info.path, batch_size=8, num_workers=2, backend=backend) as batches:
        for _ in range(2):
            with pytest.raises(DataError, match=r"j\.beton.* sample \d is corrupt"):
                next(batches)


def test_a_jpeg_that_claims_to_be_huge_takes_no_memory(image_folder: Path, tmp_path: Path):
    info = convert("imagefolder", image_folder, tmp_path / "j.beton", write_mode="jpg")
    content = bytearray(info.path.read_bytes())
    first = content.index(b"\xff\xc0", int(info.samples.pointers[0]))
    content[first + 5 : first + 9] = (40000).to_bytes(2, "big") * 2  # height and width
    info.path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"sample 0 is corrupt \(it has another size"):
        list(eval_loader(info.path, augmentation=CROP, batch_size=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


@pytest.mark.parametrize("backend", ["threads", pytest.param("ffcv", marks=needs_ffcv)])
def test_a_file_replaced_by_renaming_goes_on(
    grey_beton: Path, idx_folder: Path, tmp_path: Path, backend: str
):
    path = tmp_path / "live.beton"
    path.write_bytes(grey_beton.read_bytes())
    expected = draw(grey_beton, 8)
    whole = list(eval_loader(grey_beton))
    loader = eval_loader(path, backend=backend)
    with stream(path, backend=backend) as batches:
        first = next(batches)
        other = convert("fashion-mnist", idx_folder, tmp_path / "new.beton", part="test")
        os.replace(other.path, path)
        assert_same([first, *(next(batches) for _ in range(7))], expected)
    assert_same(list(loader), whole)
    path.unlink()
    assert_same(list(loader), whole)


def test_a_file_replaced_while_it_is_opened_is_read_as_one(
    grey_beton: Path, idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tables of one file on the pixels of another would read anywhere."""
    other = convert("fashion-mnist", idx_folder, tmp_path / "new.beton", part="test")
    path = tmp_path / "live.beton"
    path.write_bytes(grey_beton.read_bytes())
    open_images = pipeline.open_images

    def replace_first(info: BetonInfo) -> BetonImages:
        if other.path.exists():
            os.replace(other.path, path)
        return open_images(info)

    monkeypatch.setattr(pipeline, "open_images", replace_first)
    loader = eval_loader(path)
    assert loader.info.num_samples == 20
    assert sum(len(labels) for _, labels in loader) == 20


def test_without_ffcv_threads_take_over_with_one_notice(
    grey_beton: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = draw(grey_beton, 2, backend="threads")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ffcv_problem.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert_same(draw(grey_beton, 2), expected)
        with stream(grey_beton) as batches:
            assert batches.backend == "threads"
    assert [record.message for record in caplog.records] == [
        "FFCV cannot be used (it is not installed): .beton files are read by threads, batches are "
        "the same"
    ]
    with pytest.raises(DataError, match="pip install ffcv"):
        stream(grey_beton, backend="ffcv")
    monkeypatch.undo()
    ffcv_problem.cache_clear()


def test_an_ffcv_that_cannot_be_imported_is_as_none(
    grey_beton: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such as one whose OpenCV has been removed from the system."""
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "data_ffcv.streams.ffcv_backend", raising=False)
    (tmp := grey_beton.parent / "broken" / "ffcv").mkdir(parents=True)
    (tmp / "__init__.py").write_text("raise ImportError('libopencv_core.so.406: no such file')")
    monkeypatch.syspath_prepend(str(tmp.parent))
    ffcv_problem.cache_clear()
    with stream(grey_beton) as batches:
        assert batches.backend == "threads"
    with pytest.raises(DataError, match=r"cannot be used \(libopencv_core"):
        stream(grey_beton, backend="ffcv")
    monkeypatch.undo()
    ffcv_problem.cache_clear()


@pytest.mark.parametrize(
    ("backend", "words"), [("numpy", "backend must be one of"), ("ffcv", "cannot read.*convert")]
)
def test_bad_backends_are_refused(image_folder: Path, backend: str, words: str):
    with pytest.raises(DataError, match=words):
        stream(image_folder, backend=backend)


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_batches_and_parts_of_them_may_be_kept(grey_beton: Path, backend: str):
    """Memory is used again only when no tensor, view or array of it is left."""
    with stream(grey_beton, WHOLE, backend=backend) as batches:
        batch = next(batches)
        kept = [
            (images[3, 1, 2:5], labels.numpy()[4:])
            for images, labels in itertools.islice(batches, 20)
        ]
        kept.append((batch[0], batch[1]))
        copies = [tuple(np.asarray(part).copy() for part in parts) for parts in kept]
        del batch
        for _ in range(20):
            next(batches)
    for parts, copy in zip(kept, copies, strict=True):
        assert all(np.array_equal(part, other) for part, other in zip(parts, copy, strict=True))


def test_a_relative_path_belongs_to_its_folder(
    grey_beton: Path, colour_beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, source in (("one", grey_beton), ("two", colour_beton)):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "a.beton")
    monkeypatch.chdir(tmp_path / "one")
    first = inspect_images("a.beton")
    monkeypatch.chdir(tmp_path / "two")
    assert inspect_images("a.beton").num_samples != first.num_samples
    loader = eval_loader(tmp_path / "one" / "a.beton")
    assert loader.info.num_samples == first.num_samples == sum(len(b[1]) for b in loader)


def test_a_folder_that_changes_is_listed_again(image_folder: Path, tmp_path: Path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    before = inspect_images(folder)
    assert inspect_images(folder) is before
    next((folder / "ant").iterdir()).unlink()
    assert inspect_images(folder).num_samples == before.num_samples - 1


def test_streams_of_a_file_share_its_tables_until_it_changes(grey_beton: Path, tmp_path: Path):
    path = tmp_path / "live.beton"
    for suffix in ("", ".json"):
        shutil.copy(f"{grey_beton}{suffix}", f"{path}{suffix}")
    loaders = [eval_loader(path), eval_loader(path, indices=np.arange(9))]
    assert loaders[0].info is loaders[1].info
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(DataError, match="truncated"):
        eval_loader(path)


def test_a_stream_may_be_collected_by_its_own_threads(grey_beton: Path):
    """Garbage collection runs in whichever thread allocates; none may wait for itself."""
    for backend in ("threads", "auto"):
        before = threading.active_count()
        batches = stream(grey_beton, backend=backend)
        next(batches)
        loading = batches._batches
        loading._decoder._pool.submit(loading.stop).result(timeout=10)
        loading.join(timeout=10)
        assert not loading.is_alive()
        del batches
        gc.collect()
        assert threading.active_count() <= before


def test_closing_wakes_a_consumer_in_another_thread(grey_beton: Path):
    batches = stream(grey_beton, backend="threads")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: sum(1 for _ in batches))
        while batches.batches_drawn < 3:
            pass
        batches.close()
        with suppress(DataError):  # "closed", if it came back for another batch
            assert job.result(timeout=10) >= 3


def test_memory_of_dropped_batches_is_used_again(grey_beton: Path):
    """Fresh memory would cost as much time as decoding into it."""
    with stream(grey_beton, WHOLE, backend="threads") as batches:
        places = [next(batches)[0].data_ptr() for _ in range(40)]
        assert len(set(places)) <= 5
        kept = [next(batches) for _ in range(8)]  # more than are used again
        places = [next(batches)[0].data_ptr() for _ in range(40)]
        assert len(set(places)) <= 5 and len(kept) == 8


def test_index_lists_split_one_file_into_disjoint_parts(grey_beton: Path):
    first, second = (
        [n for images, _ in eval_loader(grey_beton, indices=part) for n in sample_numbers(images)]
        for part in (np.arange(0, 100), np.arange(100, 203))
    )
    assert sorted(first + second) == list(range(203))


def test_no_loader_moves_the_random_state_of_training(grey_beton: Path):
    augmentation = Augmentation(
        "random_resized_crop",
        16,
        flip=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=(0.4, 0.4, 0.2, 0.1),
        random_erasing_prob=0.5,
    )

    def states() -> tuple[list[int], str, object]:
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    before = states()
    draw(grey_beton, 3, augmentation)
    assert states() == before


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["threads", pytest.param("ffcv", marks=needs_ffcv)])
def test_batches_on_the_gpu_are_those_of_the_cpu(grey_beton: Path, backend: str):
    """Pinned buffers are overwritten only when their asynchronous copies have ended."""
    augmentation = Augmentation("random_resized_crop", 64, flip=True)
    settings = {"augmentation": augmentation, "backend": backend}
    expected = draw(grey_beton, 30, **settings)
    with stream(grey_beton, device="cuda", **settings) as batches:
        kept = list(itertools.islice(batches, 30))
    assert all(tensor.is_cuda for batch in kept for tensor in batch)
    assert_same([tuple(tensor.cpu() for tensor in batch) for batch in kept], expected)

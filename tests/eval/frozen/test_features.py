"""Features of images: the right ones, in order, encoded once, the same for any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_ffcv import open_eval_loader
from eval import knn
from eval.frozen import features
from eval.frozen import store as _store
from eval.frozen.encoders import of_run
from eval.frozen.features import ImageSet, ImageSets, eval_augmentation
from eval.frozen.preprocess import Standardizer, centre_rows
from eval.frozen.store import Features, FeatureStore
from mlomae.errors import UserError
from mlomae.pretraining.networks import load_model
from tests.eval.ranked import evaluate_all
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def small_chunks(monkeypatch):
    """Sixty images in chunks of eight, two batches each."""
    monkeypatch.setattr(_store, "CHUNK_SIZE", 8)
    monkeypatch.setattr(features, "BATCH_SIZE", 4)


def test_features_are_those_of_the_whole_image_in_order(run, data, tmp_path, small_chunks):
    model, recipe = load_model(run)
    images = ImageSet(data["test"])
    loader = open_eval_loader(
        data["test"],
        augmentation=eval_augmentation(images.info, 16),
        batch_size=15,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
    pixels = torch.cat([pixels for pixels, _ in loader])
    features = images.encode(of_run(run), tmp_path, CPU)
    torch.testing.assert_close(features.features.load("cpu"), model(pixels).detach())
    assert features.labels.tolist() == images.info.labels.tolist()


def test_small_images_are_taken_whole_and_others_cropped(data):
    info = ImageSet(data["train"]).info
    assert eval_augmentation(info, 16).resize is None
    assert eval_augmentation(info, 224).resize == 256
    assert eval_augmentation(info, (16, 16)).resize is None
    assert eval_augmentation(info, (224, 448)).resize == (256, 512)


def test_a_subset_holds_every_class_in_proportion(data):
    train = ImageSets(data["train"], data["test"], num_train_images=30).train
    assert np.bincount(train.labels).tolist() == [10, 10, 10]
    assert ImageSets(data["train"], data["test"], num_train_images=60).train.indices is None


@pytest.fixture
def encoded(monkeypatch):
    """How many images the encoder has seen."""
    counts = [0]
    extract = features.extract_features

    def counting(model, loader, device):
        for batch in extract(model, loader, device):
            counts[0] += len(batch)
            yield batch

    monkeypatch.setattr(features, "extract_features", counting)
    return counts


def test_no_image_is_encoded_twice(run, data, tmp_path, small_chunks, encoded):
    encoder, images = of_run(run), ImageSet(data["train"])
    whole = images.encode(encoder, tmp_path, CPU).features.load("cpu")
    assert encoded == [60]
    again = ImageSet(data["train"]).encode(of_run(run), tmp_path, CPU)
    part = ImageSets(data["train"], data["test"], 30).train
    some = part.encode(encoder, tmp_path, CPU)
    assert encoded == [60]
    assert torch.equal(again.features.load("cpu"), whole)
    assert torch.equal(some.features.load("cpu"), whole[torch.from_numpy(part.indices)])
    assert some.labels.tolist() == part.labels.tolist()


def test_a_killed_evaluation_goes_on_after_its_last_chunk(
    run, data, tmp_path, small_chunks, encoded, monkeypatch
):
    class Killed(Exception):
        pass

    write = FeatureStore.write

    def kill_at_the_fourth(store, number, rows):
        if number == 3:
            raise Killed
        write(store, number, rows)

    encoder, images = of_run(run), ImageSet(data["train"])
    whole = images.encode(encoder, tmp_path / "other", CPU).features.load("cpu")
    monkeypatch.setattr(FeatureStore, "write", kill_at_the_fourth)
    with pytest.raises(Killed):
        images.encode(encoder, tmp_path, CPU)
    monkeypatch.setattr(FeatureStore, "write", write)
    encoded[0] = 0
    assert torch.equal(images.encode(encoder, tmp_path, CPU).features.load("cpu"), whole)
    assert encoded == [60 - 3 * 8]


def test_whatever_decides_the_features_is_another_store(run, data, tmp_path, encoded):
    encoder, images = of_run(run), ImageSet(data["test"])
    images.encode(encoder, tmp_path, CPU)
    assert encoded == [15]
    images.encode(of_run(run, untrained=True), tmp_path, CPU)
    assert encoded == [30]
    encoder.model.global_pool = "avg"
    images.encode(encoder, tmp_path, CPU)
    assert encoded == [45]
    Path(data["test"]).touch()
    ImageSet(data["test"]).encode(encoder, tmp_path, CPU)
    assert encoded == [60]
    assert len(list(tmp_path.glob("*/about.yaml"))) == 4


def test_an_image_that_was_overwritten_is_encoded_again(run, tmp_path, encoded):
    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / f"images/{label}").mkdir(parents=True)
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{label}/a.png")
    before = ImageSet(tmp_path / "images").encode(of_run(run), tmp_path / "kept", CPU)
    Image.fromarray(255 - pixels).save(tmp_path / "images/1/a.png")
    after = ImageSet(tmp_path / "images").encode(of_run(run), tmp_path / "kept", CPU)
    ImageSet(tmp_path / "images").encode(of_run(run), tmp_path / "kept", CPU)
    assert encoded[0] == 4
    same = (before.features.load("cpu") == after.features.load("cpu")).all(dim=1)
    assert same[before.labels == 0].all() and not same[before.labels == 1].any()


def test_a_damaged_chunk_is_named(run, data, tmp_path):
    encoder, images = of_run(run), ImageSet(data["test"])
    images.encode(encoder, tmp_path, CPU)
    (chunk,) = tmp_path.glob("*/chunk_*")
    assert load_file(chunk)["features"].shape == (15, 16)
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{chunk} is damaged .*delete it"):
        images.encode(encoder, tmp_path, CPU)


def test_rows_are_read_over_the_bounds_of_chunks():
    table = torch.arange(40.0).view(10, 4)
    stored = Features(table.split(3))
    assert len(stored) == 10 and stored.num_features == 4
    assert torch.equal(stored.load("cpu"), table)
    for rows in ([], [0], [9], [2, 3], [0, 5, 6, 9], [3, 4, 5]):
        chosen = stored[np.array(rows, np.int64)]
        assert torch.equal(chosen.load("cpu"), table[rows])
    twice = stored[np.array([1, 4, 7, 9])][np.array([1, 3])]
    assert torch.equal(twice.load("cpu"), table[[4, 9]])
    assert torch.equal(torch.cat([*twice.parts("cpu")]), table[[4, 9]])


def test_standardising_and_centring_are_numpys():
    table = np.random.default_rng(0).normal(300, [1, 5, 0.1, 40], (50, 4))
    rows = torch.from_numpy(table.astype("float32"))
    standardised = Standardizer.of(Features(rows.split(7)), CPU)(rows)
    expected = (table - table.mean(axis=0)) / (table.std(axis=0, ddof=1) + 1e-5)
    np.testing.assert_allclose(standardised.numpy(), expected, rtol=1e-3, atol=2e-3)

    centred = table - table.mean(axis=1, keepdims=True)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(centre_rows(torch.from_numpy(table)).numpy(), expected)


def test_a_file_of_masks_and_other_errors_leave_no_result(run, data, tmp_path, capsys):
    flags = ["--checkpoint", str(run), "--train", data["train"], "--test", data["two"]]
    assert knn.main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert "3 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- several ranks ------------------------------------------------------------------------------


def test_two_ranks_find_what_one_finds(run, data, tmp_path):
    files = {"run": str(run), "train": data["train"], "test": data["test"]}
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert evaluate_all(**files, output=str(alone)) == [0] * 5
    codes = run_ranks(
        "tests.eval.ranked:evaluate_all", 2, tmp_path / "ranks", **files, output=str(together)
    )
    assert codes == [[0] * 5] * 2
    for name in ("knn", "low_shot", "cached_probe", "clustering", "reconstruct"):
        one, two = (json.loads((f / name / "result.json").read_text()) for f in (alone, together))
        assert (one.pop("num_ranks"), two.pop("num_ranks")) == (1, 2)
        for result in (one, two):
            for key in ("seconds", "command"):
                result.pop(key)
        measured = {key for key, value in one.items() if isinstance(value, float)}
        assert measured
        for key in measured:
            assert two.pop(key) == pytest.approx(one.pop(key), rel=1e-6), (name, key)
        assert one.pop("splits", None) == two.pop("splits", None)
        one.pop("restarts", None), two.pop("restarts", None)
        assert one == two
    chunks = [sorted(f.glob("features/*/chunk_*")) for f in (alone, together)]
    assert len(chunks[0]) == len(chunks[1]) > 1
    for one, two in zip(*chunks, strict=True):
        assert torch.equal(load_file(one)["features"], load_file(two)["features"])

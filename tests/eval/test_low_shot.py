import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from eval import low_shot
from eval.frozen.features import EncodedSets, ImageSet, LabelledFeatures
from eval.frozen.preprocess import centre_rows
from eval.frozen.regression import fit_regression
from eval.frozen.splits import draw_fraction, draw_per_class, read_lists
from eval.frozen.store import Features
from eval.low_shot import LowShotSettings, evaluate
from mlomae.errors import UserError

# --- the regression -----------------------------------------------------------------------------


def digits(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Images as vectors, centred and L2-normalised row by row, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = images - images.mean(axis=1, keepdims=True)
    return (images / np.linalg.norm(images, axis=1, keepdims=True))[:num_images], labels[
        :num_images
    ]


@pytest.mark.parametrize(("num_images", "penalty"), [(300, 0.01), (300, 1.0), (40, 0.05)])
def test_the_regression_is_scikit_learns(num_images, penalty):
    """C of scikit-learn is 1 / (n lambda), and lambda is penalty / n: C = 1 / penalty."""
    x, y = digits(num_images)
    reference = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(x, y)
    model = fit_regression(
        torch.from_numpy(x), torch.from_numpy(y), num_classes=10,
        penalty=penalty / num_images, max_passes=5000, tolerance=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(model.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-4)
    others, labels = digits(1797)
    agree = model.predict(torch.from_numpy(others)).numpy() == reference.predict(others)
    assert agree.mean() > 0.998 and (reference.predict(others) == labels).mean() > 0.5


def objective(weight: np.ndarray, x: np.ndarray, y: np.ndarray, penalty: float) -> float:
    logits = x @ weight.T
    top = logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(y)), y]
    return losses.mean() + penalty / 2 * (weight**2).sum()


@pytest.mark.parametrize("max_passes", [1, 5, 30])
def test_the_gap_bounds_the_distance_to_the_minimum(max_passes):
    x, y = digits(200)
    penalty = 0.01 / 200
    reference = LogisticRegression(C=100, fit_intercept=False, tol=1e-10, max_iter=10_000)
    lowest = objective(reference.fit(x, y).coef_, x, y, penalty)
    model = fit_regression(
        torch.from_numpy(x), torch.from_numpy(y), num_classes=10,
        penalty=penalty, max_passes=max_passes, tolerance=1e-9,
    )  # fmt: skip
    value = objective(model.weight.numpy(), x, y, penalty)
    assert model.num_passes <= max_passes + 2
    assert 0 < (value - lowest) / value <= model.gap


def test_images_in_parts_give_the_same_weights(monkeypatch):
    x, y = map(torch.from_numpy, digits(100))
    how = {"num_classes": 10, "penalty": 1e-3, "tolerance": 1e-10}
    whole = fit_regression(x, y, **how)
    monkeypatch.setattr("eval.frozen.regression._ROWS", 7)
    torch.testing.assert_close(fit_regression(x, y, **how).weight, whole.weight)


def test_both_sides_are_centred_and_normalised():
    """A shift and a scale of each image's own change nothing."""
    x, y = map(torch.from_numpy, digits(400))
    x = x.float()
    torch.testing.assert_close(centre_rows(3 * x + 5), x, rtol=1e-4, atol=1e-5)
    scale = torch.linspace(0.1, 10, 400)[:, None]
    settings = LowShotSettings()
    accuracies = []
    for images in (x, scale * x + 20 * scale):
        train, test = (
            LabelledFeatures(Features([images[part]]), y[part])
            for part in (slice(0, 200), slice(200, 400))
        )
        split = {"all": [np.arange(200)]}
        accuracies.append(evaluate(EncodedSets(train, test, 10), split, settings)["accuracy_all"])
    assert accuracies[0] > 0.85 and accuracies[1] == pytest.approx(accuracies[0], abs=0.01)


# --- splits -------------------------------------------------------------------------------------


def test_splits_are_drawn_by_class_with_a_seed(data):
    info = ImageSet(data["train"]).info
    for seed in (0, 1):
        one, five = (draw_per_class(info, count, seed) for count in (1, 5))
        assert np.bincount(info.labels[five]).tolist() == [5, 5, 5]
        assert set(one) < set(five) and sorted(set(five.tolist())) == five.tolist()
    assert not np.array_equal(draw_per_class(info, 5, 0), draw_per_class(info, 5, 1))
    assert np.array_equal(draw_per_class(info, 5, 0), draw_per_class(info, 5, 0))
    assert np.bincount(info.labels[draw_fraction(info, 0.1, 0)]).tolist() == [2, 2, 2]


def test_lists_name_images_of_a_folder(data, tmp_path):
    folder = data["train"].removesuffix(".beton")
    info = ImageSet(folder).info
    names = ["red/3.png", "green/3.png", "blue/17.png", "blue/0.png"]
    (tmp_path / "four.txt").write_text("\n".join(names) + "\n\n")
    indices = read_lists(info, [tmp_path / "four.txt"])["four"]
    assert sorted(info.classes[label] for label in info.labels[indices]) == [
        "blue", "blue", "green", "red",
    ]  # fmt: skip
    converted = ImageSet(data["train"]).info  # the same order of samples
    assert info.labels.tolist() == converted.labels.tolist()
    pixels = [info.read(int(i)) for i in indices]
    from PIL import Image

    expected = [np.asarray(Image.open(f"{folder}/{name}")) for name in names]
    assert all(any(np.array_equal(p, e) for e in expected) for p in pixels)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("red/3.png\nred/99.png\nblue/98.png", "names red/99.png, which is no image of"),
        ("3.png", "names 3.png, .* one of several with this name"),
        ("red/3.png\ngreen/3.png", "has no image of class 'blue'"),
        (None, "cannot be read"),
    ],
)
def test_bad_lists_are_one_sentence(data, tmp_path, text, sentence):
    info = ImageSet(data["train"].removesuffix(".beton")).info
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_lists(info, [tmp_path / "list.txt"])


# --- the command --------------------------------------------------------------------------------


def test_the_command_gives_mean_and_deviation_over_splits(run, data):
    flags = ["--checkpoint", str(run), "--train", data["train"], "--test", data["test"]]
    shots = ["--num_per_class", "1", "5", "--fractions", "0.5", "--num_splits", "3"]
    assert low_shot.main([*flags, *shots]) == 0
    result = json.loads((run / "eval" / "low_shot" / "result.json").read_text())
    assert result["accuracy_5_per_class"] > 0.8
    alone = {"1_per_class": [], "5_per_class": [], "50_percent": []}
    for split in result["splits"]:
        alone[split["kind"]].append(split["accuracy"])
        assert split["num_images"] == {"1": 3, "5": 15, "50": 30}[split["kind"].split("_")[0]]
    assert [len(values) for values in alone.values()] == [3, 3, 1]
    for kind in ("1_per_class", "5_per_class"):
        assert result[f"accuracy_{kind}"] == pytest.approx(np.mean(alone[kind]))
        assert result[f"accuracy_{kind}_std"] == pytest.approx(np.std(alone[kind], ddof=1))
    assert result["accuracy_50_percent"] == alone["50_percent"][0]


def test_the_command_takes_lists(run, data, tmp_path):
    lists = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, file in enumerate(lists):
        lines = [f"{name}/{i}.png" for name in ("red", "green", "blue") for i in (number, 5)]
        file.write_text("\n".join(lines))
    folder = data["train"].removesuffix(".beton")
    flags = ["--checkpoint", str(run), "--train", folder, "--test", data["test"]]
    assert low_shot.main([*flags, "--split_list", *map(str, lists)]) == 0
    result = json.loads((run / "eval" / "low_shot" / "result.json").read_text())
    assert [split["num_images"] for split in result["splits"]] == [6, 6]
    assert result["num_train_images"] == 9 and result["accuracy_split_list"] > 0.5
    assert result["split_list"] == [str(file) for file in lists]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_per_class", "21"], "has 20 images, too few for 21 per class"),
        (["--num_per_class", "1", "--fractions", "0.01"], "too few for 1.00% of them"),
        (["--num_per_class", "--fractions"], "there is no split"),
        (["--split_list", "x.txt"], "--split_list needs file names"),
    ],
)
def test_bad_splits_are_one_sentence(run, data, capsys, flags, sentence):
    common = ["--checkpoint", str(run), "--train", data["train"], "--test", data["test"]]
    assert low_shot.main([*common, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (run / "eval").exists()

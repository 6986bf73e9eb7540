"""Colour changes against torchvision, timm and a float64 blur, and their randomness."""

import itertools
import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_ffcv import Augmentation, DataError
from data_ffcv.pixels.colours import Colours, SeededRandAugment, erase

JITTER = (0.4, 0.5, 0.2, 0.1)
BYOL: dict[str, Any] = {
    "color_jitter": JITTER,
    "color_jitter_prob": 0.8,
    "gaussian_blur_prob": 0.5,
    "grayscale_prob": 0.2,
    "solarize_prob": 0.2,
}


def settings(image_size: int = 32, **colours: Any) -> Augmentation:
    return Augmentation("random_resized_crop", image_size, **colours)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def changed(pixels: np.ndarray, augmentation: Augmentation, *key: int) -> np.ndarray:
    """`pixels` after the colours of key (seed, view, epoch, sample)."""
    seed, view, epoch, sample = key
    result = pixels.copy()
    Colours(augmentation, seed, view)(result, epoch, sample)
    return result


@pytest.fixture
def jitters(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Notes (which of brightness, contrast, saturation, hue; factor) of every adjustment."""
    from torchvision.transforms import functional

    noted: list[tuple[int, float]] = []
    for number, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        adjust = getattr(functional, f"adjust_{name}")

        def note(image: Image.Image, factor: float, number=number, adjust=adjust) -> Image.Image:
            noted.append((number, factor))
            return adjust(image, factor)

        monkeypatch.setattr(functional, f"adjust_{name}", note)
    return noted


# --- randomness --------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [BYOL, {"auto_augment": "rand-m9-n3-mstd0.5-inc1"}])
def test_pixels_depend_on_the_key_alone(colours: dict[str, Any]):
    pixels, augmentation = random_pixels(64, 24, 40), settings(**colours)
    keys = list(itertools.product((0, 1), (3, 2**40)))

    def run(num_workers: int) -> np.ndarray:
        change, results = Colours(augmentation, 7, 1), [pixels.copy() for _ in keys]
        calls = [
            (result[i], *key) for result, key in zip(results, keys, strict=True) for i in range(64)
        ]
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(lambda call: change(*call), calls))
        return np.stack(results)

    one = run(num_workers=1)
    assert np.array_equal(one, run(num_workers=4))
    assert len({result.tobytes() for result in one}) == len(keys)


@pytest.mark.parametrize("other", [(8, 0, 0, 0), (7, 1, 0, 0), (7, 0, 1, 0), (7, 0, 0, 1)])
def test_seed_view_epoch_and_sample_each_count(other: tuple[int, int, int, int]):
    pixels, augmentation = random_pixels(8, 8), settings(color_jitter=JITTER)
    first = changed(pixels, augmentation, 7, 0, 0, 0)
    assert np.array_equal(first, changed(pixels, augmentation, 7, 0, 0, 0))
    assert not np.array_equal(first, changed(pixels, augmentation, *other))


def test_global_generators_do_not_move():
    def states() -> tuple[object, str, bytes]:
        return (
            random.getstate(),
            repr(np.random.get_state()),
            torch.get_rng_state().numpy().tobytes(),
        )

    before = states()
    pixels = random_pixels(8, 8)
    for sample in range(40):
        changed(pixels, settings(auto_augment="rand-m9-mstd0.5", **BYOL), 0, 0, 0, sample)
    erase(torch.zeros(8, 3, 32, 32), settings(random_erasing_prob=1.0), range(8))
    assert states() == before


def test_timm_itself_is_left_alone():
    import timm.data.auto_augment

    Colours(settings(auto_augment="rand-m9"), 0, 0)
    assert timm.data.auto_augment.random is random


@pytest.mark.parametrize(
    "colours",
    [
        {"color_jitter": JITTER, "color_jitter_prob": 0.3},
        {"gaussian_blur_prob": 0.3},
        {"grayscale_prob": 0.3},
        {"solarize_prob": 0.3},
    ],
)
def test_probabilities(colours: dict[str, Any]):
    pixels, change = random_pixels(4, 4), Colours(settings(**colours), 0, 0)
    num_changed = 0
    for sample in range(1000):
        result = pixels.copy()
        change(result, 0, sample)
        num_changed += not np.array_equal(result, pixels)
    # Four standard deviations of the binomial; blurs below 0.25 pixels may change nothing.
    blind = 0.05 * 300 if "gaussian_blur_prob" in colours else 0
    assert abs(num_changed - 300) < 4 * math.sqrt(1000 * 0.3 * 0.7) + blind


def test_nothing_asked_changes_nothing():
    pixels = random_pixels(9, 7)
    assert np.array_equal(changed(pixels, settings(), 0, 0, 0, 0), pixels)
    still = settings(color_jitter=(0.0, 0.0, 0.0, 0.0))
    assert np.array_equal(changed(pixels, still, 0, 0, 0, 0), pixels)


# --- jitter, blur, greyscale, solarisation -----------------------------------------------------


def test_jitter_equals_torchvision(jitters: list, monkeypatch: pytest.MonkeyPatch):
    from torchvision.transforms import ColorJitter

    pixels = random_pixels(20, 30)
    for sample in range(12):
        jitters.clear()
        result = changed(pixels, settings(color_jitter=JITTER), 3, 0, 0, sample)
        order, factors = [number for number, _ in jitters], dict(jitters)
        assert sorted(order) == [0, 1, 2, 3]
        drawn = (torch.tensor(order), *(factors[number] for number in range(4)))
        monkeypatch.setattr(ColorJitter, "get_params", staticmethod(lambda *_, d=drawn: d))
        expected = ColorJitter(*JITTER)(Image.fromarray(pixels))
        assert np.array_equal(result, np.asarray(expected))


def test_jitter_draws_as_torchvision(jitters: list):
    """Factors are uniform (Kolmogorov-Smirnov, p = 0.001) and all 24 orders equally frequent."""
    from torchvision.transforms import ColorJitter

    strengths = (0.4, 1.5, 0.2, 0.1)
    pixels, change = random_pixels(1, 1), Colours(settings(color_jitter=strengths), 0, 0)
    num_draws = 2400
    for sample in range(num_draws):
        change(pixels.copy(), 0, sample)
    library = ColorJitter(*strengths)
    bounds = (library.brightness, library.contrast, library.saturation, library.hue)
    for number, (low, high) in enumerate(bounds):
        factors = np.sort([factor for which, factor in jitters if which == number])
        uniform = low + (high - low) * (np.arange(num_draws) + 0.5) / num_draws
        assert len(factors) == num_draws and low <= factors[0] and factors[-1] <= high
        assert np.abs(factors - uniform).max() < 1.95 / math.sqrt(num_draws) * (high - low)
    orders = Counter(
        tuple(which for which, _ in jitters[i : i + 4]) for i in range(0, 4 * num_draws, 4)
    )
    assert len(orders) == 24
    assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 49.7  # chi^2(23), 0.001


@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
def test_blur_is_a_gaussian(sigma: float):
    """Pillow's three box blurs stay within three grey levels of the true one, on white noise."""
    pixels = random_pixels(40, 50)
    augmentation = settings(gaussian_blur_prob=1.0, gaussian_blur_sigma=(sigma, sigma))
    blurred = changed(pixels, augmentation, 0, 0, 0, 0)
    offsets = np.arange(-10, 11)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    expected = np.pad(pixels.astype(np.float64), ((10, 10), (10, 10), (0, 0)), "edge")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, weights, "valid")
    difference = blurred - expected
    assert np.sqrt((difference**2).mean()) < 3.0
    assert np.sqrt(((pixels - expected) ** 2).mean()) > 30  # so 3 says something


def test_blur_draws_the_deviation_uniformly(monkeypatch: pytest.MonkeyPatch):
    from data_ffcv.pixels import colours

    drawn: list[float] = []
    blur = colours.ImageFilter.GaussianBlur
    monkeypatch.setattr(
        colours.ImageFilter, "GaussianBlur", lambda sigma: drawn.append(sigma) or blur(sigma)
    )
    change = Colours(settings(gaussian_blur_prob=1.0, gaussian_blur_sigma=(0.1, 2.0)), 0, 0)
    for sample in range(1000):
        change(random_pixels(1, 1), 0, sample)
    uniform = 0.1 + 1.9 * (np.arange(1000) + 0.5) / 1000
    assert np.abs(np.sort(drawn) - uniform).max() < 1.95 / math.sqrt(1000) * 1.9


def test_greyscale_and_solarisation_equal_torchvision():
    from torchvision.transforms import RandomGrayscale, RandomSolarize

    pixels = random_pixels(20, 30)
    pixels[0, :2] = [[127], [128]]  # around the threshold
    image = Image.fromarray(pixels)
    grey = changed(pixels, settings(grayscale_prob=1.0), 0, 0, 0, 0)
    assert np.array_equal(grey, np.asarray(RandomGrayscale(p=1)(image)))
    solar = changed(pixels, settings(solarize_prob=1.0), 0, 0, 0, 0)
    assert np.array_equal(solar, np.asarray(RandomSolarize(128, p=1)(image)))


def test_order_is_jitter_blur_greyscale_solarisation():
    pixels = random_pixels(16, 16)
    blurs = {"gaussian_blur_prob": 1.0, "gaussian_blur_sigma": (2.0, 2.0)}
    every = changed(pixels, settings(grayscale_prob=1.0, solarize_prob=1.0, **blurs), 0, 0, 0, 0)
    expected = pixels
    for step in (blurs, {"grayscale_prob": 1.0}, {"solarize_prob": 1.0}):
        expected = changed(expected, settings(**step), 0, 0, 0, 0)
    assert np.array_equal(every, expected)
    # Brightness 0 or 2 before the blur: black, or clipped before it is blurred.
    jitter = {"color_jitter": (1.0, 0.0, 0.0, 0.0)}
    jittered = changed(pixels, settings(**jitter), 0, 0, 0, 0)
    both = changed(pixels, settings(**jitter, **blurs), 0, 0, 0, 0)
    assert np.array_equal(both, changed(jittered, settings(**blurs), 0, 0, 0, 0))


# --- RandAugment -------------------------------------------------------------------------------


def timm_rand_augment(config: str, image_size: int) -> Any:
    """RandAugment as timm's transform factory, and so MAE's fine-tuning, sets it up."""
    from timm.data import IMAGENET_DEFAULT_MEAN, create_transform
    from timm.data.auto_augment import RandAugment

    whole = create_transform(
        image_size,
        is_training=True,
        auto_augment=config,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
    )
    return next(step for step in whole.transforms if isinstance(step, RandAugment))


class Dictated:
    """A generator that chooses and seeds what it was made with."""

    def __init__(self, chosen: list[int], seed: int) -> None:
        self.chosen, self.seed = chosen, seed

    def choice(self, *_: Any, **__: Any) -> list[int]:
        return self.chosen

    def integers(self, *_: Any, **__: Any) -> int:
        return self.seed


@pytest.mark.parametrize(
    "config", ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.7", "rand-m7-mstd101-tweights", "rand-t3a"]
)
def test_rand_augment_equals_timm(config: str, monkeypatch: pytest.MonkeyPatch):
    ours = SeededRandAugment(settings(28, auto_augment=config))
    theirs = timm_rand_augment(config, 28)
    assert [operation.hparams for operation in ours.transform.ops] == [
        operation.hparams for operation in theirs.ops
    ]
    image = Image.fromarray(random_pixels(28, 28))
    state, rng = random.getstate(), np.random.default_rng(0)
    for seed in range(60):
        chosen = rng.choice(len(theirs.ops), theirs.num_layers).tolist()
        picked = [theirs.ops[number] for number in chosen]
        monkeypatch.setattr(np.random, "choice", lambda *_, picked=picked, **__: picked)
        random.seed(seed)
        expected = theirs(image)
        random.setstate(state)
        assert np.array_equal(ours(image, Dictated(chosen, seed)), expected)


@pytest.mark.parametrize(("config", "repeats"), [("rand-n3", True), ("rand-n3-tweights", False)])
def test_rand_augment_chooses_as_timm(config: str, repeats: bool):
    ours = SeededRandAugment(settings(auto_augment=config))
    operations = ours.transform.ops
    uses: list[list[str]] = []
    ours.transform.ops = [
        lambda image, name=operation.name: uses[-1].append(name) or image
        for operation in operations
    ]
    rng, num_draws = np.random.default_rng(0), 3000
    for _ in range(num_draws):
        uses.append([])
        ours(Image.new("RGB", (1, 1)), rng)
    assert any(len(set(names)) < 3 for names in uses) == repeats
    theirs, state = timm_rand_augment(config, 32), np.random.get_state()
    np.random.seed(1)
    names = [operation.name for operation in theirs.ops]
    theirs.ops = names
    weights = theirs.choice_weights
    drawn = [
        np.random.choice(names, 3, replace=weights is None, p=weights) for _ in range(num_draws)
    ]
    np.random.set_state(state)
    frequent, expected = Counter(itertools.chain(*uses)), Counter(np.concatenate(drawn).tolist())
    for name in names:
        deviation = math.sqrt(frequent[name] + expected[name])
        assert abs(frequent[name] - expected[name]) <= 4 * deviation, name


@pytest.mark.parametrize(
    "config",
    [
        "augmix-m3", "rand_m9", "rand-m", "rand-9", "rand-x9", "rand-m9-", "rand-mstdx",
        "rand-n0", "rand-inc2", "rand-tweight", "rand-m9.5", "rand-n16-tweights", "rand-mm9",
    ],
)  # fmt: skip
def test_bad_auto_augment_is_named(config: str):
    with pytest.raises(DataError, match="auto_augment"):
        Colours(settings(auto_augment=config), 0, 0)


# --- random erasing ----------------------------------------------------------------------------


def test_erasing_equals_timm():
    from timm.data.random_erasing import RandomErasing

    images = torch.randn(16, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    ours, expected = images.clone(), images.clone()
    erase(ours, settings(random_erasing_prob=0.5), range(11, 27))
    state = random.getstate()
    with torch.random.fork_rng([]):
        for key, image in enumerate(expected, 11):
            random.seed(key)
            torch.manual_seed(key)
            RandomErasing(0.5, mode="pixel", device="cpu")(image)
    random.setstate(state)
    assert torch.equal(ours, expected)
    touched = (ours != images).flatten(1).any(dim=1)
    assert 0 < touched.sum() < 16


def test_erasing_depends_on_the_key():
    augmentation = settings(random_erasing_prob=1.0)
    first, other = torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
    keys = [2**64 - 1, 5, 0, 7]
    erase(first, augmentation, keys)
    torch.rand(3)
    erase(other[2:], augmentation, keys[2:])
    erase(other[:2], augmentation, keys[:2])
    assert torch.equal(first, other)
    other.zero_()
    erase(other, augmentation, [1, 5, 1, 7])
    assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == [False, True] * 2


@pytest.mark.gpu
def test_erasing_on_the_gpu_leaves_its_generator():
    augmentation = settings(random_erasing_prob=1.0)
    first, other = torch.zeros(2, 4, 3, 32, 32, device="cuda")
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    erase(first, augmentation, range(4))
    after = torch.cuda.get_rng_state(), torch.get_rng_state()
    assert all(map(torch.equal, before, after))
    torch.rand(3, device="cuda")
    erase(other, augmentation, range(4))
    assert torch.equal(first, other) and (first != 0).any()

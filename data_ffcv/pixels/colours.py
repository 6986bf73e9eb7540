"""Changes to colours that follow the crop, on Pillow images, and random erasing.

Each image draws from a counter-based generator of its own: the result depends neither on the
thread nor on what was drawn before, and the process's global generators do not move.
"""

import importlib.util
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageFilter

from data_ffcv.errors import DataError
from data_ffcv.pixels.augmentation import Augmentation
from data_ffcv.sources.torchvision_import import fix_torchvision_import

_IMAGENET_MEAN = (124, 116, 104)  # of 255; MAE fills with it on every data set
_SOLARIZE_THRESHOLD = 128


class Colours:
    """What an `Augmentation` does to the colours of one image.

    RandAugment first, then, as BYOL (Grill et al. 2020) and MAE-CT do: jitter, blur, greyscale,
    solarisation. Threads may share an instance.

    Args:
        augmentation: Its geometry is not used.
        seed: The stream's seed, in [0, 2^64).
        view: Tells several views of the same sample apart.

    Raises:
        DataError: `auto_augment` asks for more weighted operations than there are.
    """

    def __init__(self, augmentation: Augmentation, seed: int, view: int) -> None:
        fix_torchvision_import()
        self.augmentation = augmentation
        self._key = np.array([seed, view], np.uint64)
        self._rand_augment = SeededRandAugment(augmentation) if augmentation.auto_augment else None

    def __call__(self, pixels: np.ndarray, epoch: int, sample: int) -> None:
        """Changes uint8 [height, width, 3] in place, by (seed, view, epoch, sample) alone."""
        # The generator counts in the lower words, so no two samples ever share a number.
        counter = np.array([0, 0, epoch, sample], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        image = Image.fromarray(pixels)
        if self._rand_augment:
            image = self._rand_augment(image, rng)
        pixels[:] = self._byol(image, rng)

    def _byol(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        from torchvision.transforms import functional

        augmentation = self.augmentation
        if augmentation.color_jitter and rng.random() < augmentation.color_jitter_prob:
            image = _jitter(image, augmentation.color_jitter, rng)
        if rng.random() < augmentation.gaussian_blur_prob:
            # Pillow's blur, as in MAE-CT: it needs no kernel size, and a sixth of the time of
            # torchvision's.
            sigma = rng.uniform(*augmentation.gaussian_blur_sigma)
            image = image.filter(ImageFilter.GaussianBlur(sigma))
        if rng.random() < augmentation.grayscale_prob:
            image = functional.rgb_to_grayscale(image, num_output_channels=3)
        if rng.random() < augmentation.solarize_prob:
            image = functional.solarize(image, _SOLARIZE_THRESHOLD)
        return image


def _jitter(
    image: Image.Image, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> Image.Image:
    """torchvision's ColorJitter: four factors, applied in random order."""
    from torchvision.transforms import functional

    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    *others, hue = strengths
    factors = [rng.uniform(max(0, 1 - strength), 1 + strength) for strength in others]
    factors.append(rng.uniform(-hue, hue))
    for number in rng.permutation(4):
        if strengths[number] > 0:  # a hue of 0 would still pass through rounded HSV
            image = adjust[number](image, factors[number])
    return image


class SeededRandAugment:
    """timm's RandAugment with its random draws taken from the caller's generator.

    Attributes:
        transform: timm's, which holds the operations and their weights.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        config = augmentation.auto_augment
        self._timm = _load_auto_augment()
        self.transform = self._timm.rand_augment_transform(
            config,
            {
                "translate_const": int(0.45 * min(augmentation.height, augmentation.width)),
                "img_mean": _IMAGENET_MEAN,
                "interpolation": Image.Resampling.BICUBIC,
            },
        )
        weighted = self.transform.choice_weights is not None
        if weighted and self.transform.num_layers > len(self.transform.ops):
            raise DataError(
                f"auto_augment {config!r} chooses among {len(self.transform.ops)} weighted "
                "operations without repetition; lower n"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        transform = self.transform
        weights = transform.choice_weights
        chosen = rng.choice(
            len(transform.ops), transform.num_layers, replace=weights is None, p=weights
        )
        self._timm.random.seed(int(rng.integers(2**64, dtype=np.uint64)))
        for number in chosen:
            image = transform.ops[number](image)
        return image


class _ThreadRandom(threading.local):
    """Has the functions of the module `random`; each thread draws from its own generator."""

    def __init__(self) -> None:
        self._generator = random.Random()

    def __getattr__(self, name: str) -> object:
        return getattr(self._generator, name)


def _load_auto_augment() -> ModuleType:
    """Returns a copy of timm's module whose operations draw from the calling thread's generator.

    They ask the module `random`, which all threads and the training share. A copy leaves timm
    itself untouched.
    """
    spec = importlib.util.find_spec("timm.data.auto_augment")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.random is not random:
        raise RuntimeError("timm.data.auto_augment no longer draws from `random`; pin timm 1.0")
    vars(module)["random"] = _ThreadRandom()
    return module


def erase(images: torch.Tensor, augmentation: Augmentation, keys: Iterable[int]) -> None:
    """Overwrites one rectangle of some images with Gaussian noise, in place.

    Zhong et al. 2020 with the noise of timm's mode "pixel", as MAE fine-tunes. A pure function
    of its arguments: the global generators are as before when it returns.

    Args:
        images: [batch, 3, height, width], normalised, on any device.
        augmentation: Gives `random_erasing_prob`.
        keys: In [0, 2^64), one for each image: the draws of one image depend on no other.
    """
    fix_torchvision_import()
    from timm.data.random_erasing import RandomErasing

    eraser = RandomErasing(augmentation.random_erasing_prob, mode="pixel", device=images.device)  # type: ignore[no-untyped-call]
    with _kept_states(images.device):
        for image, key in zip(images, keys, strict=True):
            _seed(key, images.device)
            eraser(image)


@contextmanager
def _kept_states(device: torch.device) -> Iterator[None]:
    """Restores what timm's RandomErasing draws from: `random` and torch's generator."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


def _seed(key: int, device: torch.device) -> None:
    random.seed(key)
    if device.type == "cuda":
        with torch.cuda.device(device):  # the other devices' states are not restored
            torch.cuda.manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)

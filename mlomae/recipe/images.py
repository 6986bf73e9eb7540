"""The sections on training images: where they are, and what is done to them."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from data_ffcv import Augmentation
from mlomae.recipe.section import (
    FilePath,
    Fraction,
    NumClasses,
    Probability,
    Refusal,
    Section,
    UpToOne,
)

_RisingPair = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)]
_Triple = Annotated[tuple[float, float, float], Field(strict=False)]
_PositiveTriple = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)]
_Jitter = Annotated[
    tuple[
        NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Annotated[float, Field(ge=0, le=0.5)]
    ],
    Field(strict=False),
]


class AugmentationRecipe(Section):
    """What is done to training images; the colours' part is off unless it is asked for."""

    kind: Literal["random_resized_crop", "pad_crop", "center_crop", "random_scale_crop"] = (
        "random_resized_crop"
    )
    """How image_size pixels are cut from an image."""
    scale: _RisingPair = (0.2, 1.0)
    """Smallest and largest share of the area kept, random_resized_crop; smallest and largest
    factor on the image, random_scale_crop."""
    ratio: _RisingPair = (3 / 4, 4 / 3)
    """Smallest and largest width over height of what is cut; random_resized_crop only."""
    padding: NonNegativeInt = 4
    """Zero pixels added on each side before the crop; pad_crop only."""
    flip: bool = True
    """Mirror left to right with probability one half."""
    interpolation: Literal["bicubic", "area"] = "bicubic"
    """Resizing kernel; bicubic is antialiased, area is faster."""
    resize: PositiveInt | None = None
    """Length that the shorter side gets before center_crop cuts, or before random_scale_crop
    applies its factor; null keeps the size."""
    max_class_ratio: UpToOne = 1.0
    """Draw up to ten windows until no class has a larger share of the labelled pixels;
    random_scale_crop only."""
    auto_augment: str = ""
    """RandAugment in timm's words, rand-m9-mstd0.5-inc1; "" is off."""
    color_jitter: _Jitter | None = None
    """Largest changes of brightness, contrast, saturation and hue; null is off."""
    color_jitter_prob: Probability = 1.0
    """Probability of the colour jitter."""
    grayscale_prob: Probability = 0.0
    """Probability of losing the colours."""
    gaussian_blur_prob: Probability = 0.0
    """Probability of a Gaussian blur of 0.1 to 2 pixels."""
    solarize_prob: Probability = 0.0
    """Probability of inverting all values of 128 and more."""
    random_erasing_prob: Probability = 0.0
    """Probability of overwriting a rectangle with noise."""

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        low, high = self.scale
        if low > high:
            raise Refusal("scale", f"is [{low}, {high}], but must be two rising numbers")
        if high > 1 and self.kind != "random_scale_crop":
            raise Refusal("scale", f"is [{low}, {high}], but must be two rising shares in (0, 1]")
        if self.ratio[0] > self.ratio[1]:
            raise Refusal("ratio", f"is {list(self.ratio)}, but must be two rising numbers")
        return self

    def build(self, image_size: int | tuple[int, int]) -> Augmentation:
        """What `data_ffcv` makes of it.

        Raises:
            DataError: a value is out of range.
        """
        return Augmentation(image_size=image_size, **self.model_dump())


class ImagesRecipe(Section):
    """The images of any run."""

    train: FilePath
    """The training images: a .beton file, or a folder with a folder of images per class."""
    backend: Literal["auto", "ffcv", "threads"] = "auto"
    """What reads them: ffcv reads .beton files, threads both; auto takes ffcv where it can. The
    batches are the same."""
    mean: _Triple = (0.485, 0.456, 0.406)
    """Mean of each channel, pixel values in [0, 1]."""
    std: _PositiveTriple = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, pixel values in [0, 1]."""
    augmentation: AugmentationRecipe = AugmentationRecipe()
    """Of all levels that have none of their own."""
    num_workers: PositiveInt = 1
    """Loader threads per stream and rank."""


class DataRecipe(ImagesRecipe):
    """The images of pretraining."""

    num_classes: NumClasses | None = None
    """Number of classes of the labels; mlo_mae requires it or a section downstream."""
    mask_fraction: Fraction = 0.2
    """Share of the labelled images for the mask level, drawn by class and seed; mlo_mae only."""


class DownstreamRecipe(Section):
    """What classifier and mask learn from, where it is not classification of data.train."""

    task: Literal["classification", "segmentation"]
    """Labels of whole images, or masks with 255 for pixels without a class."""
    train: FilePath
    """The labelled images: a .beton file, or for classification a folder with a folder per class.
    """
    num_classes: NumClasses
    """Number of their classes."""
    augmentation: AugmentationRecipe | None = None
    """Of classifier and mask, where they have none of their own; null takes data.augmentation."""


class LabelledRecipe(ImagesRecipe):
    """The images of a run that learns from labels and is counted on others."""

    test: FilePath
    """The images that accuracy is counted on; likewise."""
    num_classes: NumClasses
    """Number of classes of both."""

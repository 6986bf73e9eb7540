"""The whole recipe: what every run has, and every run of one level."""

from typing import ClassVar

from pydantic import NonNegativeInt, PositiveFloat, model_validator
from typing_extensions import Self

from data_ffcv import Augmentation
from mlomae.errors import UserError
from mlomae.recipe.images import ImagesRecipe
from mlomae.recipe.levels import CheckpointRecipe, LevelRecipe, MonitorRecipe
from mlomae.recipe.model import EncoderRecipe
from mlomae.recipe.section import FilePath, FilePaths, Names, Refusal, Section


class RunRecipe(Section):
    """What every training run has; each kind of run adds its levels."""

    method: str
    """What is trained."""
    seed: NonNegativeInt = 0
    """Seed of every random draw: weights, split, data order, crops, masks, dropout."""
    output_dir: FilePath
    """Folder of checkpoints, metrics and pictures."""
    # The literature counts cycles: with k1 = 2, the "50 epochs" of the MLO-MAE paper are
    # 100 passes of the encoder over its images, so they are written `epochs: 100` here.
    epochs: PositiveFloat
    """Passes over the training images of the first level, whatever steps_per_cycle is."""
    init_from: FilePaths = ()
    """Weights to start from: a file or folder, or several that make one model: published MAE and
    MAE-CT files, timm, Hugging Face, a run of this project."""
    init_from_expected: Names = ()
    """Names which may be missing from init_from or left over, with * for any text."""
    model: EncoderRecipe
    data: ImagesRecipe
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    monitor: MonitorRecipe = MonitorRecipe()

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The levels which the run trains, by name, lowest first."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        for name, level in self.levels.items():
            if level.warmup_epochs >= self.epochs:
                problem = f"is {level.warmup_epochs:g}, but must be below epochs {self.epochs:g}"
                raise Refusal(f"{name}.warmup_epochs", problem)
        return self

    @model_validator(mode="after")
    def _check_init_from(self) -> Self:
        if self.init_from_expected and not self.init_from:
            raise Refusal("init_from_expected", "is given without init_from: add or remove one")
        return self


class SingleLevelRecipe(RunRecipe):
    """A run of one level, which takes one optimizer step a cycle.

    Attributes:
        level_name: of the level, and of its section.
        activity: what an error calls the run.
    """

    level_name: ClassVar[str]
    activity: ClassVar[str]

    @property
    def level(self) -> LevelRecipe:
        """The only level."""
        level: LevelRecipe = getattr(self, self.level_name)
        return level

    @property
    def levels(self) -> dict[str, LevelRecipe]:
        """The only level by its name."""
        return {self.level_name: self.level}

    @property
    def train_augmentation(self) -> Augmentation:
        """What is done to the training images."""
        section = self.level.augmentation or self.data.augmentation
        return section.build(self.model.image_size)

    def check_num_images(self, num_images: int) -> None:
        """Refuse fewer training images than a batch has.

        Raises:
            UserError: names the key.
        """
        if num_images < self.level.batch_size:
            raise UserError(
                f"{self.level_name}.batch_size is {self.level.batch_size}, but {self.data.train} "
                f"has {num_images} images: lower it, or give more images"
            )

    @model_validator(mode="after")
    def _check_level(self) -> Self:
        for key in ("num_views", "steps_per_cycle"):
            number = getattr(self.level, key)
            if number != type(self.level).model_fields[key].default:
                problem = f"is {number}, but {self.activity} has only one: remove it"
                raise Refusal(f"{self.level_name}.{key}", problem)
        return self

"""The whole recipes: what every run has, and that of pretraining."""

from pydantic import NonNegativeInt, PositiveFloat, model_validator
from typing_extensions import Self

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

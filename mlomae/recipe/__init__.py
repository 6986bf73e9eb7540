"""Typed recipes of training runs: their sections, and how files are read, checked and written.

The recipe of each kind of run stands beside its program and is made of these sections.
"""

from mlomae.recipe.hypergradient import HypergradientRecipe
from mlomae.recipe.images import (
    AugmentationRecipe,
    DataRecipe,
    DownstreamRecipe,
    ImagesRecipe,
    LabelledRecipe,
)
from mlomae.recipe.levels import CheckpointRecipe, ClassifierRecipe, LevelRecipe, MonitorRecipe
from mlomae.recipe.load import (
    RESULT_NEUTRAL_KEYS,
    differing_keys,
    dump_recipe,
    find_recipe,
    load_recipe,
    read_values,
)
from mlomae.recipe.model import EncoderRecipe, MaskingRecipe, ModelRecipe
from mlomae.recipe.run import RunRecipe, SingleLevelRecipe

__all__ = [
    "RESULT_NEUTRAL_KEYS",
    "AugmentationRecipe",
    "CheckpointRecipe",
    "ClassifierRecipe",
    "DataRecipe",
    "DownstreamRecipe",
    "EncoderRecipe",
    "HypergradientRecipe",
    "ImagesRecipe",
    "LabelledRecipe",
    "LevelRecipe",
    "MaskingRecipe",
    "ModelRecipe",
    "MonitorRecipe",
    "RunRecipe",
    "SingleLevelRecipe",
    "differing_keys",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "read_values",
]

"""A tiny set of images and a tiny recipe, which these tests share."""

import pytest

from mlomae.contrastive.recipe import MaeCtRecipe, TuneRun
from mlomae.recipe import load_recipe
from tests.contrastive.runs import Setup


@pytest.fixture(scope="session")
def tiny_setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """For launches that are refused."""
    return Setup(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tune_run(tiny_setup: Setup) -> TuneRun:
    """The recipe of a third step."""
    recipe: MaeCtRecipe = load_recipe(tiny_setup.recipe, MaeCtRecipe)
    return recipe.tune_run()

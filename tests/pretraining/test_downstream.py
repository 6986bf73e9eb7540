"""MLO-MAE whose upper levels learn from other images or from masks, and MAE on two views."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_ffcv import inspect_images, open_stream
from data_ffcv.convert import convert
from mlomae.pretraining.images import plan_images
from mlomae.pretraining.mae import BaselineReconstruction
from mlomae.pretraining.masks import MaskedBatch
from mlomae.pretraining.program import PretrainingProgram
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.pretraining.task import MaePretraining
from mlomae.recipe import load_recipe
from tests.pretraining.test_bad_input import refused  # noqa: F401
from tests.ranks import run_ranks
from tests.runs import Setup, build_task, contents, drive, metrics_rows

# As many classes as fill both ranks' shards: ZeRO-3 leaves what pads them uninitialised.
NUM_SCENES, NUM_CLASSES = 60, 4
COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220), (200, 200, 200))
LAST = "checkpoints/step_00000008"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12x12 images of four squares, each in the colour of its class; a border has no class."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for name in ("images", "annotations"):
        (folder / name).mkdir()
    for number in range(NUM_SCENES):
        mask = rng.integers(NUM_CLASSES, size=(2, 2)).repeat(6, 0).repeat(6, 1)
        pixels = np.array(COLOURS)[mask] + rng.integers(-30, 30, (12, 12, 3))
        mask[0], mask[-1] = 255, 255
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "annotations" / f"{number}.png")
    path = folder / "scenes.beton"
    convert("segmentation", folder, path)
    return path


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of two classes, of another size than those of `beton`."""
    folder = tmp_path_factory.mktemp("second")
    rng = np.random.default_rng(1)
    for number in range(40):
        home = folder / "images" / f"class{number % 2}"
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (14, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number}.png")
    path = folder / "second.beton"
    convert("imagefolder", folder / "images", path)
    return path


def downstream(task: str, train: Path, num_classes: int) -> tuple[str, ...]:
    """Overrides that give the recipe of `Setup` a section downstream."""
    section = {"task": task, "train": str(train), "num_classes": num_classes}
    return "data.num_classes=null", f"downstream={json.dumps(section)}"


# --- runs --------------------------------------------------------------------------------------

KINDS = ("segmentation-zero3", "classification-zero2", "views-zero2")
# An epoch of the 80 images has five steps, as in mae; so these are four cycles of k1 = 2.
EPOCHS = "epochs=1.6"


@pytest.fixture(scope="module")
def overrides(scenes: Path, second: Path) -> dict[str, tuple[str, ...]]:
    return {
        "segmentation": (EPOCHS, *downstream("segmentation", scenes, NUM_CLASSES)),
        "classification": (EPOCHS, *downstream("classification", second, 2)),
        "views": ("data.num_classes=null", "pretrain.num_views=2"),
    }


@pytest.fixture(scope="module")
def found(module_setup: Setup, scenes: Path, overrides: Any) -> list[Any]:
    """By rank what became of the launches, and the first steps on two views."""
    launches = []
    for kind in KINDS:
        task, stage = kind.split("-zero")
        method = "mae" if task == "views" else "mlo_mae"
        common = {"method": method, "stage": int(stage)}
        given = overrides[task]
        launches += [
            module_setup.launch(f"{kind}/whole", *given, **common),
            module_setup.launch(f"{kind}/halves", *given, **common, kill=(1, 1)),
            module_setup.launch(f"{kind}/halves", *given, **common, resume=True),
        ]
    learning = ("data.num_classes=null", f"data.train={scenes}", "epochs=20", "mask.lr=1e-3")
    head = ("classifier.optimizer=adamw", "data.augmentation.scale=[0.5, 1.0]")
    learning += (*downstream("segmentation", scenes, NUM_CLASSES), *head, "checkpoint.keep=1")
    launches.append(module_setup.launch("learning", *learning))
    views = list(views_of(module_setup).values())
    function = f"{__name__}:drive_and_step"
    return run_ranks(function, 2, module_setup.folder, launches=launches, views=views)


def drive_and_step(launches: list[Any], views: list[Any]) -> tuple[list[Any], list[Any]]:
    """One pair of processes for all runs."""
    return drive(launches), [_first_step(**launch) for launch in views]


@pytest.fixture(scope="module")
def outcomes(found: list[Any]) -> list[Any]:
    """Exit codes by rank: of each kind uninterrupted, stopped, resumed; of a longer run."""
    return [launches for launches, _ in found]


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_changes_no_bit(outcomes: Any, module_setup: Setup, kind: str) -> None:
    first = 3 * KINDS.index(kind)
    for rank in outcomes:
        assert [code for code, _ in rank[first : first + 3]] == [0, 143, 0], rank[first][1]
    whole, halves = (module_setup.folder / kind / name for name in ("whole", "halves"))
    expected = contents(whole / LAST)
    assert len(expected) > 100 or kind.startswith("views")
    assert contents(halves / LAST) == expected
    assert metrics_rows(halves) == metrics_rows(whole)
    assert (halves / "masks.png").read_bytes() == (whole / "masks.png").read_bytes()


def test_segmentation_is_learned(outcomes: Any, module_setup: Setup) -> None:
    """On squares whose colour is their class, with masks that the encoder's images have, too."""
    assert [rank[-1][0] for rank in outcomes] == [0, 0]
    losses = [record["mask/loss"] for record in metrics_rows(module_setup.folder / "learning")]
    assert losses[0] > 1.1  # about log 4
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


# --- who draws from what -----------------------------------------------------------------------


def test_the_encoder_draws_all_of_its_images(
    setup: Setup, beton: Path, scenes: Path, overrides: Any
) -> None:
    given = setup.launch("run", *overrides["segmentation"])["overrides"]
    images = plan_images(load_recipe(setup.recipe, PretrainingRecipe, given))
    assert images["pretrain"].info.path == beton and images["pretrain"].indices is None
    head, mask = images["classifier"], images["mask"]
    assert head.info.path == mask.info.path == scenes
    assert head.indices is not None and mask.indices is not None
    assert len(mask.indices) == NUM_SCENES / 5
    assert sorted([*head.indices, *mask.indices]) == list(range(NUM_SCENES))
    other = plan_images(load_recipe(setup.recipe, PretrainingRecipe, [*given, "seed=1"]))
    assert not np.array_equal(other["mask"].indices, mask.indices)


def test_a_second_set_is_split_by_class(setup: Setup, second: Path, overrides: Any) -> None:
    given = setup.launch("run", *overrides["classification"])["overrides"]
    images = plan_images(load_recipe(setup.recipe, PretrainingRecipe, given))
    labels = inspect_images(second).labels
    assert images["pretrain"].num_images == 80
    assert np.bincount(labels[images["mask"].indices]).tolist() == [4, 4]
    assert np.bincount(labels[images["classifier"].indices]).tolist() == [16, 16]


def test_the_nearest_augmentation_counts(setup: Setup, scenes: Path) -> None:
    section = {
        "task": "segmentation", "train": str(scenes), "num_classes": NUM_CLASSES,
        "augmentation": {"kind": "pad_crop", "padding": 1},
    }  # fmt: skip
    given = ["data.num_classes=null", f"downstream={json.dumps(section)}",
             "mask.augmentation.kind=center_crop"]  # fmt: skip
    images = plan_images(load_recipe(setup.recipe, PretrainingRecipe, given))
    kinds = {name: image.augmentation.kind for name, image in images.items()}
    assert kinds == {
        "pretrain": "random_resized_crop",
        "classifier": "pad_crop",
        "mask": "center_crop",
    }


# --- bad input ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(
    refused: Callable[..., str],  # noqa: F811
    scenes: Path,
    beton: Path,
    second: Path,
) -> None:
    masks = downstream("segmentation", scenes, NUM_CLASSES)
    cases = [
        (downstream("segmentation", scenes, 7), ["downstream.num_classes is 7", "has 4 classes"]),
        (downstream("classification", second, 7), ["downstream.num_classes=2"]),
        (downstream("segmentation", beton, 4), [str(beton), "holds no masks"]),
        (downstream("segmentation", beton.parent, 4), [str(beton.parent)]),
        (downstream("classification", scenes, 3), [str(scenes), "holds masks", "class labels"]),
        (downstream("segmentation", Path("nowhere.beton"), 3), ["nowhere.beton does not exist"]),
        (masks[1:], ["data.num_classes is given", "downstream"]),
        ((*masks, "mask.batch_size=16"), ["mask.batch_size is 16", "12 images"]),
        ((*masks, "data.augmentation.auto_augment=rand-m9"), ["rand-m9", "not their masks"]),
        ((*masks, "downstream.task=boxes"), ["downstream.task", "segmentation"]),
        ((*masks, "downstream.num_clases=3"), ["downstream.num_classes"]),
        ((*masks, "data.augmentation.kind=center_crop", "model.image_size=16",
          "pretrain.augmentation.kind=random_resized_crop"), [str(scenes), "12 pixels"]),
    ]  # fmt: skip
    for overrides, words in cases:
        error = refused(*overrides)
        assert [word for word in words if word not in error] == [], error
    assert "learns from no labels" in refused(*masks, method="mae")


# --- two views of plain MAE --------------------------------------------------------------------


def views_of(setup: Setup) -> dict[int, dict[str, Any]]:
    """A run on two views by its number of micro-batches."""
    given = "data.num_classes=null", "pretrain.num_views=2"
    return {
        parts: setup.launch(
            "views", *given, f"pretrain.gradient_accumulation_steps={parts}", method="mae"
        )
        for parts in (1, 2)
    }


def test_both_views_are_one_batch(found: Any, module_setup: Setup, beton: Path) -> None:
    """What a step gets is the views one after the other, in each of its micro-batches."""
    launches = views_of(module_setup)
    recipe = load_recipe(launches[1]["recipe"], PretrainingRecipe, launches[1]["overrides"])
    augmentation = recipe.data.augmentation.build(recipe.model.image_size)
    for rank, (_, steps) in enumerate(found):
        with open_stream(
            beton,
            augmentation=(augmentation,) * 2,
            batch_size=8,
            seed=0,
            name="pretrain",
            rank=rank,
            world_size=2,
            mean=recipe.data.mean,
            std=recipe.data.std,
        ) as stream:
            first, second, _ = next(stream)
        assert not torch.equal(first, second)
        for num_parts, (parts, loss, loss_of_all) in zip(launches, steps, strict=True):
            halves = zip(first.chunk(num_parts), second.chunk(num_parts), strict=True)
            assert [len(part) for part in parts] == [16 // num_parts] * num_parts
            assert all(map(torch.equal, parts, map(torch.cat, halves)))
            assert loss == pytest.approx(loss_of_all, rel=1e-5)


def _first_step(**launch: Any) -> tuple[list[Tensor], float, float]:
    """This rank's micro-batches in a run's first step, its loss, and the mean over all crops."""
    task = build_task(PretrainingProgram(), launch)
    seen: list[list[Tensor]] = []
    losses: list[float] = []
    step = MaePretraining.pretrain_step

    def look(task: MaePretraining, micro_batches: list[Tensor]) -> Tensor:
        if not seen:
            batches = task.schedule.batches(micro_batches, 0)
            losses.append(_mean_loss(task.pretrain.engine.module, task.loss, batches))
        seen.append(micro_batches)
        mask = step(task, micro_batches)
        losses.append(task.pretrain.latest_loss)
        return mask

    with ExitStack() as stack, mock.patch.object(MaePretraining, "pretrain_step", look):
        task.open(0, stack)
        task.cycle()
    return seen[0], losses[1], losses[0]


def _mean_loss(model: Any, loss: BaselineReconstruction, batches: list[MaskedBatch]) -> float:
    """Over the hidden patches of all crops, each with the mask that its step draws."""
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            scorer = loss.make_scorer(batch.generator(), batch.num_keep)
            out = model(batch.images, scorer=scorer, num_keep=batch.num_keep)
            total += float((out["patch_loss"] * out["mask"]).sum())
            count += float(out["mask"].sum())
    return total / count

"""`python -m mlomae gradcheck`: the command, and the parts that its table rests on."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlomae.commands.gradcheck import command as gradcheck
from mlomae.commands.gradcheck.memory import PeakMemory
from mlomae.commands.gradcheck.problem import SameDraws, reduce_config, reduce_recipe
from mlomae.commands.gradcheck.rows import Bench, Row, make_rows
from mlomae.pretraining.program import build_levels
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.recipe import load_recipe
from tests.ranks import ROOT, run_ranks

BF16 = ("--deepspeed_config", "ds_configs/zero2_bf16.json")
COMMANDS = {
    "default": (),
    "identity in bf16": (*BF16, "hypergradient.estimator=identity"),
    "mae": ("--recipe", "quickstart_mae"),
}


@pytest.fixture(scope="module")
def finished() -> dict[str, tuple[int, str, str]]:
    """Exit code and outputs of all commands, run at once, because each starts slowly."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    environment.pop("RANK", None)
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "mlomae", "gradcheck", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in COMMANDS.items()
    }
    try:
        outputs = {name: process.communicate(timeout=280) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {name: (processes[name].returncode, *output) for name, output in outputs.items()}


def table_of(output: str) -> dict[tuple[str, str], list[str]]:
    """Cells by estimator and truth."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows if len(row) == 6 and "+" in row[1]}


def test_default_lists_every_estimator_and_is_within_the_bounds(finished: Any) -> None:
    code, output, errors = finished["default"]
    assert code == 0, errors
    table = table_of(output)
    assert list(table) == [
        ("*Unrolled", "1 + 1"),
        ("Unrolled", "2 + 1"),
        ("Truncated", "1 + 1"),
        ("Identity", "2 + 1"),
        ("Sama", "2 + 1"),
        ("Neumann", "2 + 1"),
        ("ConjugateGradient", "2 + 1"),
        ("FiniteDifference(Unrolled, relative_step=0.0001)", "1 + 1"),
        ("FiniteDifference(Identity, radius=0.01)", "2 + 1"),
    ]
    for key in (("*Unrolled", "1 + 1"), ("Unrolled", "2 + 1")):
        assert float(table[key][0]) <= 1e-5
    assert float(table["Identity", "2 + 1"][0]) > 0.1  # so the comparison can tell
    assert all(float(cell) > 0 for row in table.values() for cell in row[2:])
    assert output.rstrip().endswith(
        "is within the bounds of float32: relative error at most 1e-05."
    )
    assert max(map(len, output.splitlines())) <= 100


def test_the_header_says_what_was_reduced(finished: Any) -> None:
    header = finished["default"][1].partition("| estimator")[0]
    assert "model.depth 4 -> 2" in " ".join(header.split())
    assert "classifier.batch_size 64 -> 16" in " ".join(header.split())


def test_a_worse_estimator_fails_the_check(finished: Any) -> None:
    code, output, errors = finished["identity in bf16"]
    assert code == 1, errors
    assert "The recipe's estimator, Identity, is not within the bounds of bfloat16" in output


def test_bf16_is_close_and_refuses_finite_differences_with_both_numbers(finished: Any) -> None:
    _, output, _ = finished["identity in bf16"]
    table = table_of(output)
    assert float(table["Unrolled", "1 + 1"][0]) <= 5e-2
    assert float(table["Unrolled", "1 + 1"][1]) >= 0.999
    names = (
        "FiniteDifference(Unrolled, relative_step=0.0001)",
        "FiniteDifference(Identity, radius",
    )
    refused = [row for (name, _), row in table.items() if name.startswith(names)]
    assert refused == [["unusable", "", "", ""]] * 2
    words = " ".join(output.split())
    reason = (
        r"is unusable here: level pretrain: a finite difference that moves the weights by (\S+) of "
        r"their norm is below the resolution (\S+) of bfloat16"
    )
    (relative, resolution), (of_radius, _) = re.findall(reason, words)
    assert (float(relative), float(resolution)) == (1e-4, 7.8e-3)
    assert 0 < float(of_radius) < 7.8e-3


def test_mae_has_nothing_to_check(finished: Any) -> None:
    code, output, errors = finished["mae"]
    assert (code, output) == (2, "")
    assert errors.splitlines()[-1] == (
        "error: recipe quickstart_mae: method mae has no hypergradient to check: "
        "give a recipe of method mlo_mae"
    )


# --- several ranks -----------------------------------------------------------------------------


def errors_of_unrolled(recipes: list[str]) -> list[list[float]]:
    """Errors in fp32 through all steps of a cycle: accumulated, clipped, with dropout."""
    return [_errors_of(recipe) for recipe in recipes]


def _errors_of(recipe: str) -> list[float]:
    overrides = ["pretrain.gradient_accumulation_steps=2", "pretrain.gradient_clipping=0.1"]
    config = str(ROOT / "ds_configs" / "cpu_zero2_fp32.json")
    job, _ = gradcheck._job(recipe, config, overrides)
    bench = Bench(job.recipe, build_levels(job, gradcheck.ENDLESS))
    torch.manual_seed(torch.distributed.get_rank())
    row = next(row for row in make_rows(job.recipe) if row.steps["pretrain"] == 2)
    bench.measure_cost(row)
    bench.compare([row])
    return row.errors


def test_the_truth_takes_the_batches_of_all_ranks(tmp_path: Path) -> None:
    """With labels of whole images, and with masks."""
    recipes = ["quickstart_mlo_mae", "mlo_mae_vit_tiny_camvid"]
    function = "tests.commands.test_gradcheck:errors_of_unrolled"
    errors = run_ranks(function, 2, tmp_path, recipes=recipes)
    assert errors[0] == errors[1]
    assert all(sorted(errors_of_recipe)[2] <= 1e-5 for errors_of_recipe in errors[0])


# --- the reduced problem -----------------------------------------------------------------------

RECIPES = sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*mlo_mae*.yaml"))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_reducing_keeps_the_mathematics(name: str, world_size: int) -> None:
    recipe = load_recipe(
        name, PretrainingRecipe, ["pretrain.gradient_accumulation_steps=2", "pretrain.eps=1e-6"]
    )
    reduced = reduce_recipe(recipe, world_size)
    sizes = {"batch_size", "base_lr", "warmup_epochs"}
    for level, original in recipe.levels.items():
        small = reduced.levels[level]
        assert small.model_dump(exclude=sizes) == original.model_dump(exclude=sizes)
        assert small.batch_size % (world_size * small.gradient_accumulation_steps) == 0
    assert reduced.hypergradient == recipe.hypergradient
    assert reduced.masking.mask_ratio == recipe.masking.mask_ratio
    for key in ("norm_pix_loss", "trainable_positions", "mlp_ratio"):
        assert getattr(reduced.model, key) == getattr(recipe.model, key)
    assert reduced.model.embed_dim <= 64 and reduced.model.num_patches <= 16


def test_a_high_mask_ratio_gets_a_grid_on_which_some_patch_is_kept() -> None:
    recipe = load_recipe(
        "mlo_mae_vit_base_patch16_imagenet", PretrainingRecipe, ["masking.mask_ratio=0.95"]
    )
    num_patches = reduce_recipe(recipe, 1).model.num_patches
    assert num_patches == 25  # of 16 patches 0.8 would be kept


def test_a_small_recipe_stays_as_it_is() -> None:
    small = reduce_recipe(load_recipe("quickstart_mlo_mae", PretrainingRecipe), 1)
    assert reduce_recipe(small, 1) == small


def test_a_json_loses_its_batches_and_large_buckets() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "allgather_bucket_size": 1000}
    config = {"train_batch_size": 128, "gradient_clipping": 1.0, "zero_optimization": zero}
    recipe = reduce_recipe(load_recipe("quickstart_mlo_mae", PretrainingRecipe), 1)
    reduced = reduce_config(config, recipe)
    assert "train_batch_size" not in reduced
    assert reduced["gradient_clipping"] == 1.0
    assert reduced["zero_optimization"]["stage"] == 2
    assert 1e5 < reduced["zero_optimization"]["reduce_bucket_size"] < 2e5
    assert reduced["zero_optimization"]["allgather_bucket_size"] == 1000
    assert zero["reduce_bucket_size"] == 5e8


def test_dropout_in_float64_hides_what_it_hides_in_the_precision_of_the_engine() -> None:
    features = torch.randn(64, 96)
    torch.manual_seed(1)
    expected = nn.Dropout(0.3)(features)
    torch.manual_seed(1)
    dropped = SameDraws(0.3, torch.float32)(features.double())
    torch.testing.assert_close(dropped, expected.double(), rtol=1e-6, atol=0)
    assert 0.2 < (dropped == 0).double().mean() < 0.4


# --- what the table says -----------------------------------------------------------------------


def row_of(*overrides: str) -> Row:
    rows = make_rows(load_recipe("quickstart_mlo_mae", PretrainingRecipe, overrides))
    (recipe_row,) = (row for row in rows if row.is_of_recipe)
    return recipe_row


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "Unrolled"),
        (("hypergradient.pretrain_steps=2",), "Unrolled"),
        (("hypergradient.estimator=identity", "hypergradient.radius=0.01"),
         "FiniteDifference(Identity, radius=0.01)"),
        (("hypergradient.estimator=sama", "hypergradient.relative_step=0.002"),
         "FiniteDifference(Sama, relative_step=0.002)"),
        (("hypergradient.estimator=neumann", "hypergradient.terms=7"), "Neumann(terms=7)"),
    ],
)  # fmt: skip
def test_the_recipes_own_estimator_is_a_row(overrides: tuple[str, ...], name: str) -> None:
    assert row_of(*overrides).name == name


def test_rows_are_not_repeated() -> None:
    recipe = load_recipe(
        "quickstart_mlo_mae", PretrainingRecipe, ["hypergradient.pretrain_steps=2"]
    )
    rows = make_rows(recipe)
    assert [row.name for row in rows].count("Unrolled") == 1  # all steps of the cycle already
    assert all(row.steps == {"pretrain": 2, "classifier": 1} for row in rows)


@pytest.mark.parametrize(
    ("dtype", "error", "cosine", "is_within"),
    [
        (torch.float64, 9e-11, 1.0, True),
        (torch.float64, 2e-10, 1.0, False),
        (torch.float32, 9e-6, 1.0, True),
        (torch.float32, 2e-5, 1.0, False),
        (torch.bfloat16, 4e-2, 0.9991, True),
        (torch.bfloat16, 6e-2, 0.9999, False),
        (torch.float16, 4e-2, 0.998, False),
        (torch.float32, math.nan, math.nan, False),
    ],
)
def test_the_bounds(dtype: torch.dtype, error: float, cosine: float, is_within: bool) -> None:
    row = row_of()
    row.errors, row.cosines = [error], [cosine]
    sentence, verdict = gradcheck.judge(row, dtype)
    assert verdict is is_within
    assert sentence.startswith(
        f"The recipe's estimator, Unrolled, is {'' if is_within else 'not '}within the bounds"
    )


def test_an_unusable_estimator_is_not_within_the_bounds() -> None:
    row = row_of()
    row.reason = "level pretrain: something"
    assert gradcheck.judge(row, torch.float32)[1] is False


def test_peak_memory_counts_what_lives_at_once_and_was_not_there_before() -> None:
    before = torch.zeros(500)
    with PeakMemory(torch.device("cpu")) as memory:
        first = torch.ones(1000)  # 4000 bytes
        second = torch.ones(300, dtype=torch.float64)  # 2400
        views = [first[:10], second.view(3, 100), before[3:], before.detach()]  # nothing new
        del first, views[0]
        third = torch.ones(250)  # 1000, after 4000 were freed
    assert memory.bytes == 6400
    del second, third


def test_peak_memory_since_a_restart_keeps_what_has_come_to_live() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        recorded = torch.ones(100)  # 400 bytes
        torch.ones(5000)  # freed at once
        memory.restart()
        torch.ones(50)  # 200
    assert memory.bytes == 600
    del recorded


def test_peak_memory_counts_what_autograd_saves() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with PeakMemory(torch.device("cpu")) as memory:
        # Saved for the backward pass: the output of exp, which nothing else holds.
        total = weight.exp().sum()
    assert memory.bytes == 40_000 + 4
    del total

"""Bad input ends in one sentence and exit code 2, before training, and overwrites nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae.contrastive import chain
from mlomae.contrastive.heads import read_head
from mlomae.contrastive.recipe import MaeCtRecipe, TuneRun
from mlomae.errors import UserError
from mlomae.models.contrastive import NnclrHead
from mlomae.recipe import dump_recipe, load_recipe
from tests.contrastive.runs import Setup
from tests.runs import tree


@pytest.fixture
def refused(
    tiny_setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Launch what must be refused, and return the sentence."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("mlomae.training.command_line.set_up_logging", lambda: None)

    def no_training() -> None:
        pytest.fail("this launch should have been refused")

    monkeypatch.setattr(chain, "start_ranks", no_training)

    def launch(*overrides: str, run: str = "run", **more: Any) -> str:
        arguments = tiny_setup.launch(run, *overrides, **more)
        before = tree(tiny_setup.folder)
        assert chain.launch_steps(**arguments) == 2
        assert tree(tiny_setup.folder) == before
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return launch


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("head.batch_size=12", ["head.batch_size is 12", "nnclr.queue_size 32", "use 8"]),
        ("tune.batch_size=64", ["tune.batch_size is 64", "nnclr.queue_size 32", "use 32"]),
        ("tune.top_k=33", ["tune.top_k is 33", "queue_size is 32"]),
        ("tune.num_frozen_blocks=2", ["tune.num_frozen_blocks is 2", "2 blocks"]),
        ("head.gradient_accumulation_steps=2", ["head.gradient_accumulation_steps", "use 1"]),
        ("tune.num_views=1", ["tune.num_views is 1"]),
        ("tune.decay_norm_and_bias=true", ["tune.decay_norm_and_bias is true", "remove it"]),
        ("tune.warmup_epochs=3", ["tune.warmup_epochs is 3", "epochs 0.8"]),
        ("masking.network=mlp", ["masking.network", "random"]),
        ("masking.mask_ratio=0.99", ["masking.mask_ratio", "0.99"]),
        ("pretrain=null", ["pretrain is missing", "init_from"]),
        ("epochs=3", ["epochs is no key", "epochs"]),
        ("method=mae", ["method is mae", "mae_ct"]),
        ("data.train=nowhere", ["nowhere"]),
        ("init_from=nowhere.pth", ["nowhere.pth"]),
        ("head_from=nowhere.th", ["nowhere.th"]),
    ],
)
def test_a_wrong_value_is_named(
    refused: Callable[..., str], override: str, named: list[str]
) -> None:
    error = refused(override)
    assert [text for text in named if text not in error] == [], error


@pytest.mark.parametrize("step", ["head", "tune"])
def test_fewer_images_than_a_batch(refused: Callable[..., str], step: str) -> None:
    error = refused("nnclr.queue_size=256", f"{step}.batch_size=128")
    assert f"{step}.batch_size is 128" in error and "80 images" in error


def test_a_lone_step_needs_what_comes_before_it(refused: Callable[..., str]) -> None:
    error = refused(step="head")
    assert "--step head needs the step pretrain" in error and "init_from" in error
    error = refused("init_from=weights.pth", step="tune")
    assert "--step tune needs the step head" in error and "head_from" in error
    error = refused("init_from=weights.pth", step="pretrain")
    assert "init_from stands in for this step" in error


def test_a_finished_step_of_another_recipe_is_not_built_upon(
    refused: Callable[..., str], tiny_setup: Setup
) -> None:
    recipe: MaeCtRecipe = load_recipe(
        tiny_setup.recipe, MaeCtRecipe, [f"output_dir={tiny_setup.folder / 'other'}"]
    )
    run = recipe.pretrain_run()
    assert run is not None
    run.output_dir.mkdir(parents=True)
    (run.output_dir / "recipe.yaml").write_text(dump_recipe(run))
    error = refused(run="other")  # begun, but not finished
    assert "other/pretrain holds another run: add --resume" in error
    (run.output_dir / "summary.json").write_text("{}")
    error = refused("pretrain.lr=2e-3", run="other")
    assert "pretrain.lr" in error and "another recipe" in error


def test_a_head_that_does_not_fit_is_named(tune_run: TuneRun, tmp_path: Path) -> None:
    def head_file(queue_size: int, *sizes: int) -> TuneRun:
        state = NnclrHead(*sizes).state_dict()
        state |= {"queue": torch.zeros(queue_size, sizes[2]), "queue_ptr": torch.zeros(1)}
        state |= {name: torch.zeros(queue_size) for name in ("queue_y", "queue_id")}
        file = tmp_path / "head.th"
        torch.save({"state_dict": state, "ctor_kwargs": {"kind": "nnclr"}}, file)
        return tune_run.model_copy(update={"head_from": file})

    assert "projector.7.running_var" in read_head(head_file(32, 16, 16, 8, 16))
    for sizes, name in (((64, 16, 16, 8, 16), "queue is"), ((32, 24, 16, 8, 16), "projector.0")):
        with pytest.raises(UserError, match=rf"head\.th does not fit the recipe: {name}"):
            read_head(head_file(*sizes))
    run = head_file(32, 16, 16, 8, 16)
    state = torch.load(run.head_from)["state_dict"]
    torch.save({name: t for name, t in state.items() if name != "queue_ptr"}, run.head_from)
    with pytest.raises(UserError, match=r"is no contrastive head \(it lacks queue_ptr\)"):
        read_head(run)
    torch.save({"projector.0.weight": torch.zeros(1)}, tmp_path / "none.th")
    with pytest.raises(UserError, match=r"none\.th is no contrastive head \(it lacks projector\.1"):
        read_head(tune_run.model_copy(update={"head_from": tmp_path / "none.th"}))

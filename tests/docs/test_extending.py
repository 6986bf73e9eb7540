"""Every skeleton of docs/extending.md runs as it stands there, and is short."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_ffcv import DataError, sources
from data_ffcv.convert import convert
from mlomae.hypergrad import Identity, Level, Multilevel
from tests.ranks import ENVIRONMENT, ROOT, run_ranks
from tests.runs import NUM_IMAGES, Setup, checkpoints, drive

PAGE = ROOT / "docs" / "extending.md"
MAX_LINES = 40


def blocks(section: str, language: str = "python") -> list[str]:
    """The fenced blocks below a heading, in order."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def load(folder: Path, section: str) -> ModuleType:
    """The module of a section with one block, imported from a file."""
    (code,) = blocks(section)
    file = folder / "skeleton.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("skeleton", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_skeleton_is_short():
    counts = [
        len(code.splitlines())
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    ]
    assert len(counts) == 6 and max(counts) <= MAX_LINES


# --- a method ----------------------------------------------------------------------------------


def train(package: str, launches: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """What `drive` does, with the package of the page at hand."""
    sys.path.insert(0, package)
    return drive(launches)


@pytest.fixture(scope="module")
def method_run(module_setup: Setup, beton: Path) -> Path:
    """The output_dir of the linear autoencoder: stopped and resumed in one gloo process."""
    folder = module_setup.folder
    package = folder / "linear"
    package.mkdir()
    for name, code in zip(("recipe", "task", "program"), blocks("A method"), strict=True):
        (package / f"{name}.py").write_text(code)
    (recipe,) = blocks("A method", "yaml")
    (folder / "linear.yaml").write_text(recipe)

    common = {"recipe": str(folder / "linear.yaml"), "program": "linear.program:LinearProgram"}
    settings = (f"data.train={beton}", "monitor.log_interval=1")
    launches = [
        module_setup.launch("run", *settings, **common, kill=(0, 3)),
        module_setup.launch("run", *settings, **common, resume=True),
    ]
    function = "tests.docs.test_extending:train"
    (done,) = run_ranks(function, 1, folder / "ranks", package=str(folder), launches=launches)
    assert [code for code, _ in done] == [143, 0], done
    return folder / "run"


def test_the_method_trains_and_resumes(method_run: Path):
    num_steps = 8 * (NUM_IMAGES // 16)
    records = [json.loads(line) for line in (method_run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["pretrain/loss"] for record in records]
    assert len(losses) == num_steps and losses[-1] < 0.8 * losses[0]
    assert checkpoints(method_run)[-1] == f"step_{num_steps:08d}"
    assert json.loads((method_run / "summary.json").read_text())["pretrain_steps"] == num_steps
    assert "pretrain/loss" in (method_run / "report.md").read_text()


def test_the_method_is_a_command(method_run: Path, module_setup: Setup, beton: Path):
    """Started as the page says, without a launcher; what it refuses is one sentence."""
    flags = ["--recipe", "linear.yaml", "--deepspeed_config", module_setup.config()]
    done = subprocess.run(
        [sys.executable, "-m", "linear.program", *flags, f"data.train={beton}",
         "pretrain.batch_size=1000"],
        cwd=module_setup.folder,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    sentence = "error: pretrain.batch_size exceeds the number of images: lower it"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, sentence), done.stderr


# --- an estimator ------------------------------------------------------------------------------

CURVATURE = 3.0
GOAL = torch.tensor([1.0, -2.0, 0.5])


class Values(nn.Module):
    """Three weights, which calling it returns."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self) -> torch.Tensor:
        return self.values * 1


def tiny_hypergradient(estimator: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The hypergradient of |w - goal|^2 / 2 by t, where w minimises 3 |w - t|^2 / 2, and its w."""

    def inner(models: Any, batch: None) -> torch.Tensor:
        return CURVATURE * (models["inner"]() - models["outer"]()).square().sum() / 2

    def outer(models: Any, batch: None) -> torch.Tensor:
        return (models["inner"]() - GOAL).square().sum() / 2

    weights, hyper = Values([0.3, 0.1, -0.2]), Values([0.5, 0.4, 0.2])
    levels = [
        Level("inner", weights, torch.optim.SGD(weights.parameters(), 0.1), loss=inner,
              upper=["outer"]),
        Level("outer", hyper, torch.optim.SGD(hyper.parameters(), 0.1), loss=outer,
              lower=["inner"]),
    ]  # fmt: skip
    problem = Multilevel(levels, estimator=estimator)
    levels[0].step(None)
    (vector,) = problem.hypergradient("outer", None).vector
    return vector, weights.values.detach()


def test_the_estimator_is_exact_where_its_step_is(tmp_path: Path):
    """With H = 3 I one step solves H p = lambda, so the implicit gradient is w - goal."""
    estimator = load(tmp_path, "An estimator").SteepestDescent()
    vector, weights = tiny_hypergradient(estimator)
    assert torch.allclose(vector, weights - GOAL, rtol=1e-6)
    without_hessian, _ = tiny_hypergradient(Identity())
    assert torch.allclose(without_hessian, CURVATURE * (weights - GOAL), rtol=1e-6)


# --- an evaluation -----------------------------------------------------------------------------


def test_the_evaluation_measures_an_untrained_encoder(tmp_path, run, data, capsys):
    module = load(tmp_path, "An evaluation")
    images = ["--train", data["train"], "--test", data["test"]]
    assert module.main(["--checkpoint", str(run), *images, "--untrained"]) == 0
    folder = run / "eval" / "nearest_mean_untrained"
    result = json.loads((folder / "result.json").read_text())
    assert 0.9 < result["accuracy"] <= 1  # the classes are colours, which any features tell apart
    assert (result["num_train_images"], result["num_test_images"]) == (60, 15)
    assert "nearest mean" in (folder / "report.md").read_text()
    assert f"{100 * result['accuracy']:.2f} %" in capsys.readouterr().out
    assert module.main(["--checkpoint", "nowhere", *images]) == 2


# --- an image source ---------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of six images of three classes; the format is registered as the page says."""
    opener = load(tmp_path, "An image source").open_listed
    monkeypatch.setitem(sources._OPENERS, "listed", opener)
    monkeypatch.setitem(sources._SETTINGS, "listed", ("classes",))
    monkeypatch.setattr(sources, "FORMATS", tuple(sources._OPENERS))
    lines = []
    for number in range(6):
        pixels = np.full((6, 5, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{('cat', 'dog', 'hen')[number % 3]}\n")
    file = tmp_path / "images.csv"
    file.write_text("".join(lines))
    return file


def test_the_source_is_converted(listed: Path, tmp_path: Path):
    info = convert("listed", listed, tmp_path / "images.beton")
    assert (info.num_samples, info.classes) == (6, ("cat", "dog", "hen"))
    assert sorted(info.labels) == [0, 0, 1, 1, 2, 2]
    assert (info.min_height, info.max_width) == (6, 5)


@pytest.mark.parametrize("text", ["", "0.png\n"])
def test_a_bad_list_is_refused_by_name(listed: Path, tmp_path: Path, text: str):
    listed.write_text(text)
    with pytest.raises(DataError, match=r"images\.csv is no list of images"):
        convert("listed", listed, tmp_path / "images.beton")

"""The quickstart's report, from the numbers of its runs."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlomae.training.result import table_row

_NAMES = {
    "mlo_mae": "MLO-MAE (learned masks)",
    "mae": "MAE (random masks)",
    "untrained": "untrained",
}
_EVALUATIONS = {"knn": "k-NN", "cached_probe": "cached probe"}


@dataclass(frozen=True)
class RunSummary:
    """What a finished training run says about itself (`summary.json`)."""

    seconds: float
    pretrain_steps: int
    images_per_second: float
    world_size: int


@dataclass(frozen=True)
class Facts:
    """Everything the report states.

    Attributes:
        output: The quickstart's folder.
        source: The folder of the images.
        num_images: Training images.
        num_encoder_images: Those of them that MLO-MAE's encoder is trained on.
        runs: The two runs, `mlo_mae` and `mae`.
        results: Rows of `eval.compare`, one per encoder.
        commands: What was run, in order.
        stage_seconds: Wall time of each stage.
        machine: Lines about hardware, versions and commit.
    """

    output: Path
    source: Path
    num_images: int
    num_encoder_images: int
    runs: Mapping[str, RunSummary]
    results: Sequence[Mapping[str, Any]]
    commands: Sequence[Sequence[str]]
    stage_seconds: Mapping[str, float]
    machine: Sequence[str]


def render_report(facts: Facts) -> str:
    """Return the report as Markdown."""
    sections = [
        "# Quickstart: which patches should be hidden?",
        _table(facts),
        _reading(facts),
        "![masks](masks.png)\n\nEach row is a test image: the image, the scores of the masking "
        "network, the masked image, the reconstruction.",
        _what_was_run(facts),
        _how_to_go_on(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _table(facts: Facts) -> str:
    lines = [
        "| encoder | k-NN | cached probe | encoder steps | training time | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in facts.results:
        cells = [_NAMES[row["encoder"]], *(_percent(row, name) for name in _EVALUATIONS)]
        run = facts.runs.get(row["encoder"])
        if run is None:
            cells += ["0", "", ""]
        else:
            cells += [
                str(run.pretrain_steps),
                f"{run.seconds:.0f} s",
                f"{run.images_per_second:.0f}",
            ]
        lines.append(table_row(cells))
    row = facts.results[0]
    lines += [
        "",
        f"Accuracy on the {row['num_test_images']} test images, which no training and no choice "
        f"of a setting has seen; k-NN and cached probe learn from {row['num_train_images']} "
        f"labelled training images in {row['num_classes']} classes. Images: {facts.source}.",
    ]
    return "\n".join(lines)


def _percent(row: Mapping[str, Any], evaluation: str) -> str:
    return f"{100 * row[evaluation]['accuracy']:.1f} %"


def _reading(facts: Facts) -> str:
    rows = {row["encoder"]: row for row in facts.results}
    lines = ["## How to read it", ""]
    for name, title in _EVALUATIONS.items():
        mlo_mae, mae = (100 * rows[run][name]["accuracy"] for run in ("mlo_mae", "mae"))
        difference = mlo_mae - mae
        verdict = f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'}"
        if abs(difference) < 0.05:
            verdict = "level with"
        lines.append(f"- {title}: MLO-MAE is {verdict} MAE.")
    steps = {run.pretrain_steps for run in facts.runs.values()}
    equality = "equally many" if len(steps) == 1 else "not exactly as many"
    lines += [
        "- This is one run of each with one seed and a very small model: a difference of this "
        "kind can be chance, and says nothing about full-size training.",
        "- MLO-MAE is not purely self-supervised: it used the labels of its training images to "
        "learn the mask. MAE used none.",
        f"- Both encoders took {equality} steps of the same batch size. MLO-MAE's encoder saw "
        f"{facts.num_encoder_images} of the {facts.num_images} training images, the others trained "
        "the mask; MAE's encoder saw all of them.",
        "- Images/s counts the images of encoder steps. MLO-MAE also trains a classifier and "
        "takes a hypergradient, so it is slower per encoder step.",
    ]
    return "\n".join(lines)


def _what_was_run(facts: Facts) -> str:
    stages = [f"- {title}: {seconds:.0f} s" for title, seconds in facts.stage_seconds.items()]
    machine = [f"- {line}" for line in facts.machine]
    commands = [shlex.join(command) for command in facts.commands]
    block = "\n\n".join(commands)
    return "\n".join(
        ["## What was run", "", *machine, *stages, "", "From the clone:", "", f"```\n{block}\n```"]
    )


def _how_to_go_on(facts: Facts) -> str:
    folder = shlex.quote(str(facts.output))
    return f"""## How to go on

- Watch the curves: `tensorboard --logdir {folder} --host localhost`
- Continue an interrupted training: its command above with `--resume` after the recipe.
- Evaluate other checkpoints: `python -m eval.knn --help`, `python -m eval.cached_probe --help`
- Train on ImageNet, on a machine with GPUs: convert it with `python -m data_ffcv.convert`, then
  `deepspeed launch/pretrain.py --recipe mlo_mae_vit_base_patch16_imagenet --deepspeed_config \
ds_configs/zero1_bf16.json data.train=TRAIN.beton`"""

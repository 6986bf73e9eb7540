"""Runs that begin with other weights, and maskings beside the published one, launched for real."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.runs import Setup, contents, metrics_rows

LAST = "step_00000008"
MASKING = [
    "masking.network=light", "masking.selection=gumbel_top_k", "masking.temperature_end=0.1",
    "masking.weighting=normalized", "masking.scores=coupled", "masking.mask_ratio_end=0.5",
]  # fmt: skip
DROPPING = ["model.depth=3", "model.drop_path_rate=0.5", "model.activation_checkpointing=true"]
BLOCKS = ["masking.network=block", "masking.mask_ratio_end=0.5"]


@pytest.fixture(scope="module")
def codes(module_setup: Setup) -> dict[str, int]:
    """Exit code of each launch, by its name; one pair of processes."""
    start, folder = module_setup.launch, module_setup.folder
    first = f"init_from={folder / 'first'}"
    launches = {
        "first": start("first"),
        "still": start("still", first, "pretrain.lr=1e-12", "pretrain.weight_decay=0"),
        "other width": start("wide", first, "model.embed_dim=32"),
        "whole": start("whole", first, *MASKING, stage=3),
        "half": start("halves", first, *MASKING, stage=3, kill=(1, 1)),
        # to go on, a run needs the weights of its beginning no more
        "other half": start(
            "halves", first, *MASKING, stage=3, resume=True,
            shell=f"mv {folder / 'first'} {folder / 'moved'}",
        ),
        "unseen": start("unseen", *DROPPING),
        "pictured": start("pictured", *DROPPING, "monitor.picture_interval_epochs=0.5"),
        "blocks": start("blocks", *BLOCKS, method="mae", stage=0),
    }  # fmt: skip
    ranks = run_ranks("tests.runs:drive", 2, folder, launches=list(launches.values()))
    found = [[code for code, _ in rank] for rank in ranks]
    assert found[0] == found[1]
    return dict(zip(launches, found[0], strict=True))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / LAST / "model.safetensors")


def test_training_begins_with_the_given_weights(codes: Any, module_setup: Setup) -> None:
    assert (codes["first"], codes["still"], codes["other width"]) == (0, 0, 2)
    first, still = (weights(module_setup.folder / name) for name in ("moved", "still"))
    for name, value in first.items():
        torch.testing.assert_close(still[name], value, rtol=0, atol=1e-9)
    assert not (module_setup.folder / "wide" / "checkpoints").exists()


def test_resuming_changes_no_bit_and_needs_no_initial_weights(
    codes: Any, module_setup: Setup
) -> None:
    assert (codes["whole"], codes["half"], codes["other half"]) == (0, 143, 0)
    whole, halves = (module_setup.folder / name for name in ("whole", "halves"))
    found, expected = (contents(run / "checkpoints" / LAST) for run in (halves, whole))
    assert len(expected) > 300
    assert found == expected
    assert metrics_rows(halves) == metrics_rows(whole)


def test_pictures_change_nothing_where_paths_are_dropped(codes: Any, module_setup: Setup) -> None:
    assert codes["unseen"] == codes["pictured"] == 0
    unseen, pictured = (weights(module_setup.folder / name) for name in ("unseen", "pictured"))
    assert all(torch.equal(unseen[name], pictured[name]) for name in unseen)


def test_block_masks_follow_the_ratio(codes: Any, module_setup: Setup) -> None:
    assert codes["blocks"] == 0
    frequencies = [r["masking/frequency"] for r in metrics_rows(module_setup.folder / "blocks")]
    hidden = [sum(frequency) for frequency in frequencies]
    # of 16 patches, in 8 steps from 0.75 to 0.5, two of them in each record
    ratios = [0.75 - 0.25 * step / 7 for step in range(8)]
    each = [16 - int(16 * (1 - ratio)) for ratio in ratios]
    expected = [(each[i] + each[i + 1]) / 2 for i in range(0, 8, 2)]
    assert hidden == pytest.approx(expected)

"""The same run on a file through FFCV, through threads, and on the folder it was made from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.runs import Setup, checkpoints, metrics_rows

VIVID = [
    "mask.augmentation.kind=random_resized_crop",
    "mask.augmentation.auto_augment=rand-m9-mstd0.5-inc1",
    "mask.augmentation.random_erasing_prob=0.5",
]


@pytest.fixture(scope="module")
def codes(module_setup: Setup, png_folder: Path) -> dict[str, int]:
    """Exit code of each launch, by its name; one pair of processes."""
    start = module_setup.launch
    folder = f"data.train={png_folder}"
    launches = {
        "file": start("file"),
        "threads": start("threads", "data.backend=threads"),
        "folder": start("folder", folder),
        "vivid": start("vivid", *VIVID),
        "vivid half": start("vivid_halves", *VIVID, kill=(1, 1)),
        "vivid other half": start("vivid_halves", *VIVID, resume=True),
        "folder by ffcv": start("refused", folder, "data.backend=ffcv"),
    }
    ranks = run_ranks("tests.runs:drive", 2, module_setup.folder, launches=list(launches.values()))
    found = [[code for code, _ in rank] for rank in ranks]
    assert found[0] == found[1]
    return dict(zip(launches, found[0], strict=True))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoints(run)[-1] / "model.safetensors")


def assert_same_run(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics_rows(run) == metrics_rows(other)


def test_backend_and_folder_change_no_bit(codes: dict[str, int], module_setup: Setup) -> None:
    assert codes["file"] == codes["threads"] == codes["folder"] == 0
    for name in ("threads", "folder"):
        assert_same_run(module_setup.folder / name, module_setup.folder / "file")


def test_colours_of_one_level_resume_bit_for_bit(
    codes: dict[str, int], module_setup: Setup
) -> None:
    assert (codes["vivid"], codes["vivid half"], codes["vivid other half"]) == (0, 143, 0)
    folder = module_setup.folder
    assert_same_run(folder / "vivid_halves", folder / "vivid")
    plain, vivid = weights(folder / "file"), weights(folder / "vivid")
    assert not all(torch.equal(plain[name], vivid[name]) for name in plain)


def test_a_folder_is_nothing_for_ffcv(codes: dict[str, int], module_setup: Setup) -> None:
    assert codes["folder by ffcv"] == 2
    assert not (module_setup.folder / "refused" / "checkpoints").exists()

"""All evaluations of one run, as every rank of a launch runs them."""

from pathlib import Path
from unittest import mock

from eval import cached_probe, clustering, knn, low_shot, reconstruct
from eval.frozen import features
from eval.frozen import store as _store

SMALL = (  # so that every rank has images of each file
    mock.patch.object(_store, "CHUNK_SIZE", 8),
    mock.patch.object(features, "BATCH_SIZE", 4),
    mock.patch.object(reconstruct, "BATCH_SIZE", 4),
)


def evaluate_all(run: str, train: str, test: str, output: str) -> list[int]:
    """Run each command with its own result folder and shared features; return the exit codes."""
    for patch in SMALL:
        patch.start()
    try:
        return _evaluate_all(run, train, test, output)
    finally:
        for patch in SMALL:
            patch.stop()


def _evaluate_all(run: str, train: str, test: str, output: str) -> list[int]:
    common = ["--checkpoint", run, "--test", test]
    kept = ["--features", str(Path(output) / "features")]
    learning = [*common, *kept, "--train", train]
    shots = ["--num_per_class", "2", "--fractions", "0.2", "--num_splits", "2"]
    return [
        knn.main([*learning, "--k", "3", "--output_dir", f"{output}/knn"]),
        low_shot.main([*learning, *shots, "--output_dir", f"{output}/low_shot"]),
        cached_probe.main([*learning, "--epochs", "2", "--output_dir", f"{output}/cached_probe"]),
        clustering.main(
            [*common, *kept, "--num_restarts", "3", "--output_dir", f"{output}/clustering"]
        ),
        reconstruct.main([*common, "--output_dir", f"{output}/reconstruct"]),
    ]

"""Time, peak memory and accuracy of one update of MLO-MAE's masking network.

Every contender computes the hypergradient of the same problem at the same weights, optimizer states
and batches, in processes of its own: some are timed, one has its memory measured. What they find is
compared with double backward in float64. The result is printed, and kept in two dated files: the
tables, and all numbers.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _betty_side
import torch
from _contenders import CONTENDERS, REFERENCES
from _measure import MEMORY_ENVIRONMENT
from _problem import SIZES
from _report import save
from torch import Tensor

HERE = Path(__file__).resolve().parent


def main() -> None:
    args = _parse()
    if "betty" in args.contenders:
        _betty_side.install()
    measured = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            measured[size] = Bench(size, args, Path(folder)).run()
    print(save(args.output, measured, args.device))


class Bench:
    """All runs at one size."""

    def __init__(self, size: str, args: argparse.Namespace, folder: Path) -> None:
        self.size = size
        self.args = args
        self.folder = folder

    def run(self) -> dict[str, Any]:
        """Measure everything; processes follow each other, and take turns in every round."""
        args = self.args
        self._child("prepare")
        references = {name: self._child(name, num_cycles=0) for name in REFERENCES}
        passes: dict[str, list[float]] = {}
        contenders: dict[str, Any] = {name: {"lower": [], "update": []} for name in args.contenders}
        for _ in range(args.num_rounds):
            for name, seconds in self._child("passes", num_cycles=args.num_updates).items():
                passes.setdefault(name, []).extend(seconds)
            for name, result in contenders.items():
                found = self._child(name, num_cycles=args.num_updates)
                result["lower"] += found["lower"]
                result["update"] += found["update"]
                result["accuracy"] = _compare(name, found, references)
        for name, result in contenders.items():
            result["memory"] = self._child(name, memory=True)
        return {"size": asdict(SIZES[self.size]), "passes": passes, "contenders": contenders}

    def _child(self, what: str, *, num_cycles: int = 1, memory: bool = False) -> Any:
        print(f"{self.size}: {what}{' (memory)' if memory else ''}", file=sys.stderr, flush=True)
        state, result = self.folder / "state.pt", self.folder / "result.pt"
        command = [sys.executable, str(HERE / "_child.py"), what, "--size", self.size]
        command += ["--state", str(state), "--result", str(result), "--device", self.args.device]
        command += ["--num_cycles", str(num_cycles)] + ["--memory"] * memory
        environment = os.environ | {"DS_ACCELERATOR": self.args.device}
        if memory and self.args.device == "cpu":
            environment |= MEMORY_ENVIRONMENT
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {what} at size {self.size} failed:\n{done.stdout}{done.stderr}")
        return torch.load(result, weights_only=True) if result.exists() else None


def _compare(
    name: str, found: dict[str, Tensor], references: dict[str, dict[str, Tensor]]
) -> dict[str, float]:
    truth = references["truth"]
    if not torch.equal(found["mask"], truth["mask"]):
        sys.exit(f"error: {name} hides other patches than the float64 reference; not comparable")
    error = (found["vector"].double() - truth["vector"]).norm() / truth["vector"].norm()
    return {
        "cosine": _cosine(found["vector"], truth["vector"]),
        "relative_error": error.item(),
        "cosine_to_identity": _cosine(found["vector"], references["identity_truth"]["vector"]),
    }


def _cosine(vector: Tensor, other: Tensor) -> float:
    # torch's cosine_similarity takes norms below 1e-8 for 1e-8.
    vector, other = vector.double(), other.double()
    return (vector @ other / (vector.norm() * other.norm())).item()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=["small", "base"],
        metavar="SIZE",
        help="some of tiny (shows that everything runs), small, base (ViT-B/16); "
        "default: small base",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"some of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--num_rounds", type=int, default=1, help="processes timed per contender (default: 1)"
    )
    parser.add_argument(
        "--num_updates", type=int, default=2, help="updates timed per process (default: 2)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "results",
        help="folder of the result files (default: results beside this file)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

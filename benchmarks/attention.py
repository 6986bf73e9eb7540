"""Time and peak memory of attention on every backend that works here, forward and backward.

Query, key and value are views of one projection, as in the model, so the time includes putting
their gradients together. Backends take turns in every round, and the table has medians over rounds
and ratios to `sdpa` in the same run.
"""

import argparse
import itertools
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _about import HERE, about, save, table
from _measure import seconds_of

from mlomae.commands.gradcheck.memory import PeakMemory
from mlomae.errors import UserError
from mlomae.models.attention import BACKENDS, attention, check_backend


class Width(NamedTuple):
    """Where in which model an attention stands."""

    name: str
    dim: int
    num_heads: int


WIDTHS = (
    Width("encoder of ViT-B", 768, 12),
    Width("encoder of ViT-H", 1280, 16),
    Width("decoder", 512, 16),
)
NUM_TOKENS = (50, 197, 257, 785)  # a quarter of 196 patches, all of 196, 256 and 784; class token
BASELINE = "sdpa"
BATCH_SIZE = {"cpu": 2, "cuda": 64}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


class Case:
    """One batch of attention's arguments."""

    def __init__(self, width: Width, num_tokens: int, args: argparse.Namespace) -> None:
        head_dim = width.dim // width.num_heads
        shape = (args.batch_size, num_tokens, 3, width.num_heads, head_dim)
        options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        self.qkv = torch.randn(shape, **options).requires_grad_()
        self.up = torch.randn(shape[0], num_tokens, width.dim, **options)

    def run(self, backend: str, num_calls: int = 1) -> None:
        """Forward and backward, from the projection [B, tokens, 3, heads, head_dim] and back."""
        for _ in range(num_calls):
            query, key, value = self.qkv.permute(2, 0, 3, 1, 4).unbind()
            mixed = attention(query, key, value, backend).transpose(1, 2).flatten(2)
            torch.autograd.grad(mixed, self.qkv, self.up)

    def peak(self, backend: str) -> int:
        """Bytes at most, above the arguments."""
        self.run(backend)  # workspaces of libraries stay
        with PeakMemory(self.qkv.device) as memory:
            self.run(backend)
        return memory.bytes


def main() -> None:
    args = _parse()
    torch.manual_seed(0)
    head = about("attention.py", args.device)
    head["arguments"] = f"batch of {args.batch_size} in {args.dtype}"
    backends, lines = _available(args)
    rows = [
        row
        for width, num_tokens in itertools.product(WIDTHS, args.num_tokens)
        for row in _measure(width, num_tokens, backends, args)
    ]
    heads = ["attention", "heads x dim", "tokens", "backend", "ms", "range", f"/ {BASELINE}"]
    heads += ["peak MB", f"/ {BASELINE}"]
    lines += table(heads, rows)
    print(save(args.output, f"attention-{args.device}", "Attention backends", head, lines))


def _available(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The backends that work, and a line about each that does not."""
    backends, lines = [], []
    for backend in (name for name in BACKENDS if name != "auto"):
        try:
            check_backend(backend, torch.device(args.device), getattr(torch, args.dtype))
            backends.append(backend)
        except UserError as error:
            lines += [f"Not measured here: {error}.", ""]
    return backends, lines


def _measure(
    width: Width, num_tokens: int, backends: list[str], args: argparse.Namespace
) -> list[list[str]]:
    """A row for each backend."""
    case = Case(width, num_tokens, args)
    peaks = {backend: case.peak(backend) for backend in backends}  # also warms up
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for _, backend in itertools.product(range(args.num_rounds), backends):
        seconds = seconds_of(lambda b=backend: case.run(b, args.num_calls), case.qkv.device)
        times[backend].append(1e3 * seconds / args.num_calls)
    rows = []
    for backend, ms in times.items():
        row = [width.name, f"{width.num_heads} x {width.dim // width.num_heads}", str(num_tokens)]
        row += [backend, f"{median(ms):.2f}", f"{min(ms):.2f}-{max(ms):.2f}"]
        row += [f"{median(ms) / median(times[BASELINE]):.2f}", f"{peaks[backend] / 1e6:.1f}"]
        rows.append([*row, f"{peaks[backend] / peaks[BASELINE]:.2f}"])
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=BATCH_SIZE, default="cuda" if has_gpu else "cpu")
    parser.add_argument("--batch_size", type=int, help=f"default: {BATCH_SIZE}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=str(DTYPE))
    parser.add_argument("--num_tokens", nargs="+", type=int, default=NUM_TOKENS, metavar="N")
    parser.add_argument("--num_rounds", type=int, default=11, help="turns (default: 11)")
    parser.add_argument("--num_calls", type=int, default=5, help="calls a turn (default: 5)")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "results",
        help="folder of the result file (default: results beside this file)",
    )
    args = parser.parse_args()
    args.batch_size = args.batch_size or BATCH_SIZE[args.device]
    args.dtype = args.dtype or DTYPE[args.device]
    return args


if __name__ == "__main__":
    main()

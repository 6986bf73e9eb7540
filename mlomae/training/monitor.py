"""Metrics of a run: a row every few cycles, to metrics.jsonl and to TensorBoard alike."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mlomae.checkpoint.files import replace_text

MetricsRow = dict[str, Any]
METRICS_FILE = "metrics.jsonl"


class Meters:
    """Sums since the last row, averaged over ranks when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._frequency: Tensor | None = None

    def add(self, name: str, value: float) -> None:
        """Count one value; one that is not finite is left out, though its name counts.

        All ranks must add the same names, for their sums are laid out by name.
        """
        sums = self._sums[name]
        if math.isfinite(value):
            sums[0] += value
            sums[1] += 1

    def add_mask_frequency(self, frequency: Tensor) -> None:
        """Count how often each patch position was hidden, [N], in one step."""
        self.add("masking/num_steps", 1.0)
        total = frequency if self._frequency is None else self._frequency + frequency
        self._frequency = total

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase, up to the end of what it started on the device."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.add(name, time.perf_counter() - start)

    def reduce(self) -> MetricsRow:
        """Means over all ranks, and a fresh start. All ranks must call."""
        names = sorted(self._sums)
        table = torch.tensor([self._sums[n] for n in names], dtype=torch.float64)
        frequency = self._frequency if self._frequency is not None else torch.zeros(0)
        flat = torch.cat([table.flatten(), frequency.double().cpu()]).to(self.device)
        dist.all_reduce(flat)
        flat = flat.cpu()
        means = dict(zip(names, flat[: table.numel()].view(-1, 2), strict=True))
        row: MetricsRow = {n: float(total / count) for n, (total, count) in means.items() if count}
        if frequency.numel():
            steps = means["masking/num_steps"][1]
            row["masking/frequency"] = (flat[table.numel() :] / steps).tolist()
            row.pop("masking/num_steps")
        self._sums.clear()
        self._frequency = None
        return row


class Monitor:
    """Writes rows on the first rank, and is silent on the others.

    Args:
        folder: the run's output_dir.
        cycle: rows of later cycles, left by a launch that was killed, are dropped.
        evaluated: those of evaluations after this cycle are, too.
        grid_size: rows and columns of `masking/frequency`; None for a square.
    """

    def __init__(
        self,
        folder: Path,
        cycle: int,
        grid_size: tuple[int, int] | None = None,
        evaluated: int | None = None,
    ) -> None:
        self.grid_size = grid_size
        self.writer: SummaryWriter | None = None
        if dist.get_rank() == 0:
            _drop_later_rows(
                folder / METRICS_FILE, cycle, cycle if evaluated is None else evaluated
            )
            self.file = (folder / METRICS_FILE).open("a")
            self.writer = SummaryWriter(str(folder), purge_step=cycle + 1, flush_secs=30)

    def write(self, row: MetricsRow) -> None:
        """Append one row; it must hold `cycle`."""
        if self.writer is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "cycle":
                self.writer.add_scalar(name, value, row["cycle"])
        if frequency := row.get("masking/frequency"):
            self.picture("masking/frequency", _heat_map(frequency, self.grid_size), row["cycle"])

    def picture(self, name: str, image: np.ndarray, cycle: int) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, image, cycle, dataformats="HWC")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.writer is not None:
            self.file.close()
            self.writer.close()


def read_metrics(folder: Path) -> list[MetricsRow]:
    """The rows of a run, oldest first; a last line cut short by a kill is left out."""
    rows = []
    for line in (folder / METRICS_FILE).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_later_rows(file: Path, cycle: int, evaluated: int) -> None:
    if not file.exists():
        return
    kept = [
        row
        for row in read_metrics(file.parent)
        if row["cycle"] <= (cycle if "images_per_second" in row else evaluated)
    ]
    replace_text(file, "".join(json.dumps(row) + "\n" for row in kept))


def _heat_map(values: list[float], grid_size: tuple[int, int] | None, cell: int = 12) -> np.ndarray:
    """Patch values in [0, 1] as a picture of the grid, dark to bright."""
    side = math.isqrt(len(values))
    grid = np.asarray(values).reshape(grid_size or (side, side)).clip(0, 1) * 255
    cells = grid.astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    return np.stack([cells] * 3, axis=-1)


def save_picture(picture: np.ndarray, path: str) -> None:
    """Write uint8 [H, W, 3] as an image file."""
    Image.fromarray(picture).save(path)

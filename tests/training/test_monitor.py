"""Meters over steps and ranks; rows in metrics.jsonl and in TensorBoard."""

import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlomae.training import monitor
from mlomae.training.monitor import METRICS_FILE, Meters, MetricsRow, Monitor, read_metrics
from tests.ranks import run_ranks


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    found = events(folder)
    return {(t, e.step): e.value for t in found.Tags()["scalars"] for e in found.Scalars(t)}


def shown(rows: list[MetricsRow]) -> dict[tuple[str, int], float]:
    """What TensorBoard, which keeps float32, ought to show of rows."""
    return {
        (name, row["cycle"]): float(np.float32(value))
        for row in rows
        for name, value in row.items()
        if name not in ("cycle", "masking/frequency")
    }


def a_row(cycle: int) -> MetricsRow:
    return {"cycle": cycle, "epoch": cycle / 7, "pretrain/loss": 1 / cycle, "pretrain/step": cycle}


# --- meters ----------------------------------------------------------------------------------


def on_a_rank(runs: Path) -> list[MetricsRow]:
    """What a rank counts; the first rank counts 0, the second 1."""
    rank = dist.get_rank()
    meters = Meters(torch.device("cpu"))
    for value in ([1.0, 2.0], [6.0])[rank]:
        meters.add("uneven", value)
    meters.add("bad on the first rank alone", (math.nan, 5.0)[rank])
    meters.add("bad everywhere", (math.inf, -math.inf)[rank])
    for step in range(2):
        meters.add("bad at one step", (math.nan, 2.0 + rank)[step])
        frequency = torch.tensor([[0.0, 1.0, 0.5, 1.0], [1.0, 1.0, 0.25, 0.0]][rank])
        meters.add_mask_frequency(frequency * step)
    rows = [meters.reduce()]
    meters.add("fresh", rank)
    rows.append(meters.reduce())
    with Monitor(runs / f"rank{rank}", cycle=0) as written:
        written.write({"cycle": 1, **rows[0]})
        written.picture("masks", np.zeros((4, 4, 3), np.uint8), 1)
    return rows


def test_meters_average_over_ranks_and_steps(tmp_path):
    (tmp_path / "rank0").mkdir()  # the other rank writes nothing, so it needs no folder
    first, second = run_ranks(
        "tests.training.test_monitor:on_a_rank", 2, tmp_path / "ranks", timeout=60, runs=tmp_path
    )
    assert first == second
    row, fresh = first
    assert row == {
        "uneven": 3.0,
        "bad on the first rank alone": 5.0,
        "bad at one step": 2.5,
        "masking/frequency": [0.25, 0.5, 0.1875, 0.25],
    }
    assert fresh == {"fresh": 0.5}
    assert read_metrics(tmp_path / "rank0") == [{"cycle": 1, **row}]
    assert not (tmp_path / "rank1").exists()


@pytest.mark.usefixtures("alone")
def test_timed_counts_the_seconds_of_a_phase(monkeypatch):
    clock = iter([10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    meters = Meters(torch.device("cpu"))
    for _ in range(2):
        with meters.timed("time/mask_step"):
            pass
    assert meters.reduce() == {"time/mask_step": 2.0}


# --- rows ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_one_record_feeds_both_files(tmp_path):
    frequency = [0.0, 0.2, 0.8, 1.0]
    rows = [a_row(c) | {"masking/frequency": frequency} for c in (10, 20, 25)]
    with Monitor(tmp_path, cycle=0) as written:
        for row in rows:
            written.write(row)
        assert read_metrics(tmp_path) == rows  # before the end, for a killed run to keep

    found = scalars(tmp_path)
    assert found == shown(read_metrics(tmp_path)) and len(found) == 9
    pictures = events(tmp_path).Images("masking/frequency")
    assert [picture.step for picture in pictures] == [10, 20, 25]
    image = np.asarray(Image.open(io.BytesIO(pictures[0].encoded_image_string)))
    side = image.shape[0] // 2
    assert image.shape == (2 * side, 2 * side, 3)
    assert image[::side, ::side, 0].tolist() == [[0, 51], [204, 255]]


@pytest.mark.usefixtures("alone")
def test_a_picture_is_shown_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(256, size=(6, 9, 3)).astype(np.uint8)
    with Monitor(tmp_path, cycle=0) as written:
        written.picture("masks", picture, 3)
    (event,) = events(tmp_path).Images("masks")
    image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 3 and np.array_equal(image, picture)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("tail", ["", '{"cycle": 40, "pretrain/lo', '{"cycle": 40}'])
def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path, tail):
    with Monitor(tmp_path, cycle=0) as written:
        for cycle in (10, 20, 30):
            written.write(a_row(cycle))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(tail)

    again = [a_row(cycle) for cycle in (40, 60)]  # another log_interval: no row at 30
    time.sleep(1.01)  # TensorBoard orders files by the second in their names
    with Monitor(tmp_path, cycle=20) as written:
        for row in again:
            written.write(row)
    expected = [a_row(10), a_row(20), *again]
    assert read_metrics(tmp_path) == expected
    assert scalars(tmp_path) == shown(expected)
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


@pytest.mark.usefixtures("alone")
def test_what_was_written_before_an_error_is_kept(tmp_path):
    with pytest.raises(RuntimeError, match="broke"), Monitor(tmp_path, cycle=0) as written:
        written.write(a_row(10))
        raise RuntimeError("it broke")
    assert read_metrics(tmp_path) == [a_row(10)]
    assert scalars(tmp_path) == shown([a_row(10)])


@pytest.mark.parametrize("torn", ['{"cycle": 2, "epo', '{"cycle"', "{"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    lines: list[Any] = [json.dumps(a_row(1)), torn]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [a_row(1)]

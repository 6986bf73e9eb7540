"""The training loop of every run: rows, evaluations, pictures, checkpoints, clean stops."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlomae import checkpoint
from mlomae.checkpoint import finish_saving, start_saving
from mlomae.checkpoint.writer import Saving
from mlomae.distributed.watchdog import mark
from mlomae.recipe import RunRecipe
from mlomae.training.engines import NonFiniteError
from mlomae.training.monitor import MetricsRow, Monitor, save_picture
from mlomae.training.report import write_report, write_result, write_summary
from mlomae.training.task import Task

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to end; it was saved. `code` is the exit code to end with."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after saving")
        self.code = 128 + signal_number


class Trainer:
    """Repeats a task's cycle until the recipe's epochs are over.

    Rows of metrics, evaluations, pictures, checkpoints and stops happen between cycles.

    Args:
        task: standing at `progress`, its streams open.
    """

    def __init__(self, recipe: RunRecipe, task: Task, progress: checkpoint.Progress) -> None:
        self.recipe = recipe
        self.task = task
        self.progress = progress
        self.output_dir = Path(recipe.output_dir)
        self._evaluation: dict[str, float] = {}
        self._started = time.perf_counter()
        self._cycle_of_last_row = progress.cycle
        self._stop_signal = 0
        self._saving: Saving | None = None

    def run(self) -> None:
        """Train to the end, save, and write `summary.json` and `report.md`.

        Raises:
            Stopped: a signal came; everything up to the last finished cycle is saved.
            NonFiniteError: the numbers broke down; the last checkpoint is untouched.
        """
        progress = self.progress
        evaluated = progress.evaluated
        with Monitor(self.output_dir, progress.cycle, self.task.grid_size, evaluated) as monitor:
            with self._listening(), _progress_bar() as bar:
                try:
                    self._train(monitor, bar)
                except NonFiniteError:  # on all ranks, so what was being saved is saved
                    self._finish_saving()
                    raise
            # Everything is saved. A signal ends this part at once, and --resume repeats it.
            self._picture(monitor)
            self._evaluate(monitor)
        self._summarise()

    def _train(self, monitor: Monitor, bar: Progress) -> None:
        task, progress = self.task, self.progress
        row = bar.add_task("", total=task.num_cycles, completed=progress.cycle)
        is_saved = progress.cycle > 0  # by the launch that this one continues
        if is_saved and progress.cycle < task.num_cycles:
            self._evaluate_if_due(monitor)  # what it left undone when it was stopped
        while progress.cycle < task.num_cycles:
            task.cycle()
            progress.cycle += 1
            stop = self._agree_on_stop()
            is_last = progress.cycle == task.num_cycles
            self._write_metrics(monitor, is_last=bool(stop) or is_last)
            bar.update(row, completed=progress.cycle, description=self._headline())
            is_saved = bool(stop) or self._is_due(self.recipe.checkpoint.interval_epochs)
            if is_saved:
                self._save()
            if stop:
                self._finish_saving()
                raise Stopped(stop)
            if not is_last:
                self._evaluate_if_due(monitor)
        if not is_saved:
            self._save()
        self._finish_saving()

    def _evaluate_if_due(self, monitor: Monitor) -> None:
        """Pictures and evaluations that are due after this cycle and were not made yet."""
        if self.progress.evaluated == self.progress.cycle:
            return
        is_picture_due = self._is_due(self.recipe.monitor.picture_interval_epochs)
        is_evaluation_due = self._is_due(self.recipe.monitor.eval_interval_epochs)
        if is_picture_due or is_evaluation_due:
            self._finish_saving()  # complete before what may take long, or fail
        if is_picture_due:
            self._picture(monitor)
        if is_evaluation_due:
            self._evaluate(monitor)
        self.progress.evaluated = self.progress.cycle

    def _write_metrics(self, monitor: Monitor, is_last: bool) -> None:
        cycle = self.progress.cycle
        if cycle % self.recipe.monitor.log_interval and not is_last:
            return
        now = time.perf_counter()
        elapsed, self._started = now - self._started, now
        self.progress.seconds += elapsed
        num_cycles, self._cycle_of_last_row = cycle - self._cycle_of_last_row, cycle
        row: MetricsRow = {
            "cycle": cycle,
            "epoch": cycle / self.task.cycles_per_epoch,
            "seconds": self.progress.seconds,
            "images_per_second": num_cycles * self.task.images_per_cycle / elapsed,
        }
        for name, level in self.task.levels.items():
            row |= {
                f"{name}/step": level.num_steps_done,
                f"{name}/num_skipped": level.num_skipped,
            }
        row |= self.task.meters.reduce()
        monitor.write(row)
        logger.info("%s", _one_line(row))

    def _picture(self, monitor: Monitor) -> None:
        """Draw on the first rank; all ranks run the forward passes, for ZeRO-3 gathers in them."""
        with self._clock_paused():
            for name, picture in self.task.pictures().items():
                if dist.get_rank() == 0:
                    monitor.picture(name, picture, self.progress.cycle)
                    save_picture(picture, str(self.output_dir / f"{name}.png"))

    def _evaluate(self, monitor: Monitor) -> None:
        with self._clock_paused():
            self._evaluation = self.task.evaluate()
        if not self._evaluation:
            return
        cycle = self.progress.cycle
        place: MetricsRow = {"cycle": cycle, "epoch": cycle / self.task.cycles_per_epoch}
        monitor.write(place | self._evaluation)
        values = [f"{name} {value:.4g}" for name, value in self._evaluation.items()]
        logger.info("cycle %d  epoch %.2f  %s", cycle, place["epoch"], "  ".join(values))

    def _is_due(self, interval_epochs: float | None, every: int = 1) -> bool:
        """Whether the latest cycle ends an interval, or `every` so many of them."""
        if interval_epochs is None:
            return False
        interval = max(1, round(interval_epochs * self.task.cycles_per_epoch))
        return self.progress.cycle % (interval * every) == 0

    def _save(self) -> None:
        """Begin to save; with `async_save` it goes on beside the next cycles."""
        self._finish_saving()
        section, folder = self.recipe.checkpoint, self.output_dir / "checkpoints"
        keep_every = section.keep_every
        for_good = keep_every is not None and self._is_due(section.interval_epochs, keep_every)
        with self._clock_paused():
            mark("saving")
            self._saving = start_saving(
                folder, self.task, self.progress, self.recipe, for_good=for_good
            )
        if not section.async_save:
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Wait until what was begun to be saved is complete. All ranks must call."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._clock_paused():
                mark("waiting for the checkpoint to be written")
                finish_saving(saving, self.recipe.checkpoint.keep)

    @contextmanager
    def _clock_paused(self) -> Iterator[None]:
        """What happens inside counts neither as training time nor against images per second."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def _agree_on_stop(self) -> int:
        """Finish what all ranks have written; return the signal that any rank received, or 0.

        All ranks must call.
        """
        is_writing = self._saving is not None and not self._saving.is_written
        flags = torch.tensor([self._stop_signal, int(is_writing)], device=self.task.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if not flags[1]:
            self._finish_saving()
        return int(flags[0])

    def _listening(self) -> "_Handlers":
        def stop(number: int, _: Any) -> None:
            if not self._stop_signal:
                logger.info("%s: saving after this cycle", signal.Signals(number).name)
            self._stop_signal = number

        return _Handlers(stop)

    def _headline(self) -> str:
        losses = [f"{name} {level.latest_loss:.3f}" for name, level in self.task.levels.items()]
        return f"{self.recipe.method}  loss: {'  '.join(losses)}"

    def _summarise(self) -> None:
        if dist.get_rank():
            return
        seconds, first = self.progress.seconds, self.task.first_level
        num_images = first.num_steps_done * self.recipe.levels[first.name].batch_size
        summary = {
            "seconds": seconds,
            f"{first.name}_steps": first.num_steps_done,
            "images_per_second": num_images / seconds,
            "world_size": dist.get_world_size(),
        }
        if self._evaluation:
            result = {"method": self.recipe.method, **self.task.result(), **self._evaluation}
            write_result(self.output_dir, result | summary)
        write_report(self.output_dir, self.recipe, self.task, summary, self._evaluation)
        write_summary(self.output_dir, summary)  # last: it says that all the rest is there


class _Handlers:
    """SIGINT and SIGTERM go to a function inside the context, to whom they went before after it."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.function)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _progress_bar() -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, disable=dist.get_rank() != 0, transient=True)


def _one_line(row: MetricsRow) -> str:
    shown = [n for n in row if n.endswith(("/loss", "/hypergradient_norm"))]
    values = [f"{name} {row[name]:.4g}" for name in shown]
    return (
        f"cycle {row['cycle']}  epoch {row['epoch']:.2f}  {'  '.join(values)}  "
        f"{row['images_per_second']:.0f} images/s"
    )

"""The training loop of every run: records, evaluations, pictures, checkpoints, clean stops."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlomae import checkpoint
from mlomae.monitor import Monitor, Record
from mlomae.pictures import save_picture
from mlomae.recipe import RunRecipe
from mlomae.report import write_report, write_result, write_summary
from mlomae.task import Task

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to end; it was saved. `code` is the exit code to end with."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after saving")
        self.code = 128 + signal_number


class Trainer:
    """Repeats a task's cycle until the recipe's epochs are over.

    Records, evaluations, pictures, checkpoints and stops happen between cycles.

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
        self._recorded = progress.cycle
        self._stop_signal = 0

    def run(self) -> None:
        """Train to the end, save, and write `summary.json` and `report.md`.

        Raises:
            Stopped: a signal came; everything up to the last finished cycle is saved.
            NonFiniteError: the numbers broke down; the last checkpoint is untouched.
        """
        task, progress = self.task, self.progress
        with ExitStack() as stack:
            monitor = stack.enter_context(Monitor(self.output_dir, progress.cycle, task.grid_size))
            stack.enter_context(self._listening())
            bar = stack.enter_context(_progress_bar())
            row = bar.add_task("", total=task.num_cycles, completed=progress.cycle)
            is_saved = progress.cycle > 0  # by the launch that this one continues
            while progress.cycle < task.num_cycles:
                is_saved = False
                task.cycle()
                progress.cycle += 1
                stop = self._agreed_stop()
                is_last = progress.cycle == task.num_cycles
                self._record(monitor, is_last=bool(stop) or is_last)
                bar.update(row, completed=progress.cycle, description=self._headline())
                if self._is_due(self.recipe.monitor.picture_interval_epochs) and not is_last:
                    self._picture(monitor)
                if self._is_due(self.recipe.monitor.eval_interval_epochs) and not is_last:
                    self._evaluate(monitor)
                if stop or self._is_due(self.recipe.checkpoint.interval_epochs):
                    self._save()
                    is_saved = True
                if stop:
                    raise Stopped(stop)
            if not is_saved:
                self._save()  # first, so that an evaluation which fails does not cost the training
            self._picture(monitor)
            self._evaluate(monitor)
        self._summarise()

    def _record(self, monitor: Monitor, is_last: bool) -> None:
        cycle = self.progress.cycle
        if cycle % self.recipe.monitor.log_interval and not is_last:
            return
        now = time.perf_counter()
        elapsed, self._started = now - self._started, now
        self.progress.seconds += elapsed
        num_cycles, self._recorded = cycle - self._recorded, cycle
        record: Record = {
            "cycle": cycle,
            "epoch": cycle / self.task.cycles_per_epoch,
            "seconds": self.progress.seconds,
            "images_per_second": num_cycles * self.task.images_per_cycle / elapsed,
        }
        for name, level in self.task.levels.items():
            record |= {f"{name}/step": level.num_steps, f"{name}/num_skipped": level.num_skipped}
        record |= self.task.meters.reduce()
        monitor.write(record)
        logger.info("%s", _one_line(record))

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
        place: Record = {"cycle": cycle, "epoch": cycle / self.task.cycles_per_epoch}
        monitor.write(place | self._evaluation)
        values = [f"{name} {value:.4g}" for name, value in self._evaluation.items()]
        logger.info("cycle %d  epoch %.2f  %s", cycle, place["epoch"], "  ".join(values))

    def _is_due(self, interval_epochs: float | None) -> bool:
        """Whether a multiple of the interval was passed in the latest cycle."""
        if interval_epochs is None:
            return False
        interval = max(1, round(interval_epochs * self.task.cycles_per_epoch))
        return self.progress.cycle % interval == 0

    def _save(self) -> None:
        with self._clock_paused():
            checkpoint.save(self.output_dir / "checkpoints", self.task, self.progress, self.recipe)

    @contextmanager
    def _clock_paused(self) -> Iterator[None]:
        """What happens inside counts neither as training time nor against images per second."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def _agreed_stop(self) -> int:
        """The signal that any rank received, on all ranks; 0 for none."""
        flag = torch.tensor(self._stop_signal, device=self.task.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _listening(self) -> "_Handlers":
        def stop(number: int, _: Any) -> None:
            if not self._stop_signal:
                logger.info("%s: saving after this cycle", signal.Signals(number).name)
            self._stop_signal = number

        return _Handlers(stop)

    def _headline(self) -> str:
        losses = [f"{name} {level.loss:.3f}" for name, level in self.task.levels.items()]
        return f"{self.recipe.method}  loss: {'  '.join(losses)}"

    def _summarise(self) -> None:
        if dist.get_rank():
            return
        seconds, first = self.progress.seconds, self.task.first_level
        num_images = first.num_steps * self.recipe.levels[first.name].batch_size
        summary = {
            "seconds": seconds,
            f"{first.name}_steps": first.num_steps,
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


def _one_line(record: Record) -> str:
    shown = [n for n in record if n.endswith(("/loss", "/hypergradient_norm"))]
    values = [f"{name} {record[name]:.4g}" for name in shown]
    return (
        f"cycle {record['cycle']}  epoch {record['epoch']:.2f}  {'  '.join(values)}  "
        f"{record['images_per_second']:.0f} images/s"
    )

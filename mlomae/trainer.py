"""The training loop: cycles of all levels, with records, pictures, checkpoints and clean stops."""

import json
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

from data_ffcv import Stream
from mlomae import checkpoint
from mlomae.engines import TrainingLevel, evaluating
from mlomae.mae import Mae
from mlomae.mlo_mae import MloMae
from mlomae.monitor import Meters, Monitor, Record
from mlomae.pictures import mask_picture, save_picture
from mlomae.recipe import Recipe

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked the run to end; it was saved. `code` is the exit code to end with."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after saving")
        self.code = 128 + signal_number


class Trainer:
    """Runs cycles of a method until the recipe's epochs are over.

    A cycle is k1 steps of `pretrain`, k2 of `classifier` and one of `mask`; for plain MAE it is
    k1 steps of `pretrain`. Records, checkpoints and stops happen between cycles.

    Args:
        method: the levels and how they step.
        streams: one endless stream per level, by its name, standing at the cycle's batches.
        num_images: training images of the pretrain stream.
        picture_images: [P, C, S, S] on the device, the same on all ranks; None draws nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Mae | MloMae,
        levels: dict[str, TrainingLevel],
        streams: dict[str, Stream],
        num_images: int,
        picture_images: torch.Tensor | None,
        progress: checkpoint.Progress,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.levels = levels
        self.streams = streams
        self.picture_images = picture_images
        self.progress = progress
        self.device = levels["pretrain"].engine.device
        self.output_dir = Path(recipe.output_dir)
        self.num_cycles = count_cycles(recipe, num_images)
        self.images_per_cycle = recipe.pretrain.batch_size * recipe.pretrain.steps_per_cycle
        self.cycles_per_epoch = num_images / self.images_per_cycle
        self._meters = Meters(self.device)
        self._started = time.perf_counter()
        self._recorded = progress.cycle
        self._stop_signal = 0

    def run(self) -> None:
        """Train to the end, save, and write `summary.json`.

        Raises:
            Stopped: a signal came; everything up to the last finished cycle is saved.
            NonFiniteError: the numbers broke down; the last checkpoint is untouched.
        """
        with ExitStack() as stack:
            monitor = stack.enter_context(
                Monitor(self.output_dir, self.progress.cycle, self.recipe.model.grid_size)
            )
            stack.enter_context(self._listening())
            bar = stack.enter_context(_progress_bar())
            task = bar.add_task("", total=self.num_cycles, completed=self.progress.cycle)
            is_saved = self.progress.cycle > 0  # by the launch that this one continues
            while self.progress.cycle < self.num_cycles:
                is_saved = False
                self._cycle()
                self.progress.cycle += 1
                stop = self._agreed_stop()
                self._record(monitor, is_last=bool(stop) or self.progress.cycle == self.num_cycles)
                bar.update(task, completed=self.progress.cycle, description=self._headline())
                if self._is_due(self.recipe.monitor.picture_interval_epochs):
                    with self._clock_paused():
                        self._picture(monitor)
                if stop or self._is_due(self.recipe.checkpoint.interval_epochs):
                    with self._clock_paused():
                        self._save()
                    is_saved = True
                if stop:
                    raise Stopped(stop)
            self._picture(monitor)
            if not is_saved:
                self._save()
        self._summarise()

    def _cycle(self) -> None:
        for _ in range(self.recipe.pretrain.steps_per_cycle):
            images, _ = self._draw("pretrain")
            with self._meters.timed("time/pretrain_step"):
                micro_batches = images.chunk(self.recipe.pretrain.gradient_accumulation_steps)
                self.method.pretrain_step(list(micro_batches))
            self._measure("pretrain")
        if not isinstance(self.method, MloMae):
            return
        for _ in range(self.recipe.levels["classifier"].steps_per_cycle):
            images, labels = self._draw("classifier")
            with self._meters.timed("time/classifier_step"):
                self.method.classifier_step(images, labels)
            self._measure("classifier")
        images, labels = self._draw("mask")
        with self._meters.timed("time/mask_step"):
            self.method.mask_step(images, labels)
        self._measure("mask")

    def _draw(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with self._meters.timed("time/data"):
            return next(self.streams[name])

    def _measure(self, name: str) -> None:
        level = self.levels[name]
        self._meters.add(f"{name}/loss", level.loss)
        self._meters.add(f"{name}/lr", level.lr)
        # The gradient of the mask level is the hypergradient.
        norm = "hypergradient_norm" if name == "mask" else "grad_norm"
        self._meters.add(f"{name}/{norm}", level.grad_norm)
        if name == "pretrain":
            self._meters.add_mask_frequency(self.method.mask_frequency)
            if (scores := self.method.scores) is not None:
                self._meters.add("masking/score_mean", float(scores.mean()))
                self._meters.add("masking/score_std", float(scores.std(dim=1).mean()))
                self._meters.add("masking/score_entropy", float(_binary_entropy(scores)))

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
            "epoch": cycle / self.cycles_per_epoch,
            "seconds": self.progress.seconds,
            "images_per_second": num_cycles * self.images_per_cycle / elapsed,
        }
        for name, level in self.levels.items():
            record |= {f"{name}/step": level.num_steps, f"{name}/num_skipped": level.num_skipped}
        record |= self._meters.reduce()
        monitor.write(record)
        logger.info("%s", _one_line(record))

    def _picture(self, monitor: Monitor) -> None:
        """Draw on the first rank; all ranks run the forward pass, for ZeRO-3 gathers in it."""
        if self.picture_images is None:
            return
        pretrain = self.levels["pretrain"]
        scorer = self.method.picture_scorer()
        with torch.no_grad(), evaluating(pretrain):
            out = pretrain(self.picture_images, scorer=scorer, num_keep=self.method.num_keep)
        if dist.get_rank() == 0:
            data, module = self.recipe.data, pretrain.engine.module
            picture = mask_picture(module, self.picture_images, out, data.mean, data.std)
            monitor.picture("masks", picture, self.progress.cycle)
            save_picture(picture, str(self.output_dir / "masks.png"))

    def _is_due(self, interval_epochs: float | None) -> bool:
        """Whether a multiple of the interval was passed in the latest cycle."""
        if interval_epochs is None:
            return False
        interval = max(1, round(interval_epochs * self.cycles_per_epoch))
        return self.progress.cycle % interval == 0

    def _save(self) -> None:
        folder = self.output_dir / "checkpoints"
        checkpoint.save(folder, self.levels, self.progress, self.recipe)

    @contextmanager
    def _clock_paused(self) -> Iterator[None]:
        """What happens inside counts neither as training time nor against images per second."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def _agreed_stop(self) -> int:
        """The signal that any rank received, on all ranks; 0 for none."""
        flag = torch.tensor(self._stop_signal, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)

    def _listening(self) -> "_Handlers":
        def stop(number: int, _: Any) -> None:
            if not self._stop_signal:
                logger.info("%s: saving after this cycle", signal.Signals(number).name)
            self._stop_signal = number

        return _Handlers(stop)

    def _headline(self) -> str:
        losses = [f"{name} {level.loss:.3f}" for name, level in self.levels.items()]
        return f"{self.recipe.method}  loss: {'  '.join(losses)}"

    def _summarise(self) -> None:
        if dist.get_rank() == 0:
            seconds = self.progress.seconds
            steps = self.levels["pretrain"].num_steps
            summary = {
                "seconds": seconds,
                "pretrain_steps": steps,
                "images_per_second": steps * self.recipe.pretrain.batch_size / seconds,
                "world_size": dist.get_world_size(),
            }
            (self.output_dir / "summary.json").write_text(json.dumps(summary, indent=1))


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


def count_cycles(recipe: Recipe, num_images: int) -> int:
    """Cycles in the recipe's epochs over the images of the pretrain stream, at least one."""
    steps = recipe.epochs * (num_images // recipe.pretrain.batch_size)
    return max(1, round(steps / recipe.pretrain.steps_per_cycle))


def _binary_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Mean entropy of scores read as probabilities, nats; log 2 for undecided ones."""
    p = scores.double().clamp(1e-12, 1 - 1e-12)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean()


def _progress_bar() -> Progress:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, disable=dist.get_rank() != 0, transient=True)


def _one_line(record: Record) -> str:
    shown = ["pretrain/loss", "classifier/loss", "mask/loss", "mask/hypergradient_norm"]
    values = [f"{name} {record[name]:.4g}" for name in shown if name in record]
    return (
        f"cycle {record['cycle']}  epoch {record['epoch']:.2f}  {'  '.join(values)}  "
        f"{record['images_per_second']:.0f} images/s"
    )

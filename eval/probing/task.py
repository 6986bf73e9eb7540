"""The task of a linear probe: steps of all heads, and the number that its protocol reports."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_ffcv import ImagesInfo, open_eval_loader
from eval.frozen.features import eval_augmentation
from eval.probing.heads import LinearHeads, feature_norm, head_accuracies
from eval.probing.images import ProbeImages
from eval.probing.recipe import LEVEL, NORM_EPS, ProbeRecipe
from mlomae.checkpoint.folders import MODEL_FILE
from mlomae.errors import UserError
from mlomae.foreign.layouts import to_timm
from mlomae.models import MaskedAutoencoder
from mlomae.models.precision import at_least_float32
from mlomae.training.engines import TrainingLevel, full_weights
from mlomae.training.task import Task

_EVAL_BATCH_SIZE = 256  # of a rank
_SELECTION = {
    "mae": "none: the only head, after the last epoch",
    "mae_ct": "the best head after the best epoch, on the test images themselves",
    "held_out": "the best head on held-out training images, after the last epoch",
}


class LinearProbe(Task):
    """A cycle is one step of all heads on the features of one batch.

    The batch norm stands outside of the engine: it has no weights, and its statistics are those of
    the whole batch, whatever ranks and accumulation cut it into.

    Args:
        level: the heads, `LinearHeads` on an engine.
        encoder: frozen, on any device.
        files: which the encoder was read from.
        dtype: what the encoder computes in.
    """

    recipe: ProbeRecipe

    def __init__(
        self,
        recipe: ProbeRecipe,
        level: TrainingLevel,
        images: ProbeImages,
        encoder: MaskedAutoencoder,
        files: Sequence[Path],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(recipe, {LEVEL: level}, images.num_images)
        self.images = images
        self.files = files
        self.encoder = encoder.to(self.device, dtype).eval().requires_grad_(False)
        self.norm = feature_norm(encoder.embed_dim, NORM_EPS[recipe.protocol]).to(self.device)
        self.rates = recipe.probe.base_lrs
        # A pretraining that goes on, or a file that is replaced, must not change the encoder of a
        # resumed probe unnoticed.
        self._checksum = self._expected_checksum = _checksum(encoder)
        # accuracy of each head, by the latest evaluation; on the test images the best so far, too
        nothing = torch.zeros(len(self.rates), dtype=torch.float64)
        self._latest, self._best, self._best_epoch = (nothing.clone() for _ in range(3))
        self._test_accuracy = 0.0  # of the chosen head of protocol held_out

    def open(self, cycle: int, stack: ExitStack) -> None:
        """Open the stream of training images.

        Raises:
            UserError: the probe was begun on another encoder.
        """
        if not torch.isclose(self._checksum, self._expected_checksum, rtol=1e-9):
            raise UserError(
                f"{' and '.join(map(str, self.files))} holds other weights than those that this "
                "probe was begun with: give these as init_from, or choose another output_dir"
            )
        images = self.images
        place = images.train.path, images.augmentation
        self.open_stream(LEVEL, cycle, stack, *place, indices=images.trained)

    def cycle(self) -> None:
        """One step of all heads."""
        images, labels = self.draw(LEVEL)
        num_parts = self.recipe.probe.gradient_accumulation_steps
        with self.meters.timed("time/encoder"), torch.no_grad():
            features = torch.cat([self._features(part) for part in images.chunk(num_parts)])
        with self.meters.timed("time/probe_step"):
            parts = (self.norm(features).chunk(num_parts), labels.chunk(num_parts))
            self.levels[LEVEL].step(*zip(*parts, strict=True))
        self.measure(LEVEL)

    def evaluate(self) -> dict[str, float]:
        """Accuracy of each head; under held_out the test images are met at the end alone."""
        heads = self._whole_heads()
        if self.recipe.protocol == "held_out":
            return self._evaluate_held_out(heads)
        self._latest = self._accuracies(heads, self.images.test)
        is_better = self._latest > self._best
        self._best[is_better] = self._latest[is_better]
        self._best_epoch[is_better] = self._epoch
        measured = self._named("test/accuracy", self._latest)
        return measured | {"test/best_accuracy": float(self._best.max())}

    def _evaluate_held_out(self, heads: LinearHeads) -> dict[str, float]:
        self._latest = self._accuracies(heads, self.images.train, self.images.held_out)
        measured = self._named("held_out/accuracy", self._latest)
        if self.levels[LEVEL].num_steps_done == self.num_cycles:
            on_test = self._accuracies(heads, self.images.test)
            self._test_accuracy = float(on_test[self._latest.argmax()])
            measured["test/accuracy"] = self._test_accuracy
        return measured

    def weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Batch norm and heads under MAE-CT's names for a probe's; several heads are numbered."""
        tensors = {f"layer.1.{name}": value for name, value in self._norm_state().items()}
        for name, value in full_weights(self.levels[LEVEL]).items():
            _, number, kind = name.split(".")
            place = "layer.2" if len(self.rates) == 1 else f"layer.2.{number}"
            tensors[f"{place}.{kind}"] = value
        yield MODEL_FILE, tensors

    def shared_state(self) -> dict[str, Tensor]:
        """The batch norm, and how well each head has done so far."""
        best = {"best": self._best, "best_epoch": self._best_epoch}
        return self._norm_state() | best | {"encoder": self._checksum}

    def load_state(self, shared: dict[str, Tensor], of_rank: dict[str, Tensor]) -> None:
        """Take back what `shared_state` gave."""
        self._expected_checksum = shared.pop("encoder")
        self._best, self._best_epoch = shared.pop("best"), shared.pop("best_epoch")
        self.norm.load_state_dict(shared)

    def result(self) -> dict[str, Any]:
        """The number that the protocol reports, and how it came about."""
        accuracy, head, epoch = self._reported()
        recipe, images = self.recipe, self.images
        return {
            "protocol": recipe.protocol,
            "accuracy": accuracy,
            "head": head,
            "base_lr": self.rates[head],
            "epoch": epoch,
            "selection": _SELECTION[recipe.protocol],
            "encoder": [str(file) for file in self.files],
            "global_pool": recipe.model.global_pool,
            "train": str(images.train.path),
            "test": str(images.test.path),
            "num_train_images": images.num_images,
            "num_held_out_images": 0 if images.held_out is None else len(images.held_out),
            "num_test_images": images.test.num_samples,
            "num_classes": recipe.data.num_classes,
        }

    def report(self) -> list[tuple[str, str]]:
        """The protocol, the reported number, and how it was selected."""
        accuracy, head, epoch = self._reported()
        images, protocol = self.images, self.recipe.protocol
        return [
            ("protocol", protocol),
            ("encoder", " and ".join(map(str, self.files))),
            ("test images", f"{images.test.path} ({images.test.num_samples})"),
            ("heads", f"{len(self.rates)}, base_lr {' '.join(f'{r:g}' for r in self.rates)}"),
            ("accuracy", f"{100 * accuracy:.2f} %"),
            ("of", f"base_lr {self.rates[head]:g}, epoch {epoch:.1f}"),
            ("selected", _SELECTION[protocol]),
        ]

    @property
    def _epoch(self) -> float:
        return self.levels[LEVEL].num_steps_done / self.cycles_per_epoch

    def _reported(self) -> tuple[float, int, float]:
        """The protocol's number, the head that it is of, and after which epoch."""
        if self.recipe.protocol == "mae_ct":
            head = int(self._best.argmax())
            return float(self._best[head]), head, float(self._best_epoch[head])
        head = int(self._latest.argmax())
        if self.recipe.protocol == "mae":
            return float(self._latest[head]), head, self._epoch
        return self._test_accuracy, head, self._epoch

    def _features(self, images: Tensor) -> Tensor:
        """Of images [B, ...], float32 or wider [B, D]."""
        return at_least_float32(self.encoder(images))

    def _norm_state(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.norm.state_dict().items()}

    def _named(self, tag: str, accuracies: Tensor) -> dict[str, float]:
        if len(self.rates) == 1:
            return {tag: float(accuracies[0])}
        pairs = zip(self.rates, accuracies.tolist(), strict=True)
        return {f"{tag}_base_lr_{rate:g}": accuracy for rate, accuracy in pairs}

    def _whole_heads(self) -> LinearHeads:
        """The fp32 heads outside of the engine: ranks may then run them unequally often."""
        sizes = self.encoder.embed_dim, self.recipe.data.num_classes, len(self.rates)
        with torch.device("meta"):  # drawing weights would move the random state
            heads = LinearHeads(*sizes)
        heads.load_state_dict(full_weights(self.levels[LEVEL], everywhere=True), assign=True)
        return heads.to(self.device)

    def _accuracies(
        self, heads: LinearHeads, info: ImagesInfo, indices: np.ndarray | None = None
    ) -> Tensor:
        """Of each head, float64 on the CPU, each image counted once over all ranks."""
        data = self.recipe.data
        loader = open_eval_loader(
            info.path,
            augmentation=eval_augmentation(info, self.recipe.model.image_size),
            batch_size=_EVAL_BATCH_SIZE,
            mean=data.mean,
            std=data.std,
            indices=indices,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_workers=data.num_workers,
            backend=data.backend,
            device=self.device,
        )
        self.norm.eval()
        logits_of = lambda images: heads(self.norm(self._features(images)))  # noqa: E731
        accuracies = head_accuracies(logits_of, loader, len(self.rates), self.device)
        self.norm.train()
        return accuracies


def _checksum(encoder: MaskedAutoencoder) -> Tensor:
    """A number that other weights would hardly have, float64 on the CPU; without the decoder."""
    norms = [tensor.double().norm().cpu() for tensor in to_timm(encoder.state_dict()).values()]
    return torch.stack(norms).sum()

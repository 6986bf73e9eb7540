"""Linear probe of a frozen encoder, on cached features.

    python eval/cached_probe.py --checkpoint RUN --train train.beton --test test.beton

This is the fast protocol: every image is encoded once, without augmentation, and a linear
classifier is trained on these features. The published protocols of eval/linear_probe.py augment the
training images in every epoch and run the encoder again each time, so their numbers are not
comparable with these.

The learning rate is chosen from a small grid on a tenth of the training images that the probe
does not see; then the probe is trained on all of them. The test images play no part in it. Several
processes share the encoding; the first of them trains the probe.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_ffcv import split_by_class
from eval.frozen import cli, flags
from eval.frozen.features import EncodedSets, ImageSets
from mlomae.distributed.collectives import rank
from mlomae.errors import UserError

_HELD_OUT_RATIO = 0.1
_WARMUP_RATIO = 0.1
_PREDICT_BATCH_SIZE = 8192

_PROTOCOL = """
Linear classifier behind a batch norm without affine parameters, on features of un-augmented images,
each encoded once: SGD, momentum 0.9, no weight decay, warm-up over a tenth of the steps, cosine to
zero. The rate was chosen on a tenth of the training images, never on the test images. Published
linear probes augment the training images in every epoch: their numbers are not comparable.
"""


@dataclass(frozen=True)
class ProbeSettings:
    """How the probe is trained."""

    base_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates to choose from, at 256 images per step; lr = base_lr * batch / 256."""
    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per step; all of them where there are fewer."""
    seed: int = 0
    """Decides the held-out images, the initial weights and the order of the images."""


class NormedHeads(nn.Module):
    """Several linear classifiers behind one batch norm without affine parameters."""

    def __init__(
        self, num_features: int, num_classes: int, num_heads: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.num_classes, self.num_heads = num_classes, num_heads
        # momentum None: evaluation uses the mean statistics of all batches, not of the latest few
        self.norm = nn.BatchNorm1d(num_features, affine=False, eps=1e-6, momentum=None)
        self.linear = nn.Linear(num_features, num_classes * num_heads)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, num_classes, num_heads] from features [B, D]."""
        logits: Tensor = self.linear(self.norm(features))
        return logits.view(-1, self.num_classes, self.num_heads)

    @torch.no_grad()
    def predict(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Class of each image by each head, int64 [n, num_heads], from features [n, D].

        Args:
            features: of all images.
            rows: int64, the images that are meant; None for all.
        """
        self.eval()
        rows = torch.arange(len(features), device=features.device) if rows is None else rows
        parts = torch.split(rows, _PREDICT_BATCH_SIZE)
        return torch.cat([self(features[part]).argmax(dim=1) for part in parts])


@dataclass(frozen=True)
class CachedProbe:
    """A trained probe and how its learning rate was chosen."""

    heads: NormedHeads
    """The one head trained on all training images."""
    base_lr: float
    """The chosen rate."""
    held_out_accuracy: dict[float, float]
    """Accuracy in [0, 1] on the held-out training images, by base_lr."""

    def predict(self, features: Tensor) -> Tensor:
        """Class of each image, int64 [n], from features [n, D]."""
        return self.heads.predict(features)[:, 0]


def fit_cached_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, settings: ProbeSettings
) -> CachedProbe:
    """Choose the learning rate on held-out training images, then train on all.

    Args:
        features: float32 [n, D] of the training images.
        labels: int64 [n], in [0, num_classes).
        num_classes: Number of classes.
        settings: How to train.
    """
    rest, held_out = (
        torch.from_numpy(part).to(features.device)
        for part in split_by_class(labels.cpu().numpy(), _HELD_OUT_RATIO, settings.seed)
    )
    heads = _train(features, labels, num_classes, settings.base_lrs, settings, rest)
    correct = heads.predict(features, held_out) == labels[held_out, None]
    accuracies = correct.double().mean(dim=0).tolist()
    held_out_accuracy = dict(zip(settings.base_lrs, accuracies, strict=True))
    base_lr = max(held_out_accuracy, key=held_out_accuracy.__getitem__)
    heads = _train(features, labels, num_classes, (base_lr,), settings)
    return CachedProbe(heads, base_lr, held_out_accuracy)


def _train(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    base_lrs: tuple[float, ...],
    settings: ProbeSettings,
    rows: Tensor | None = None,
) -> NormedHeads:
    """Train one head per learning rate on the same batches.

    SGD, momentum 0.9, no weight decay, linear warm-up over a tenth of the steps, cosine to zero.
    Only `rows` of the features are used, None for all: a copy of them could not be held as well.
    """
    rows = torch.arange(len(features), device=features.device) if rows is None else rows
    generator = torch.Generator().manual_seed(settings.seed)
    heads = NormedHeads(features.shape[1], num_classes, len(base_lrs), generator)
    heads.to(features.device).train()
    batch_size = min(settings.batch_size, len(rows))
    num_used = len(rows) // batch_size * batch_size  # an epoch's incomplete batch is left out
    num_steps = settings.epochs * num_used // batch_size

    # Without weight decay, SGD's step is linear in the gradient: weighting a head's loss by its
    # rate is the same as giving the head this rate.
    rates = torch.tensor(base_lrs, device=features.device) * batch_size / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(step, num_steps))
    for _ in range(settings.epochs):
        order = rows[torch.randperm(len(rows), generator=generator).to(features.device)]
        for batch in torch.split(order[:num_used], batch_size):
            targets = labels[batch, None].expand(-1, len(base_lrs))
            losses = F.cross_entropy(heads(features[batch]), targets, reduction="none").mean(dim=0)
            optimizer.zero_grad()
            (losses * rates).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return heads


def _decay(step: int, num_steps: int) -> float:
    """The learning rate relative to its peak."""
    num_warmup = math.ceil(_WARMUP_RATIO * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup))) / 2


def evaluate(
    data: EncodedSets, settings: ProbeSettings, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Accuracy on the test images, in [0, 1], with the settings and the choice that gave it."""
    features, labels = data.train.features.load(device), data.train.labels.to(device)
    probe = fit_cached_probe(features, labels, num_classes=data.num_classes, settings=settings)
    parts = data.test.features.parts(device)
    predictions = torch.cat([probe.predict(part).cpu() for part in parts])
    return {
        "accuracy": (predictions == data.test.labels).double().mean().item(),
        "base_lr": probe.base_lr,
        "held_out_accuracy": probe.held_out_accuracy,
        "settings": asdict(settings),
    }


def _check(labels: np.ndarray, settings: ProbeSettings) -> None:
    """Refuse batches without a deviation, and images of which none can be held out."""
    if settings.batch_size < 2:
        raise UserError("--batch_size is 1, and a batch norm needs 2 images or more: raise it")
    rest, held_out = split_by_class(labels, _HELD_OUT_RATIO, settings.seed)
    if len(rest) < 2 or not len(held_out):
        raise UserError(
            f"{len(labels)} training images are too few to hold some out, on which the rate is "
            "chosen: give at least two of a class with --train or --num_train_images"
        )


def _run(args: argparse.Namespace) -> None:
    settings = ProbeSettings(tuple(args.base_lrs), args.epochs, args.batch_size, args.seed)
    sets = ImageSets(args.train, args.test, args.num_train_images)
    _check(sets.train.labels, settings)

    def measure(evaluation: cli.Evaluation) -> dict[str, Any]:
        data = evaluation.encode(sets)
        if rank() != 0:
            return {}
        return {**cli.describe(data), **evaluate(data, settings, evaluation.device)}

    cli.evaluate_encoder(args, "cached_probe", measure, _PROTOCOL)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = flags.build_parser("eval/cached_probe.py", __doc__)
    flags.add_features_argument(parser)
    flags.add_train_argument(parser)
    flags.add_num_train_argument(parser)
    default = ProbeSettings()
    parser.add_argument(
        "--base_lrs", type=flags.positive_float, nargs="+", default=default.base_lrs, metavar="LR"
    )
    parser.add_argument("--epochs", type=flags.positive_int, default=default.epochs)
    parser.add_argument("--batch_size", type=flags.positive_int, default=default.batch_size)
    parser.add_argument("--seed", type=flags.non_negative_int, default=default.seed)
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())

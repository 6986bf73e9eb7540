"""Linear probe of a frozen encoder, on cached features.

    python eval/linear_probe.py --checkpoint RUN --train train.beton --test test.beton

This is the fast protocol: every image is encoded once, without augmentation, and a linear
classifier is trained on these features. MAE's published protocol augments the training images in
every epoch and runs the encoder again each time, so its numbers are not comparable with these.

The learning rate is chosen from a small grid on a tenth of the training images that the probe
does not see; then the probe is trained on all of them. The test images play no part in it.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_ffcv import split_by_class
from eval import cli
from eval.features import EncodedSets

_HELD_OUT_RATIO = 0.1
_WARMUP_RATIO = 0.1
_PREDICT_BATCH_SIZE = 8192


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


class LinearHeads(nn.Module):
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
        logits = self.linear(self.norm(features))
        return logits.view(-1, self.num_classes, self.num_heads)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Class of each image by each head, int64 [n, num_heads], from features [n, D]."""
        self.eval()
        return torch.cat([self(part).argmax(1) for part in features.split(_PREDICT_BATCH_SIZE)])


@dataclass(frozen=True)
class LinearProbe:
    """A trained probe and how its learning rate was chosen."""

    heads: LinearHeads
    """The one head trained on all training images."""
    base_lr: float
    """The chosen rate."""
    held_out_accuracy: dict[float, float]
    """Accuracy in [0, 1] on the held-out training images, by base_lr."""

    def predict(self, features: Tensor) -> Tensor:
        """Class of each image, int64 [n], from features [n, D]."""
        return self.heads.predict(features)[:, 0]


def fit_linear_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, settings: ProbeSettings
) -> LinearProbe:
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
    heads = _train(features[rest], labels[rest], num_classes, settings.base_lrs, settings)
    correct = heads.predict(features[held_out]) == labels[held_out, None]
    accuracies = correct.double().mean(dim=0).tolist()
    held_out_accuracy = dict(zip(settings.base_lrs, accuracies, strict=True))
    base_lr = max(held_out_accuracy, key=held_out_accuracy.__getitem__)
    heads = _train(features, labels, num_classes, (base_lr,), settings)
    return LinearProbe(heads, base_lr, held_out_accuracy)


def _train(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    base_lrs: tuple[float, ...],
    settings: ProbeSettings,
) -> LinearHeads:
    """Train one head per learning rate on the same batches.

    SGD, momentum 0.9, no weight decay, linear warm-up over a tenth of the steps, cosine to zero.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    heads = LinearHeads(features.shape[1], num_classes, len(base_lrs), generator)
    heads.to(features.device).train()
    batch_size = min(settings.batch_size, len(features))
    num_used = len(features) // batch_size * batch_size  # an epoch's incomplete batch is left out
    num_steps = settings.epochs * num_used // batch_size

    # Without weight decay, SGD's step is linear in the gradient: weighting a head's loss by its
    # rate is the same as giving the head this rate.
    rates = torch.tensor(base_lrs, device=features.device) * batch_size / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(step, num_steps))
    for _ in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for batch in order[:num_used].split(batch_size):
            targets = labels[batch, None].expand(-1, len(base_lrs))
            losses = F.cross_entropy(heads(features[batch]), targets, reduction="none").mean(dim=0)
            optimizer.zero_grad()
            (losses * rates).sum().backward()
            optimizer.step()
            schedule.step()
    return heads


def _decay(step: int, num_steps: int) -> float:
    """The learning rate relative to its peak."""
    num_warmup = math.ceil(_WARMUP_RATIO * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup))) / 2


def evaluate(data: EncodedSets, settings: ProbeSettings) -> dict[str, Any]:
    """Accuracy on the test images, in [0, 1], with the settings and the choice that gave it."""
    probe = fit_linear_probe(*data.train, num_classes=data.num_classes, settings=settings)
    correct = probe.predict(data.test.features) == data.test.labels
    return {
        "accuracy": correct.double().mean().item(),
        "base_lr": probe.base_lr,
        "held_out_accuracy": probe.held_out_accuracy,
        "settings": asdict(settings),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = cli.build_parser("eval/linear_probe.py", __doc__)
    default = ProbeSettings()
    parser.add_argument(
        "--base_lrs", type=cli.positive_float, nargs="+", default=default.base_lrs, metavar="LR"
    )
    parser.add_argument("--epochs", type=cli.positive_int, default=default.epochs)
    parser.add_argument("--batch_size", type=cli.positive_int, default=default.batch_size)
    parser.add_argument("--seed", type=int, default=default.seed)
    args = parser.parse_args(argv)
    settings = ProbeSettings(tuple(args.base_lrs), args.epochs, args.batch_size, args.seed)
    return cli.run(
        lambda: cli.evaluate_encoder(args, "linear_probe", lambda data: evaluate(data, settings))
    )


if __name__ == "__main__":
    sys.exit(main())

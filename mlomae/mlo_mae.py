"""MLO-MAE: three coupled levels, and the hypergradient that ties them together.

Source: Guo et al., "Downstream Task Guided Masking Learning in Masked Autoencoders Using
Multi-Level Optimization", arXiv 2402.18128.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlomae.engines import TrainingLevel
from mlomae.hypergrad import StepRecord
from mlomae.models import Scorer, reconstruction_loss
from mlomae.models.precision import at_least_float32


@dataclass
class _MicroBatch:
    """One masked forward pass of the recorded encoder step, with its choice of patches frozen."""

    images: Tensor  # [B, C, H, W]
    embedding: Tensor  # [B, N, D]
    scores: Tensor  # [B, N]
    mask: Tensor  # [B, N]


@dataclass
class _PretrainRecord:
    step: StepRecord
    micro_batches: list[_MicroBatch]


@dataclass
class _ClassifierRecord:
    step: StepRecord
    images: Tensor
    labels: Tensor
    random_state: Tensor  # of the device's generator before the head's dropout


class MloMae:
    """The three levels of one MLO-MAE cycle.

    `pretrain` holds encoder and decoder w, `classifier` the head C on the encoder's class token,
    `mask` the masking network theta. The masking network's input is detached from the encoder
    (frozen scores), so w meets theta only in the weights of the patch losses.
    """

    def __init__(
        self, pretrain: TrainingLevel, classifier: TrainingLevel, mask: TrainingLevel
    ) -> None:
        self.pretrain = pretrain
        self.classifier = classifier
        self.mask = mask
        self.mask_frequency: Tensor | None = None  # [N], of the latest encoder step
        self.scores: Tensor | None = None  # [B, N], of the latest encoder step
        self._pretrain_record: _PretrainRecord | None = None
        self._classifier_record: _ClassifierRecord | None = None

    def pretrain_step(self, micro_batches: list[Tensor], *, record: bool) -> None:
        """Level 1: one step of w on the reconstruction loss weighted by the scores.

        Args:
            micro_batches: images [B, C, H, W], as many as the level accumulates.
            record: keep what the hypergradient through this step needs.
        """
        passes, losses = [], []
        for i, images in enumerate(micro_batches):
            out = self.pretrain(images, scorer=self._score)
            loss = reconstruction_loss(out["patch_loss"], out["mask"], out["scores"])
            self.pretrain.backward(loss, is_last=i == len(micro_batches) - 1)
            losses.append(loss.detach())
            passes.append(_MicroBatch(images, out["embedding"], out["scores"], out["mask"]))
        self.scores = passes[-1].scores
        self.mask_frequency = passes[-1].mask.mean(dim=0)

        mean_loss = torch.stack(losses).mean()
        if not record:
            self.pretrain.step(mean_loss)
            return
        with self.pretrain.level.recording() as step:
            taken = self.pretrain.step(mean_loss)
        self._pretrain_record = _PretrainRecord(step, passes) if taken else None

    def classifier_step(self, images: Tensor, labels: Tensor, *, record: bool) -> None:
        """Level 2: one step of C on the cross-entropy of the frozen encoder's features."""
        with torch.no_grad():
            features = self.pretrain(images)
        random_state = _random_state(features.device)
        loss = F.cross_entropy(self.classifier(features), labels)
        self.classifier.backward(loss)
        if not record:
            self.classifier.step(loss.detach())
            return
        with self.classifier.level.recording() as step:
            taken = self.classifier.step(loss.detach())
        self._classifier_record = (
            _ClassifierRecord(step, images, labels, random_state) if taken else None
        )

    def mask_step(self, images: Tensor, labels: Tensor) -> None:
        """Level 3: one step of theta along the exact one-step hypergradient.

        Without a recorded step below (it was skipped as non-finite) this step is skipped, too.
        """
        below, head = self._pretrain_record, self._classifier_record
        self._pretrain_record = self._classifier_record = None
        if below is None or head is None:
            self.mask.skip("the step below it was skipped")
            return
        loss, adjoint = self._adjoint_of_encoder(images, labels, head)
        cotangent = self.pretrain.level.cotangent(below.step, adjoint)
        derivatives = [
            self._patch_loss_derivatives(below.step, cotangent, passed)
            for passed in below.micro_batches
        ]
        self._backward_through_scores(below.micro_batches, derivatives)
        self.mask.step(loss)

    def _adjoint_of_encoder(
        self, images: Tensor, labels: Tensor, head: _ClassifierRecord
    ) -> tuple[Tensor, list[Tensor]]:
        """Validation loss and lambda = dL3/dE + (dC/dE)^T dL3/dC, averaged over ranks.

        Both cotangents travel through the encoder, so they are added and pushed down in one
        backward pass over the two batches.
        """
        features = self.pretrain(torch.cat([head.images, images]))
        seen, held_out = features.split([len(head.images), len(images)])

        leaf = held_out.detach().requires_grad_()
        self.classifier.engine.eval()  # the validation loss sees no dropout
        loss = F.cross_entropy(self.classifier(leaf), labels)
        adjoint_of_head = self.classifier.level.pull_back(loss)
        self.classifier.engine.train()

        direct = _inner(held_out, leaf.grad)
        through_head = _inner(seen, self._head_term(head, seen, adjoint_of_head))
        return loss.detach(), self.pretrain.level.pull_back(direct + through_head)

    def _head_term(
        self, head: _ClassifierRecord, features: Tensor, adjoint: list[Tensor]
    ) -> Tensor:
        """Gradient by the features of <dL2/dC, c>, with c the cotangent of the head's step.

        Head and encoder meet only in the features, so nothing second-order reaches the encoder.
        """
        level = self.classifier.level
        leaf = features.detach().requires_grad_()
        cotangent = level.cotangent(head.step, adjoint)
        with (
            _replayed(head.random_state, leaf.device),
            level.tangent(head.step, cotangent) as tangent,
        ):
            logits = tangent.module(leaf)
            tangent.of_loss(lambda x: F.cross_entropy(x, head.labels), logits).backward()
        return leaf.grad

    @torch.no_grad()
    def _patch_loss_derivatives(
        self, step: StepRecord, cotangent: list[Tensor], passed: _MicroBatch
    ) -> Tensor:
        """Derivative of every patch's loss along the cotangent at the old weights, [B, N]."""
        with self.pretrain.level.tangent(step, cotangent) as tangent:
            out = tangent.module(passed.images, scorer=lambda _: passed.scores)
            return tangent.of(out["patch_loss"])

    def _backward_through_scores(
        self, passes: list[_MicroBatch], derivatives: list[Tensor]
    ) -> None:
        """Leave (d2 L1 / dtheta dw)^T c in the masking network's gradient.

        w enters L1 only through the patch losses and theta only through their weights, so this is
        one backward pass of the masking network on a table of numbers.
        """
        scores = self.mask(torch.cat([p.embedding for p in passes]))
        self.mask.backward(
            reconstruction_loss(torch.cat(derivatives), torch.cat([p.mask for p in passes]), scores)
        )

    def picture_scorer(self) -> Scorer:
        """Scores images for a picture, as training would."""
        return self._score

    @torch.no_grad()
    def _score(self, embedding: Tensor) -> Tensor:
        return self.mask(embedding)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    return (at_least_float32(left) * at_least_float32(right)).sum()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed(random_state: Tensor, device: torch.device) -> Iterator[None]:
    """The device's generator at an earlier state; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(random_state, device)
        else:
            torch.set_rng_state(random_state)
        yield

"""MLO-MAE: three coupled levels, and the losses that tie them together.

Source: Guo et al., "Downstream Task Guided Masking Learning in Masked Autoencoders Using
Multi-Level Optimization", arXiv 2402.18128.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mlomae.hypergrad import Estimator, Multilevel, WeightedLoss
from mlomae.hypergrad.losses import Loss, Models, ReplayedLoss
from mlomae.models import Scorer, gumbel_keys
from mlomae.pretraining.masks import MaskedBatch, MaskSchedule, Weighting, loss_weights
from mlomae.training.engines import TrainingLevel, evaluating

UNLABELLED = 255  # in masks: a pixel without a class


class Choice(NamedTuple):
    """Which patches of a batch were hidden, and what decided it."""

    embedding: Tensor  # [B, N, D], detached from the encoder: frozen scores
    scores: Tensor  # [B, N]
    mask: Tensor  # [B, N]: 1 where the patch was hidden
    restore: Tensor  # [B, N]: each patch's place in the order of rising keys


class FrozenReconstruction(WeightedLoss):
    """Level 1: the loss of the hidden patches, each weighted by its score.

    The masking network's input is detached from the encoder, so w meets theta only in the weights
    of the patch losses (equation 1 of arXiv 2402.18128).

    Attributes:
        choice: of the latest micro-batch.
    """

    choice: Choice

    def __init__(self, weighting: Weighting = "published") -> None:
        super().__init__(self._losses, self._weights)
        self.weighting = weighting

    def _losses(
        self, models: Models, batch: MaskedBatch, frozen: Choice | None = None
    ) -> tuple[Tensor, Choice]:
        """Loss of every patch [B, N], and the choice of the hidden ones."""
        scorer = _Selection(models["mask"], batch) if frozen is None else _Replay(frozen)
        out = models["pretrain"](batch.images, scorer=scorer, num_keep=batch.num_keep)
        scores = scorer.scores.detach()
        self.choice = Choice(out["embedding"], scores, out["mask"], out["restore"])
        return out["patch_loss"], self.choice

    def _weights(self, models: Models, choice: Choice) -> Tensor:
        return loss_weights(models["mask"](choice.embedding), choice.mask, self.weighting)


class CoupledReconstruction(ReplayedLoss):
    """Level 1 as the public code has it: w also moves the scores, which read its embedding.

    That second route lets the encoder lower its loss by making hard patches look unimportant; the
    paper does not intend it. The choice of hidden patches is that of the step itself in every
    derivative.

    Attributes:
        choice: of the latest micro-batch.
    """

    choice: Choice

    def __init__(self, weighting: Weighting = "published") -> None:
        super().__init__(self._loss)
        self.weighting = weighting

    def _loss(
        self, models: Models, batch: MaskedBatch, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, and each patch's place in the order of rising keys [B, N]."""
        scorer = _Selection(models["mask"], batch, places)
        out = models["pretrain"](batch.images, scorer=scorer, num_keep=batch.num_keep, coupled=True)
        loss = (loss_weights(scorer.scores, out["mask"], self.weighting) * out["patch_loss"]).sum()
        if places is None:
            scores = scorer.scores.detach()
            self.choice = Choice(out["embedding"], scores, out["mask"], out["restore"])
        return loss, out["restore"]


class _Selection:
    """Scores patches, and orders them by score or by a Gumbel draw around it.

    Args:
        places: [B, N], repeats the order of an earlier pass, with new scores.

    Attributes:
        scores: [B, N], of the masking network.
    """

    scores: Tensor

    def __init__(self, network: Scorer, batch: MaskedBatch, places: Tensor | None = None) -> None:
        self.network = network
        self.batch = batch
        self.places = places

    def __call__(self, embedding: Tensor) -> Tensor:
        """Embeddings [B, N, D] -> keys [B, N], of which the largest are hidden."""
        self.scores = self.network(embedding)
        if self.places is not None:
            return self.places.to(self.scores.dtype)
        if not self.batch.temperature:
            return self.scores
        return gumbel_keys(self.scores.detach(), self.batch.temperature, self.batch.generator())


class _Replay:
    """Repeats a choice."""

    def __init__(self, choice: Choice) -> None:
        self.scores = choice.scores
        self.keys = choice.restore.to(choice.scores.dtype)

    def __call__(self, embedding: Tensor) -> Tensor:
        """Keys [B, N] that order the patches as they were."""
        return self.keys


def classification_loss(models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Levels 2 and 3: cross-entropy of the head on the encoder's class token.

    Args:
        batch: images [B, C, H, W] and labels [B].
    """
    images, labels = batch
    return F.cross_entropy(models["classifier"](models["pretrain"](images)), labels)


def segmentation_loss(models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Levels 2 and 3: mean cross-entropy over the pixels that have a class.

    Logits of the encoder's patch tokens are resized bilinearly to the masks. Each rank averages
    over its own pixels. Where none of them has a class, its loss is 0, and so is its gradient:
    the other ranks decide.

    Args:
        batch: images [B, C, H, W] and masks [B, H, W], 255 for pixels without a class.
    """
    images, masks = batch
    patch_logits = models["classifier"](models["pretrain"](images, as_map=True))
    logits = F.interpolate(patch_logits, masks.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(
        logits.movedim(1, -1).flatten(0, 2),
        masks.flatten(),
        ignore_index=UNLABELLED,
        reduction="sum",
    )
    return total / (masks != UNLABELLED).sum().clamp(min=1)


HEAD_LOSSES: dict[str, Loss] = {
    "classification": classification_loss,
    "segmentation": segmentation_loss,
}
"""The loss of levels 2 and 3 by what their labels are."""


class LevelLoss(NamedTuple):
    """The loss of a level and the levels that it reads, as `mlomae.hypergrad.Level` has them."""

    loss: Loss
    lower: tuple[str, ...] = ()
    upper: tuple[str, ...] = ()


def level_losses(reconstruction: Loss, head: Loss = classification_loss) -> dict[str, LevelLoss]:
    """The three coupled levels, lowest first.

    Args:
        reconstruction: of `pretrain`.
        head: of `classifier` and `mask`, one of `HEAD_LOSSES`.
    """
    return {
        "pretrain": LevelLoss(reconstruction, upper=("mask",)),
        "classifier": LevelLoss(head, lower=("pretrain",)),
        "mask": LevelLoss(head, lower=("pretrain", "classifier")),
    }


class MloMaeProblem(Multilevel):
    """The three levels of MLO-MAE, and how each steps in a cycle.

    `pretrain` holds encoder and decoder w, `classifier` the head C on the encoder's features,
    `mask` the masking network theta.

    Args:
        estimator: of the hypergradient by theta.
        keep_activations: as `Multilevel` has it.
        schedule: of mask ratio and temperature.

    Raises:
        ValueError: the estimator cannot work with these levels; says why, and the fix.
    """

    def __init__(
        self,
        pretrain: TrainingLevel,
        classifier: TrainingLevel,
        mask: TrainingLevel,
        *,
        estimator: Estimator,
        schedule: MaskSchedule,
        keep_activations: bool = True,
    ) -> None:
        levels = (pretrain, classifier, mask)
        super().__init__(levels, estimator=estimator, keep_activations=keep_activations)
        self.pretrain = pretrain
        self.classifier = classifier
        self.mask = mask
        self.schedule = schedule

    def pretrain_step(self, micro_batches: list[Tensor]) -> None:
        """Level 1: one step of w.

        Args:
            micro_batches: images [B, C, H, W], as many as the level accumulates.
        """
        self.pretrain.step(*self.schedule.batches(micro_batches, self.pretrain.num_steps_done))

    def classifier_step(self, images: Tensor, labels: Tensor) -> None:
        """Level 2: one step of C on the features of the encoder, which stays as it is.

        Args:
            images: [B, C, H, W].
            labels: [B], or masks [B, H, W].
        """
        with evaluating(self.pretrain):  # a frozen encoder drops no path
            self.classifier.step((images, labels))

    def mask_step(self, images: Tensor, labels: Tensor) -> None:
        """Level 3: one step of theta along the hypergradient of the validation loss.

        Without the recorded steps below (one was skipped as non-finite) this one is skipped, too.
        """
        if self.is_recorded("pretrain", "classifier"):
            with evaluating(self.pretrain, self.classifier):
                hypergradient = self.hypergradient("mask", (images, labels))
            self.mask.step_with_hypergradient(hypergradient)
        else:
            self.mask.skip("a step below it was skipped")
        self.clear()

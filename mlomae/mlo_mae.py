"""MLO-MAE: three coupled levels, and the losses that tie them together.

Source: Guo et al., "Downstream Task Guided Masking Learning in Masked Autoencoders Using
Multi-Level Optimization", arXiv 2402.18128.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mlomae.engines import TrainingLevel
from mlomae.hypergrad import Estimator, Multilevel, WeightedLoss
from mlomae.hypergrad.losses import Models
from mlomae.models import Scorer
from mlomae.models.precision import at_least_float32


class Choice(NamedTuple):
    """Which patches of a batch were hidden, and what decided it."""

    embedding: Tensor  # [B, N, D], detached from the encoder: frozen scores
    scores: Tensor  # [B, N]
    mask: Tensor  # [B, N]: 1 where the patch was hidden


class WeightedReconstruction(WeightedLoss):
    """Level 1: the mean loss of the hidden patches, each weighted by its score.

    The masking network's input is detached from the encoder, so w meets theta only in the weights
    of the patch losses (equation 1; the divisor counts hidden patches, as the public code has it).

    Attributes:
        choice: of the latest micro-batch.
    """

    choice: Choice

    def __init__(self) -> None:
        super().__init__(self._losses, self._weights)

    def _losses(
        self, models: Models, images: Tensor, frozen: Choice | None = None
    ) -> tuple[Tensor, Choice]:
        """Loss of every patch [B, N] of images [B, C, H, W], and the choice of the hidden ones."""
        scorer: Scorer = models["mask"] if frozen is None else lambda _: frozen.scores
        out = models["pretrain"](images, scorer=scorer)
        self.choice = Choice(out["embedding"], out["scores"].detach(), out["mask"])
        return out["patch_loss"], self.choice

    @staticmethod
    def _weights(models: Models, choice: Choice) -> Tensor:
        return at_least_float32(models["mask"](choice.embedding)) * choice.mask / choice.mask.sum()


def classification_loss(models: Models, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Levels 2 and 3: cross-entropy of the head on the encoder's class token.

    Args:
        batch: images [B, C, H, W] and labels [B].
    """
    images, labels = batch
    return F.cross_entropy(models["classifier"](models["pretrain"](images)), labels)


LEVELS: dict[str, dict[str, Any]] = {
    "pretrain": {"upper": ("mask",)},
    "classifier": {"loss": classification_loss, "lower": ("pretrain",)},
    "mask": {"loss": classification_loss, "lower": ("pretrain", "classifier")},
}
"""What each level's loss is and reads; `pretrain` gets a `WeightedReconstruction` of its own."""


class MloMae:
    """The three levels of one MLO-MAE cycle.

    `pretrain` holds encoder and decoder w, `classifier` the head C on the encoder's class token,
    `mask` the masking network theta.

    Args:
        estimator: of the hypergradient by theta.
        keep_activations: as `Multilevel` has it.

    Raises:
        ValueError: the estimator cannot work with these levels; says why, and the mend.
    """

    def __init__(
        self,
        pretrain: TrainingLevel,
        classifier: TrainingLevel,
        mask: TrainingLevel,
        *,
        estimator: Estimator,
        keep_activations: bool = True,
    ) -> None:
        self.pretrain = pretrain
        self.classifier = classifier
        self.mask = mask
        levels = [level.level for level in (pretrain, classifier, mask)]
        self.problem = Multilevel(levels, estimator=estimator, keep_activations=keep_activations)

    @property
    def _choice(self) -> Choice:
        loss: WeightedReconstruction = self.pretrain.level.loss
        return loss.choice

    @property
    def mask_frequency(self) -> Tensor:
        """How often each patch was hidden in the latest encoder step, [N]."""
        return self._choice.mask.mean(dim=0)

    @property
    def scores(self) -> Tensor:
        """Scores of the latest encoder step, [B, N]."""
        return self._choice.scores

    def pretrain_step(self, micro_batches: list[Tensor]) -> None:
        """Level 1: one step of w.

        Args:
            micro_batches: images [B, C, H, W], as many as the level accumulates.
        """
        self.pretrain.step(*micro_batches)

    def classifier_step(self, images: Tensor, labels: Tensor) -> None:
        """Level 2: one step of C on the features of the encoder, which stays as it is."""
        self.classifier.step((images, labels))

    def mask_step(self, images: Tensor, labels: Tensor) -> None:
        """Level 3: one step of theta along the hypergradient of the validation loss.

        Without the recorded steps below (one was skipped as non-finite) this one is skipped, too.
        """
        lower = [self.pretrain.level, self.classifier.level]
        if all(level.is_recorded for level in lower):
            module = self.classifier.engine.module.eval()  # the validation loss sees no dropout
            found = self.problem.hypergradient("mask", (images, labels))
            module.train()
            self.mask.step_along(found)
        else:
            self.mask.skip("a step below it was skipped")
        self.problem.clear()

    def picture_scorer(self) -> Scorer:
        """Scores images for a picture, as training would."""
        return self.mask

"""The MLO-MAE problem that every contender solves: networks, optimizers, batches, lower steps.

Scores are frozen (what the masking network reads in a step is a constant) and the head has no
dropout, so that all contenders differentiate the same deterministic function.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlomae.models import (
    ClassificationHead,
    MaskedAutoencoder,
    MaskingNetwork,
    reconstruction_loss,
)

NUM_CLASSES = 100
NUM_WARM_STEPS = 5


@dataclass(frozen=True)
class Size:
    """Architecture and batch size of one column of the benchmark."""

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    hidden_dim: int
    batch_size: int


SIZES = {
    "tiny": Size(32, 4, 64, 2, 2, 32, 1, 2, hidden_dim=32, batch_size=4),
    "small": Size(224, 16, 384, 6, 6, 256, 4, 8, hidden_dim=512, batch_size=16),
    "base": Size(224, 16, 768, 12, 12, 512, 8, 16, hidden_dim=512, batch_size=4),
}


@dataclass
class Problem:
    """Three networks, the optimizers of the two lower levels, and one batch for each level.

    The masking network's optimizer is left out: its step is the same for every contender.
    """

    autoencoder: MaskedAutoencoder
    head: ClassificationHead
    masking: MaskingNetwork
    autoencoder_optimizer: torch.optim.AdamW
    head_optimizer: torch.optim.AdamW
    unlabeled: Tensor  # [B, 3, H, W], for the autoencoder's step
    labeled: tuple[Tensor, Tensor]  # images and labels [B], for the head's step
    held_out: tuple[Tensor, Tensor]  # images and labels, for the masking network

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder, "head": self.head, "masking": self.masking}

    @property
    def device(self) -> torch.device:
        return self.unlabeled.device

    def reconstruction_loss(self, images: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Level 1; differentiable in the autoencoder's and the masking network's weights.

        Args:
            images: [B, 3, H, W].
            embedding: what the masking network reads; None for that of the present weights.
        """

        def score(present: Tensor) -> Tensor:
            return self.masking(present if embedding is None else embedding)

        out = self.autoencoder(images, scorer=score)
        return reconstruction_loss(out["patch_loss"] * out["scores"], out["mask"])

    def classification_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Levels 2 and 3; differentiable in the encoder's and the head's weights."""
        return F.cross_entropy(self.head(self.autoencoder(images)), labels)


def build(size: Size, *, dtype: torch.dtype, device: torch.device) -> Problem:
    """The problem at fresh weights, with the first batches of the stream."""
    torch.manual_seed(0)
    values = asdict(size)
    del values["hidden_dim"], values["batch_size"]
    autoencoder = MaskedAutoencoder(**values, trainable_positions=True)
    head = ClassificationHead(size.embed_dim, NUM_CLASSES, dropout=0.0)
    masking = MaskingNetwork(autoencoder.num_patches, size.embed_dim, size.hidden_dim)
    for network in (autoencoder, head, masking):
        network.to(device, dtype)
    generator = torch.Generator().manual_seed(1)
    batches = [random_batch(size, generator, dtype=dtype, device=device) for _ in range(3)]
    return Problem(
        autoencoder,
        head,
        masking,
        adamw(autoencoder, lr=1.5e-4),
        adamw(head, lr=5e-4),
        batches[0][0],
        batches[1],
        batches[2],
    )


def adamw(network: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW as in the recipe `mlo_mae_vit_base_patch16_imagenet`."""
    return torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)


def random_batch(
    size: Size, generator: torch.Generator, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images with structure at two scales, and random labels."""
    shape = (size.batch_size, 3)
    coarse = torch.randn(*shape, 8, 8, generator=generator)
    fine = torch.randn(*shape, size.image_size, size.image_size, generator=generator)
    images = F.interpolate(coarse, size.image_size, mode="bilinear") + 0.3 * fine
    labels = torch.randint(NUM_CLASSES, (size.batch_size,), generator=generator)
    return images.to(device, dtype), labels.to(device)


def autoencoder_step(problem: Problem) -> None:
    """One plain step of level 1: the masking network is frozen."""
    problem.masking.requires_grad_(False)
    problem.reconstruction_loss(problem.unlabeled).backward()
    problem.masking.requires_grad_(True)
    problem.autoencoder_optimizer.step()
    problem.autoencoder_optimizer.zero_grad()


def head_step(problem: Problem) -> None:
    """One plain step of level 2: the encoder is frozen."""
    images, labels = problem.labeled
    with torch.no_grad():
        features = problem.autoencoder(images)
    F.cross_entropy(problem.head(features), labels).backward()
    problem.head_optimizer.step()
    problem.head_optimizer.zero_grad()


def prepare(size: Size, path: Path, *, device: torch.device) -> None:
    """Take a few steps of the lower levels on other batches, and save where they lead."""
    problem = build(size, dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(2)
    for _ in range(NUM_WARM_STEPS):
        draw = [random_batch(size, generator, dtype=torch.float32, device=device) for _ in "12"]
        problem.unlabeled, problem.labeled = draw[0][0], draw[1]
        autoencoder_step(problem)
        head_step(problem)
    state = {name: network.state_dict() for name, network in problem.networks.items()}
    state["autoencoder_optimizer"] = problem.autoencoder_optimizer.state_dict()
    state["head_optimizer"] = problem.head_optimizer.state_dict()
    torch.save(state, path)


def load(
    size: Size, path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device
) -> Problem:
    """The problem at the prepared weights and optimizer states."""
    problem = build(size, dtype=dtype, device=device)
    state = torch.load(path, map_location=device, weights_only=True)
    for name, network in problem.networks.items():
        network.load_state_dict(state[name])
    problem.autoencoder_optimizer.load_state_dict(state["autoencoder_optimizer"])
    problem.head_optimizer.load_state_dict(state["head_optimizer"])
    return problem

"""How well a masked autoencoder reconstructs hidden patches of images it was not trained on.

    python eval/reconstruct.py --checkpoint RUN --test test.beton
    python eval/reconstruct.py --init_from mae_visualize_vit_base.pth --test V.beton --output_dir D

The mean error of the hidden patches under random masks, under the run's own masks where it has a
masking network, and a picture of each. Several processes share the images; the result is the same
for any number of them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.frozen import cli, flags
from eval.frozen.encoders import PRETRAINING, Encoder
from eval.frozen.features import BATCH_SIZE, ImageSet
from eval.frozen.processes import tracked
from mlomae.checkpoint.folders import MASKING_FILE, RECIPE_FILE
from mlomae.distributed.collectives import rank, sum_in_float64, world_size
from mlomae.errors import UserError
from mlomae.models import MaskedAutoencoder, Scorer, random_scores
from mlomae.models.mae import num_kept
from mlomae.pretraining.masks import MaskSchedule
from mlomae.pretraining.networks import load_masking_network
from mlomae.pretraining.pictures import mask_picture
from mlomae.pretraining.recipe import PretrainingRecipe
from mlomae.randomness import derive_seed
from mlomae.recipe import load_recipe
from mlomae.training.monitor import save_picture

_PROTOCOL = """
Un-augmented images, `mask_ratio` of their patches hidden: `random` are uniform random masks of a
fixed seed, `learned` those of the run's masking network without noise. `patch_error` is the mean
squared error over the hidden patches in the units of the training's target; with `norm_pix_loss`
that is each patch standardised by its own mean and deviation, which does not compare with a model
of raw targets. `pixel_error` (raw targets alone) is the mean squared error of pixel values in
[0, 1]. Pictures of a model of normalised targets put the true mean and deviation of each hidden
patch back: they show structure, and leak the brightness that the model never predicted.
"""


@dataclass(frozen=True)
class ReconstructionSettings:
    """What is hidden, and drawn."""

    mask_ratio: float
    """Share of the patches that is hidden."""
    seed: int = 0
    """Of the random masks."""
    num_pictures: int = 8
    """Images in the picture, the first of the file; 0 for none."""


MakeScorer = Callable[[int], Scorer]
"""From the number of a batch to what scores its patches, of which the highest are hidden."""


def random_masks(seed: int) -> MakeScorer:
    """Uniform random masks, the same on any device and for any number of ranks."""
    return lambda number: random_scores(torch.Generator().manual_seed(derive_seed(seed, number)))


@torch.no_grad()
def reconstruction_error(
    encoder: Encoder, images: ImageSet, masks: MakeScorer, mask_ratio: float, device: torch.device
) -> dict[str, float]:
    """Mean error of the hidden patches of all images. All ranks must call.

    Returns:
        `patch_error` in the target's units; `pixel_error` of pixel values in [0, 1] where the
        target is raw.
    """
    model = encoder.model
    num_keep = num_kept(model.num_patches, mask_ratio)
    sums = torch.zeros(3, dtype=torch.float64)
    for number, batch in _share_of_batches(encoder, images, device):
        out = model(batch, scorer=masks(number), num_keep=num_keep)
        hidden = out["mask"].bool()
        pixels = _pixel_error(model, batch, out["prediction"], encoder.std)
        values = [out["patch_loss"][hidden].sum(), pixels[hidden].sum(), hidden.sum()]
        sums += torch.stack([value.double().cpu() for value in values])
    patch, pixel, count = sum_in_float64(sums).tolist()
    errors = {"patch_error": patch / count}
    return errors if model.norm_pix_loss else errors | {"pixel_error": pixel / count}


def _share_of_batches(
    encoder: Encoder, images: ImageSet, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """This rank's share of the batches (number, images); the batches are those of one rank."""
    starts = range(0, len(images), BATCH_SIZE)
    mine = range(rank(), len(starts), world_size())
    if not mine:
        return
    batches = [np.arange(starts[n], min(starts[n] + BATCH_SIZE, len(images))) for n in mine]
    loader = images.loader(encoder, device, np.concatenate(batches))
    shown = tracked(loader, "reconstructing")
    yield from ((number, batch.to(device)) for number, (batch, _) in zip(mine, shown, strict=True))


def _pixel_error(
    model: MaskedAutoencoder, images: Tensor, prediction: Tensor, std: tuple[float, ...]
) -> Tensor:
    """Mean squared error of each patch [B, N] in pixel values, for predictions of raw targets."""
    difference = prediction.float() - model.patchify(images.float())
    by_channel = torch.unflatten(
        difference, 2, (-1, len(std))
    )  # inside a patch the channel runs fastest
    scale = torch.tensor(std, device=images.device)
    return (by_channel * scale).square().mean(dim=(2, 3))


@torch.no_grad()
def draw(
    encoder: Encoder, images: ImageSet, masks: MakeScorer, settings: ReconstructionSettings,
    device: torch.device,
) -> np.ndarray:  # fmt: skip
    """The first images, their masks and reconstructions, uint8 [H, W, 3]."""
    model = encoder.model
    rows = np.arange(min(settings.num_pictures, len(images)))
    batch, _ = next(iter(images.loader(encoder, device, rows)))
    num_keep = num_kept(model.num_patches, settings.mask_ratio)
    out = model(batch.to(device), scorer=masks(0), num_keep=num_keep)
    return mask_picture(model, batch.to(device), out, encoder.mean, encoder.std)


def _evaluate(
    evaluation: cli.Evaluation,
    images: ImageSet,
    network: nn.Module | None,
    settings: ReconstructionSettings,
) -> dict[str, Any]:
    model = evaluation.encoder.model.to(evaluation.device).eval()
    result: dict[str, Any] = {
        "num_test_images": len(images),
        "norm_pix_loss": model.norm_pix_loss,
        "num_hidden_patches": model.num_patches - num_kept(model.num_patches, settings.mask_ratio),
    }
    kinds = {"random": random_masks(settings.seed)}
    if network is not None:
        learned = network.to(evaluation.device, model.cls_token.dtype)
        kinds["learned"] = lambda number: learned
    for kind, masks in kinds.items():
        errors = reconstruction_error(
            evaluation.encoder, images, masks, settings.mask_ratio, evaluation.device
        )
        result |= {f"{name}_{kind}": value for name, value in errors.items()}
        if settings.num_pictures and rank() == 0:
            picture = draw(evaluation.encoder, images, masks, settings, evaluation.device)
            save_picture(picture, str(evaluation.output_dir / f"{kind}.png"))
    return {**result, "settings": asdict(settings)}


def _run(args: argparse.Namespace) -> None:
    images = ImageSet(args.test)
    if args.checkpoint and args.norm_pix_loss is not None:
        raise UserError("--norm_pix_loss is for --init_from, and a run has its recipe: remove it")

    def measure(evaluation: cli.Evaluation) -> dict[str, Any]:
        model = evaluation.encoder.model
        if args.norm_pix_loss is not None:
            model.norm_pix_loss = args.norm_pix_loss
        network, last_ratio = _masking_of(evaluation.encoder)
        ratio = args.mask_ratio or last_ratio or model.mask_ratio
        _check_ratio(model, ratio)
        settings = ReconstructionSettings(ratio, args.seed, args.num_pictures)
        return _evaluate(evaluation, images, network, settings)

    cli.evaluate_encoder(args, "reconstruct", measure, _PROTOCOL, with_decoder=True)


def _masking_of(encoder: Encoder) -> tuple[nn.Module | None, float | None]:
    """The masking network of a pretraining run that learned one, and the run's last mask ratio."""
    source = encoder.source
    if "checkpoint" not in source or source["untrained"] or encoder.name not in PRETRAINING:
        return None, None
    checkpoint = Path(source["checkpoint"])
    ratio = MaskSchedule.of(load_recipe(checkpoint / RECIPE_FILE, PretrainingRecipe), 1).mask_ratio[
        1
    ]
    has_network = (checkpoint / MASKING_FILE).is_file()
    return load_masking_network(checkpoint) if has_network else None, ratio


def _check_ratio(model: MaskedAutoencoder, ratio: float) -> None:
    if num_kept(model.num_patches, ratio) == 0:
        raise UserError(
            f"--mask_ratio {ratio:g} leaves none of the {model.num_patches} patches visible: "
            "lower it"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = flags.build_parser("eval/reconstruct.py", __doc__)
    parser.add_argument(
        "--mask_ratio",
        type=flags.fraction,
        metavar="SHARE",
        help="share of hidden patches (default: the run's last one, 0.75 for other weights)",
    )
    parser.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="with --init_from: whether they were trained on normalised patches (default: yes)",
    )
    default = ReconstructionSettings(0.75)
    parser.add_argument("--seed", type=flags.non_negative_int, default=default.seed)
    parser.add_argument("--num_pictures", type=flags.non_negative_int, default=default.num_pictures)
    return cli.run(parser, argv, _run)


if __name__ == "__main__":
    sys.exit(main())

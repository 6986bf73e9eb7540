"""UperNet on a plain ViT: semantic segmentation with a head that is published in two versions.

| part | standard (mmseg, BEiT's neck) | tutorial (PyTorch-Adventures) |
|---|---|---|
| patch / 4 | transposed conv, BN, GELU, transposed conv | the same |
| patch / 2 | transposed conv | transposed conv, BN, GELU |
| patch | as it is | conv 3x3, BN, GELU |
| 2 patch | max pool | conv 3x3 of stride 2, BN, GELU |
| pyramid pooling | 1, 2, 3, 6 cells, each to C channels | 1, 2, 4, 6 cells, each to C / 4 |
| laterals | conv 1x1, BN, ReLU; the finest too | conv 1x1; the finest is taken as it is |
| top-down | each adds the running sum | each adds its neighbour alone |
| smoothing | conv 3x3, BN, ReLU | conv 3x3 |
| classifier | dropout, conv 1x1 | conv 3x3 |

The shallowest feature becomes the finest map: 4, 2, 1, 1/2. Two faults of the tutorial are not
repeated: it gives the scales as 4, 1, 2, 1/2, and it reshapes tokens [B, N, D] straight to
[B, D, h, w], which scrambles every feature.

Relative position bias, which BEiT and MAE's published ADE20K runs add to attention, is left out: it
would be trained from zero, and no fused attention kernel takes it.
"""

from functools import partial
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.models.batch_norm import BatchNorm
from mlomae.models.precision import at_least_float32

AUXILIARY_CHANNELS = 256
_FEATURE_BLOCKS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}


class Segmentation(TypedDict):
    """What one forward pass yields (a plain dict, so DeepSpeed's hooks can walk it)."""

    logits: Tensor  # [B, num_classes, height, width] of the image, float32 or wider
    auxiliary: Tensor | None  # the same of the auxiliary head; None without one, and in eval mode


class UperNet(nn.Module):
    """A ViT whose four features go through a neck to four scales, and through UperNet's head.

    Args:
        backbone: its final norm and its head are taken off, since no feature passes them. With
            `dynamic_img_size` it takes images of any size that the patch divides.
        preset: which of the two published versions, see above.
        channels: width C of the head; None for 512, or for the backbone's width with `tutorial`,
            which has no other.
        auxiliary: train a second, small head on the feature of the patch's own scale.
        dropout: of whole channels before the classifiers of `standard`.

    Source: Xiao et al., arXiv 1807.10221; the neck: Bao et al., arXiv 2106.08254.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        num_classes: int,
        *,
        preset: Literal["standard", "tutorial"] = "standard",
        channels: int | None = None,
        auxiliary: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width = backbone.embed_dim
        backbone.norm, backbone.head = nn.Identity(), nn.Identity()
        # Hooks that gather ZeRO-3's parameters run before `forward` alone.
        features = partial(
            backbone.forward_intermediates,
            indices=list(feature_blocks(len(backbone.blocks))),
            intermediates_only=True,
        )
        setattr(backbone, "forward", features)  # noqa: B010
        self.backbone = backbone
        if preset == "standard":
            self.neck = _standard_neck(width)
            self.head: nn.Module = StandardHead(width, channels or 512, num_classes, dropout)
        elif channels in (None, width):
            self.neck = _tutorial_neck(width)
            self.head = TutorialHead(width, num_classes)
        else:
            raise ValueError(f"the tutorial's head is {width} wide, as its backbone")
        self.auxiliary_head = _auxiliary_head(width, num_classes, dropout) if auxiliary else None

    def forward(self, images: Tensor) -> Segmentation:
        """[B, 3, height, width], normalised. While training all ranks must call (batch norm)."""
        size = images.shape[-2:]
        features = self.backbone(images.to(self.backbone.patch_embed.proj.weight.dtype))
        pyramid = [scale(feature) for scale, feature in zip(self.neck, features, strict=True)]
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = resize(at_least_float32(self.auxiliary_head(pyramid[2])), size)
        return {
            "logits": resize(at_least_float32(self.head(pyramid)), size),
            "auxiliary": auxiliary,
        }


def feature_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks whose outputs are used, counted from 0.

    Those of the community's configurations for depth 12 and 24, else the quarters.
    """
    if depth < 4:
        raise ValueError(f"UperNet takes features of four blocks, there are {depth}")
    return _FEATURE_BLOCKS.get(depth, tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)))


def resize(x: Tensor, size: Any, align_corners: bool = False) -> Tensor:
    """Bilinear interpolation of [B, C, h, w] to a size (height, width)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


# --- necks -------------------------------------------------------------------------------------


def _double(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _quadruple(width: int) -> nn.Module:
    return nn.Sequential(_double(width), BatchNorm(width), nn.GELU(), _double(width))


def _standard_neck(width: int) -> nn.ModuleList:
    return nn.ModuleList([_quadruple(width), _double(width), nn.Identity(), nn.MaxPool2d(2)])


def _tutorial_neck(width: int) -> nn.ModuleList:
    same = nn.Conv2d(width, width, 3, padding=1)
    half = nn.Conv2d(width, width, 3, padding=1, stride=2)
    rest = [
        nn.Sequential(conv, BatchNorm(width), nn.GELU()) for conv in (_double(width), same, half)
    ]
    return nn.ModuleList([_quadruple(width), *rest])


# --- heads -------------------------------------------------------------------------------------


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A bias before a batch norm would cancel, so there is none."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, BatchNorm(out_channels), nn.ReLU())


def _auxiliary_head(width: int, num_classes: int, dropout: float) -> nn.Sequential:
    """The fully convolutional head of mmseg, with one convolution."""
    return nn.Sequential(
        _conv_norm_relu(width, AUXILIARY_CHANNELS, 3),
        nn.Dropout2d(dropout),
        nn.Conv2d(AUXILIARY_CHANNELS, num_classes, 1),
    )


class PyramidPooling(nn.Module):
    """Means over a few cells, resized back and merged with the map itself (arXiv 1612.01105)."""

    def __init__(
        self,
        in_channels: int,
        cell_channels: int,
        out_channels: int,
        num_cells: tuple[int, ...],
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.cells = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), _conv_norm_relu(in_channels, cell_channels, 1))
            for n in num_cells
        )
        merged = in_channels + len(num_cells) * cell_channels
        self.merge = _conv_norm_relu(merged, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> [B, out_channels, h, w]."""
        cells = [resize(cell(x), x.shape[-2:], self.align_corners) for cell in self.cells]
        merged: Tensor = self.merge(torch.cat([x, *cells], dim=1))
        return merged


class StandardHead(nn.Module):
    """UperNet's head as mmseg has it."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pooling = PyramidPooling(in_channels, channels, channels, (1, 2, 3, 6))
        self.laterals = nn.ModuleList(_conv_norm_relu(in_channels, channels, 1) for _ in range(3))
        self.smoothing = nn.ModuleList(_conv_norm_relu(channels, channels, 3) for _ in range(3))
        self.fusion = _conv_norm_relu(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Four maps [B, in_channels, h, w], finest first -> logits of the finest's size."""
        *finer, deepest = pyramid
        maps = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        above = deepest = self.pooling(deepest)
        for level in (2, 1, 0):
            above = maps[level] = maps[level] + resize(above, maps[level].shape[-2:])
        maps = [smooth(x) for smooth, x in zip(self.smoothing, maps, strict=True)]
        size = maps[0].shape[-2:]
        fused = self.fusion(torch.cat([resize(x, size) for x in (*maps, deepest)], dim=1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits


class TutorialHead(nn.Module):
    """UperNet's head as the tutorial has it; as wide as its input."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.pooling = PyramidPooling(width, width // 4, width, (1, 2, 4, 6), align_corners=True)
        self.laterals = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.smoothing = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.fusion = _conv_norm_relu(4 * width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Four maps [B, width, h, w], finest first -> logits of the finest's size."""
        finest, *coarser = [*pyramid[:-1], self.pooling(pyramid[-1])]
        maps = [finest, *(lateral(x) for lateral, x in zip(self.laterals, coarser, strict=True))]
        sums = [maps[i] + resize(maps[i + 1], maps[i].shape[-2:], True) for i in range(3)]
        smoothed = [smooth(x) for smooth, x in zip(self.smoothing, sums, strict=True)]
        size = finest.shape[-2:]
        fused = self.fusion(torch.cat([resize(x, size, True) for x in (*smoothed, maps[3])], dim=1))
        logits: Tensor = self.classifier(fused)
        return logits

"""The masked autoencoders by name: their sizes, and their entries in timm's registry.

Importing this module makes `timm.create_model("mae_vit_base_patch16", image_size=448, ...)` work;
any argument of `MaskedAutoencoder` may follow the name.
"""

from functools import partial
from typing import Any

from timm.models import register_model

from mlomae.models.mae import MaskedAutoencoder

PRESETS = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}
"""embed_dim, depth and num_heads of an encoder; ViT-B, L and H as He et al., arXiv 2111.06377."""


def _register(preset: str, patch_size: int, image_size: int = 224) -> None:
    """Add `mae_<preset>_patch<patch_size>` to timm's registry."""
    embed_dim, depth, num_heads = PRESETS[preset]
    defaults = {
        "image_size": image_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    build = partial(_build, defaults)
    build.__name__ = f"mae_{preset}_patch{patch_size}"  # type: ignore[attr-defined]
    build.__module__ = __name__
    register_model(build)


def _build(defaults: dict[str, Any], pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """What timm calls; it also hands on its settings of pretrained weights, as None."""
    if pretrained:
        raise ValueError(
            "no weights are published under this name: load a file with "
            "mlomae.foreign.load_weights(model, [file])"
        )
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    return MaskedAutoencoder(**{**defaults, **kwargs})


for _preset in ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"):
    _register(_preset, patch_size=16)
_register("vit_huge", patch_size=14)
_register("vit_base", patch_size=2, image_size=32)

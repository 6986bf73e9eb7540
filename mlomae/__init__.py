"""Masked autoencoders whose masks are learned from a downstream task, on DeepSpeed engines."""

from data_ffcv.sources.torchvision_import import fix_torchvision_import

__version__ = "0.1.0"

fix_torchvision_import()  # timm imports torchvision, so this runs before any other module does

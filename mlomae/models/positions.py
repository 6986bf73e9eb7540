"""Two-dimensional sine-cosine position embeddings of MAE."""

import torch
from torch import Tensor


def sincos_positions(embed_dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Position table of a patch grid, with a zero row for the class token.

    The first half of the channels encodes the column, the second half the row; inside each half
    the sines come first, then the cosines, at frequencies 10000^(-i / (embed_dim / 4)).

    Args:
        embed_dim: channels per token, divisible by 4.
        grid_size: (rows, columns) of patches.

    Returns:
        float32 table of shape [1, 1 + rows * columns, embed_dim], patches in row-major order.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be divisible by 4 for 2-D positions, got {embed_dim}")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    axes = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, embed_dim), table.float()])[None]

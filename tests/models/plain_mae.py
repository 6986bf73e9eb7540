"""Plain MAE in numpy, one image and one patch at a time: what the fast model is held against."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])


class PlainMae:
    """The forward pass of MAE, written from the paper's description.

    Args:
        weights: float64 arrays under the published names.
    """

    def __init__(
        self, weights: Weights, patch_size: int, num_heads: int, decoder_num_heads: int
    ) -> None:
        self.weights = weights
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.decoder_num_heads = decoder_num_heads

    def embed(self, image: Array) -> Array:
        """[C, S, S] -> patches with positions, row by row, [N, D]."""
        kernel, size = self.weights["patch_embed.proj.weight"], self.patch_size
        projected = []
        for top in range(0, image.shape[1], size):
            for left in range(0, image.shape[2], size):
                window = image[:, top : top + size, left : left + size]
                projected.append([(kernel[d] * window).sum() for d in range(len(kernel))])
        bias = self.weights["patch_embed.proj.bias"]
        return np.array(projected) + bias + self.weights["pos_embed"][0, 1:]

    def tokens(self, image: Array) -> Array:
        """Class token and patches of the whole image after the final norm, [1 + N, D]."""
        return self._encode(self.embed(image))

    def predict(self, image: Array, visible: list[int]) -> Array:
        """Predicted patch vectors [N, P] from the visible patches, in any order."""
        embedded = self.embed(image)
        latent = self._linear("decoder_embed", self._encode(embedded[visible]))
        tokens = np.repeat(self.weights["mask_token"][0], 1 + len(embedded), axis=0)
        tokens[0] = latent[0]
        for place, patch in enumerate(visible):
            tokens[1 + patch] = latent[1 + place]
        tokens = tokens + self.weights["decoder_pos_embed"][0]
        decoded = self._blocks("decoder_blocks", tokens, self.decoder_num_heads)
        return self._linear("decoder_pred", self._norm("decoder_norm", decoded))[1:]

    def targets(self, image: Array, normalise: bool) -> Array:
        """Patch vectors [N, P], the channel running fastest, then the column, then the row."""
        size, targets = self.patch_size, []
        for top in range(0, image.shape[1], size):
            for left in range(0, image.shape[2], size):
                vector = np.array(
                    [
                        image[channel, top + row, left + column]
                        for row in range(size)
                        for column in range(size)
                        for channel in range(len(image))
                    ]
                )
                if normalise:
                    centred = vector - vector.mean()
                    vector = centred / np.sqrt((centred**2).sum() / (len(vector) - 1) + 1e-6)
                targets.append(vector)
        return np.array(targets)

    def loss(self, images: Array, noise: Array, mask_ratio: float, normalise: bool) -> float:
        """Mean over all hidden patches of the batch of the mean squared error of a patch.

        Args:
            noise: [B, N]; the patches with the smallest noise stay visible.
        """
        errors = []
        for image, draw in zip(images, noise, strict=True):
            order = sorted(range(len(draw)), key=lambda j: draw[j])
            num_visible = int(len(draw) * (1 - mask_ratio))
            error = self.predict(image, order[:num_visible]) - self.targets(image, normalise)
            errors += [(error[j] ** 2).mean() for j in order[num_visible:]]
        return sum(errors) / len(errors)

    def _encode(self, embedded: Array) -> Array:
        first = self.weights["cls_token"][0] + self.weights["pos_embed"][0, :1]
        tokens = self._blocks("blocks", np.concatenate([first, embedded]), self.num_heads)
        return self._norm("norm", tokens)

    def _blocks(self, name: str, tokens: Array, num_heads: int) -> Array:
        depth = sum(key.startswith(f"{name}.") and key.endswith("qkv.bias") for key in self.weights)
        for i in range(depth):
            block = f"{name}.{i}"
            tokens = tokens + self._attend(block, self._norm(f"{block}.norm1", tokens), num_heads)
            hidden = self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", tokens))
            hidden = hidden * 0.5 * (1 + _erf(hidden / math.sqrt(2)))
            tokens = tokens + self._linear(f"{block}.mlp.fc2", hidden)
        return tokens

    def _attend(self, block: str, tokens: Array, num_heads: int) -> Array:
        queries, keys, values = np.split(self._linear(f"{block}.attn.qkv", tokens), 3, axis=1)
        width = tokens.shape[1] // num_heads
        heads = []
        for h in range(num_heads):
            part = slice(h * width, (h + 1) * width)
            weight = np.exp(queries[:, part] @ keys[:, part].T / math.sqrt(width))
            heads.append(weight / weight.sum(axis=1, keepdims=True) @ values[:, part])
        return self._linear(f"{block}.attn.proj", np.concatenate(heads, axis=1))

    def _norm(self, name: str, tokens: Array) -> Array:
        centred = tokens - tokens.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _linear(self, name: str, tokens: Array) -> Array:
        return tokens @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

"""Evaluation of a trained encoder: each a command and functions.

On frozen features, which are encoded once and kept on disk: `knn`, `low_shot`, `clustering`,
`cached_probe`. `reconstruct` looks at the decoder, `compare` puts several encoders into one table.
`linear_probe`, `finetune` and `segment` train: they are runs with recipes.
"""

import mlomae  # noqa: F401  (first: it fixes torchvision beside a CPU build of torch)

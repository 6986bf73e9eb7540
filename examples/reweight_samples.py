"""Learning to reweight training samples when 40 % of their labels are wrong.

A classifier w trains on many noisy and a few clean samples, their losses l_i weighted. Above it, a
network theta that turns a sample's loss into its weight (Meta-Weight-Net, Shu et al., arXiv
1902.07379) learns which weights make the classifier's step help on the clean samples:

    w' = SGD step on sum_i weight(l_i; theta) l_i(w),    theta minimises clean_loss(w'(theta)).

The baselines are the same classifier, with as many steps, on the same samples unweighted, and on
the clean ones alone. Each method picks its learning rate and decay from one grid by accuracy on
samples set aside for that; the test samples serve for nothing but the final number.

    python examples/reweight_samples.py                   # scikit-learn's digits
    python examples/reweight_samples.py --data DIR        # Fashion-MNIST's *-ubyte.gz
"""

import argparse
import gzip
from collections.abc import Iterator
from functools import partial
from itertools import islice, product, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mlomae.hypergrad import Identity, Level, Multilevel, Sama, Unrolled, WeightedLoss

Samples = tuple[Tensor, Tensor]  # images [n, pixels] and labels [n]
GRID = list(product([0.02, 0.1], [1e-3, 1e-2]))  # learning rates and weight decays
ESTIMATORS = {"unrolled": Unrolled(steps=1), "sama": Sama(), "identity": Identity()}


def mean_loss(models, batch: Samples) -> Tensor:
    return F.cross_entropy(models["classifier"](batch[0]), batch[1])


# A `WeightedLoss` keeps losses and weights apart, which makes the hypergradient cheaper. The
# weights depend on the losses as numbers, so those are frozen.
def sample_losses(models, batch: Samples, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(models["classifier"](batch[0]), batch[1], reduction="none")
    return losses, losses.detach() if frozen is None else frozen


def sample_weights(models, losses: Tensor) -> Tensor:
    weights = models["weighter"](losses.unsqueeze(1)).squeeze(1)
    return weights / weights.sum()


def two_levels(network: nn.Module, weighter: nn.Module, lr: float, decay: float, estimator):
    below = Level(
        "classifier",
        network,
        sgd(network, lr, decay),
        loss=WeightedLoss(sample_losses, sample_weights),
        upper=["weighter"],
    )
    adam = torch.optim.Adam(weighter.parameters(), lr=1e-3)
    above = Level("weighter", weighter, adam, loss=mean_loss, lower=["classifier"])
    return Multilevel([below, above], estimator=estimator)


def train_reweighted(
    samples: Samples, clean: Samples, num_steps: int, estimator, lr: float, decay: float
) -> nn.Module:
    network = new_network(samples)
    weighter = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1), nn.Sigmoid())
    problem = two_levels(network, weighter, lr, decay, estimator)
    batches = {"classifier": batches_of(samples), "weighter": repeat(clean)}
    for _ in range(num_steps):
        problem.cycle(batches)  # a step of the classifier, then one of the weighter
    return network


def train_unweighted(samples: Samples, num_steps: int, lr: float, decay: float) -> nn.Module:
    network = new_network(samples)
    level = Level("classifier", network, sgd(network, lr, decay), loss=mean_loss)
    for batch in islice(batches_of(samples), num_steps):
        level.step(batch)
    return network


def new_network(samples: Samples) -> nn.Module:
    return nn.Sequential(nn.Linear(samples[0].shape[1], 100), nn.ReLU(), nn.Linear(100, 10))


def sgd(network: nn.Module, lr: float, decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=decay)


def batches_of(samples: Samples, size: int = 100) -> Iterator[Samples]:
    while True:
        chosen = torch.randint(len(samples[1]), (size,))
        yield samples[0][chosen], samples[1][chosen]


def load(folder: Path | None) -> Samples:
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    labels = read_idx(folder / "train-labels-idx1-ubyte.gz", header=8).long()
    images = read_idx(folder / "train-images-idx3-ubyte.gz", header=16).view(len(labels), -1)
    return images / 255, labels


def read_idx(path: Path, header: int) -> Tensor:
    return torch.tensor(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))


def split(images: Tensor, labels: Tensor) -> tuple[Samples, ...]:
    """1000 noisy samples, 100 clean ones, 200 for choosing, and the rest for the test."""
    parts = torch.randperm(len(labels)).tensor_split([1000, 1100, 1300])
    (inputs, truth), *others = [(images[part], labels[part]) for part in parts]
    is_wrong, other = torch.rand(truth.shape) < 0.4, torch.randint(1, 10, truth.shape)
    return (inputs, torch.where(is_wrong, (truth + other) % 10, truth)), *others


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples) -> float:
    return (network(samples[0]).argmax(1) == samples[1]).double().mean().item()


def compare(data: Samples, seed: int, num_steps: int, estimator) -> dict[str, float]:
    torch.manual_seed(seed)
    noisy, clean, choosing, test = split(*data)
    both = torch.cat([noisy[0], clean[0]]), torch.cat([noisy[1], clean[1]])
    methods = {
        "unweighted": partial(train_unweighted, both, num_steps),
        "clean only": partial(train_unweighted, clean, num_steps),
        "reweighted": partial(train_reweighted, both, clean, num_steps, estimator),
    }
    found = {}
    for name, train in methods.items():
        networks = [train(lr, decay) for lr, decay in GRID]
        found[name] = accuracy(max(networks, key=lambda n: accuracy(n, choosing)), test)
    return found


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Print test accuracies, a row for each method and a column for each seed, and return them."""
    parser = argparse.ArgumentParser(description="Reweighting samples with wrong labels.")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST; without it, digits")
    parser.add_argument("--num_steps", type=int, default=500, help="of each classifier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--estimator", choices=ESTIMATORS, default="unrolled")
    args = parser.parse_args(arguments)
    data, estimator = load(args.data), ESTIMATORS[args.estimator]
    runs = [compare(data, seed, args.num_steps, estimator) for seed in args.seeds]
    print("accuracy   ", *(f"{f'seed {seed}':>7}" for seed in args.seeds), "   mean  std")
    for name in runs[0]:
        values = np.array([100 * run[name] for run in runs])
        cells = "".join(f"{v:8.1f}" for v in values)
        print(f"{name:11}{cells}{values.mean():8.1f}{values.std(ddof=int(len(runs) > 1)):5.1f}")
    return {name: [run[name] for run in runs] for name in runs[0]}


if __name__ == "__main__":
    main()

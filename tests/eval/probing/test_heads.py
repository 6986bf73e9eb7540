"""The parts of a linear probe against their formulas and PyTorch's own modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.probing.heads import LinearHeads, feature_norm, head_accuracies, head_groups, probe_loss
from eval.probing.recipe import ProbeLevelRecipe
from mlomae.training.engines import build_optimizer
from tests.eval.probing.runs import features_of


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_norm_is_pytorchs_without_affine(eps):
    ours = feature_norm(6, eps).double()
    theirs = nn.BatchNorm1d(6, eps=eps, affine=False).double()
    for batch in range(3):
        features = features_of(batch, 16)
        torch.testing.assert_close(ours(features), theirs(features), rtol=1e-12, atol=1e-12)
    assert not list(ours.parameters())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    features = features_of(9, 5)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))


def test_norm_forgets_a_batch_that_is_not_finite():
    norm = feature_norm(6, 1e-6)
    norm(features_of(0, 8).float())
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    bad = features_of(1, 8).float()
    bad[3, 2] = float("nan")
    assert not norm(bad).isfinite().all()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


def test_heads_are_drawn_as_published():
    torch.manual_seed(0)
    heads = LinearHeads(300, 200, 2).heads
    for head in heads:
        assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
        assert abs(float(head.weight.detach().mean())) < 2e-4
        assert not head.bias.any()
    assert not torch.equal(heads[0].weight, heads[1].weight)


def test_each_head_gets_the_gradient_of_its_own_loss():
    torch.manual_seed(0)
    heads, labels = LinearHeads(6, 3, 2).double(), torch.arange(8) % 3
    features = features_of(0, 8)
    probe_loss({"probe": heads}, (features, labels)).backward()
    for head in heads.heads:
        weight, bias = (p.detach().clone().requires_grad_() for p in head.parameters())
        F.cross_entropy(F.linear(features, weight, bias), labels).backward()
        torch.testing.assert_close(head.weight.grad, weight.grad)
        torch.testing.assert_close(head.bias.grad, bias.grad)


def test_accuracy_counts_every_image_for_each_head():
    """Heads that are right for 3, 0 and 2 of five images in two uneven batches."""
    labels = [torch.tensor([0, 1, 2]), torch.tensor([1, 0])]
    guesses = [
        torch.tensor([[0, 1, 0], [1, 2, 0], [0, 0, 0]]),
        torch.tensor([[0, 0, 1], [0, 1, 2]]),
    ]
    batches = [(i, label) for i, label in enumerate(labels)]
    accuracies = head_accuracies(
        lambda i: F.one_hot(guesses[i], 3).transpose(1, 2).float(), batches, 3, torch.device("cpu")
    )
    assert accuracies.tolist() == [3 / 5, 0, 2 / 5]


# --- LARS --------------------------------------------------------------------------------------


def lars_step(weight, bias, momenta, gradients, lr):
    """One step of LARS (You et al., arXiv 1708.03888, as MAE uses it) in plain NumPy, float64.

    Trust 0.001 times the norm of the weights over that of the gradient, for weights alone; momentum
    0.9; the rate stands outside of the momentum.
    """
    trust = 0.001 * np.sqrt((weight**2).sum()) / np.sqrt((gradients[0] ** 2).sum())
    directions = (trust * gradients[0], gradients[1])
    momenta = [0.9 * m + d for m, d in zip(momenta, directions, strict=True)]
    return weight - lr * momenta[0], bias - lr * momenta[1], momenta


def test_lars_takes_the_steps_of_its_formula():
    torch.manual_seed(0)
    heads = LinearHeads(6, 3, 1).double()
    recipe = ProbeLevelRecipe(batch_size=16384, optimizer="lars", base_lrs=(0.1,))
    optimizer = build_optimizer(heads, recipe, head_groups(heads, recipe))
    weight, bias = (p.detach().numpy().copy() for p in heads.heads[0].parameters())
    momenta, labels = [0 * weight, 0 * bias], torch.arange(12) % 3

    for batch in range(5):
        optimizer.zero_grad()
        probe_loss({"probe": heads}, (features_of(batch, 12), labels)).backward()
        gradients = [p.grad.numpy().copy() for p in heads.heads[0].parameters()]
        optimizer.step()
        weight, bias, momenta = lars_step(weight, bias, momenta, gradients, lr=6.4)
        np.testing.assert_allclose(heads.heads[0].weight.detach(), weight, rtol=1e-6)
        np.testing.assert_allclose(heads.heads[0].bias.detach(), bias, rtol=1e-6)

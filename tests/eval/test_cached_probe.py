import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eval.cached_probe import (
    NormedHeads,
    ProbeSettings,
    _check,
    _decay,
    _train,
    evaluate,
    fit_cached_probe,
)
from eval.frozen.features import EncodedSets, LabelledFeatures
from eval.frozen.store import Features
from mlomae.errors import UserError

QUICK = ProbeSettings(epochs=10, batch_size=128)


def clusters(num_images, num_classes=4, num_features=16, spread=0.2, seed=0):
    """Gaussian clusters; small spreads are linearly separable."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    centres = torch.eye(num_classes, num_features)
    noise = torch.randn(num_images, num_features, generator=generator)
    return labelled(5 + 3 * (centres[labels] + spread * noise), labels)


def labelled(features, labels):
    return LabelledFeatures(Features([features]), labels)


def tensors(part):
    return part.features.load("cpu"), part.labels


def test_separates_what_is_separable():
    data = EncodedSets(clusters(1000), clusters(400, seed=1), num_classes=4)
    assert evaluate(data, QUICK)["accuracy"] > 0.99


def test_random_labels_stay_at_chance():
    generator = torch.Generator().manual_seed(3)
    train, test = (
        LabelledFeatures(part.features, torch.randint(4, (len(part.labels),), generator=generator))
        for part in (clusters(1000), clusters(2000, seed=1))
    )
    accuracy = evaluate(EncodedSets(train, test, num_classes=4), QUICK)["accuracy"]
    assert abs(accuracy - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_test_labels_play_no_part_in_the_choice():
    train, test = clusters(600, spread=1.0), clusters(300, spread=1.0, seed=1)
    wrong = LabelledFeatures(test.features, test.labels.roll(1))
    true, swapped = (evaluate(EncodedSets(train, t, 4), QUICK) for t in (test, wrong))
    assert true["accuracy"] != swapped["accuracy"]
    for key in ("base_lr", "held_out_accuracy"):
        assert true[key] == swapped[key]


def test_the_best_held_out_rate_is_used():
    train = clusters(600, spread=1.0)
    settings = ProbeSettings(base_lrs=(1e-6, 0.1), epochs=10, batch_size=128)
    probe = fit_cached_probe(*tensors(train), num_classes=4, settings=settings)
    assert probe.base_lr == 0.1
    assert probe.held_out_accuracy[0.1] > probe.held_out_accuracy[1e-6]
    alone = _train(*tensors(train), 4, (0.1,), settings)
    assert torch.equal(probe.heads.linear.weight, alone.linear.weight)


def test_heads_trained_together_equal_heads_trained_alone():
    """Each head of the grid is what torch's SGD gives with this rate and a copy of its start."""
    train = clusters(256, spread=1.0)
    settings = ProbeSettings(epochs=3, batch_size=64)
    together = _train(*tensors(train), 4, (0.03, 0.3), settings)

    generator = torch.Generator().manual_seed(settings.seed)
    start = NormedHeads(16, 4, 2, generator)  # consumes the generator as the grid does
    heads = [torch.nn.Linear(16, 4) for _ in range(2)]
    optimizers = []
    for i, head in enumerate(heads):
        head.load_state_dict({k: v[i::2] for k, v in start.linear.state_dict().items()})
        optimizers.append(torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9))
    step = 0
    for _ in range(3):
        for batch in torch.randperm(256, generator=generator).split(64):
            images = train.features.load("cpu")[batch]
            variance = images.var(dim=0, unbiased=False)
            images = (images - images.mean(dim=0)) / (variance + 1e-6).sqrt()
            for head, optimizer, base_lr in zip(heads, optimizers, (0.03, 0.3), strict=True):
                optimizer.param_groups[0]["lr"] = base_lr * 64 / 256 * _decay(step, 12)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(head(images), train.labels[batch]).backward()
                optimizer.step()
            step += 1
    for i, head in enumerate(heads):
        torch.testing.assert_close(together.linear.weight[i::2], head.weight, rtol=1e-4, atol=1e-5)


def test_schedule_warms_up_over_a_tenth_and_ends_at_zero():
    factors = [_decay(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0, abs=1e-12)


def test_agrees_with_logistic_regression_on_digits():
    images, labels = load_digits(return_X_y=True)
    # Dense like an encoder's features: a rotation spreads the pixels at the rim, which are zero in
    # nearly every image and which no batch norm can standardise.
    images = images @ ortho_group.rvs(images.shape[1], random_state=0)
    parts = train_test_split(
        images.astype("float32"), labels, test_size=0.4, random_state=0, stratify=labels
    )
    train_images, test_images, train_labels, test_labels = parts
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    reference.fit(train_images, train_labels)
    data = EncodedSets(
        labelled(torch.from_numpy(train_images), torch.from_numpy(train_labels)),
        labelled(torch.from_numpy(test_images), torch.from_numpy(test_labels)),
        num_classes=10,
    )
    # the larger rates alone: a tenth of so few images is too noisy to choose among all
    settings = ProbeSettings(base_lrs=(0.1, 0.3, 1.0), batch_size=64)
    accuracy = evaluate(data, settings)["accuracy"]
    assert accuracy == pytest.approx(reference.score(test_images, test_labels), abs=0.02)


@pytest.mark.parametrize(
    ("labels", "batch_size", "sentence"),
    [
        ([0, 1, 2, 3], 1024, "4 training images are too few to hold some out"),
        ([], 1024, "0 training images are too few"),
        ([0, 0, 0], 1, "--batch_size is 1"),
    ],
)
def test_refuses_what_no_rate_can_be_chosen_on(labels, batch_size, sentence):
    with pytest.raises(UserError, match=sentence):
        _check(np.array(labels, np.int64), ProbeSettings(batch_size=batch_size))
    _check(np.array([0, 0, 1, 1]), ProbeSettings(batch_size=2))

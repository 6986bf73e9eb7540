import numpy as np
import pytest
import torch

from eval.features import EncodedSets, LabelledFeatures
from eval.knn import KnnSettings, evaluate, knn_predict
from mlomae.errors import UserError


def brute_force(train, labels, test, num_classes, k, temperature):
    """Votes of k neighbours in float64, one test image after the other: [m, num_classes]."""
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    votes = np.zeros((len(test), num_classes))
    for i, query in enumerate(test):
        similarity = train @ query
        for j in sorted(range(len(train)), key=lambda j: -similarity[j])[:k]:
            votes[i, labels[j]] += np.exp(similarity[j] / temperature)
    return votes


def problem(seed=0, num_train=300, num_test=120, num_features=6, num_classes=5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, num_features))
    labels = rng.integers(num_classes, size=num_train)
    train = centres[labels] + rng.normal(size=(num_train, num_features))
    test = rng.normal(size=(num_test, num_features)) * 2  # a scale that must not matter
    return train, labels, test


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (10, 0.5), (300, 0.07)])
def test_equals_brute_force(k, temperature):
    train, labels, test = problem()
    votes = brute_force(train, labels, test, 5, k, temperature)
    first, second = np.sort(votes, axis=1)[:, :-3:-1].T
    clear = first > second * (1 + 1e-4)  # not decided by float32's rounding
    assert clear.mean() > 0.9
    predictions = knn_predict(
        *map(torch.from_numpy, (train.astype("float32"), labels)),
        torch.from_numpy(test.astype("float32")),
        num_classes=5,
        k=k,
        temperature=temperature,
    )
    assert predictions.numpy()[clear].tolist() == votes.argmax(axis=1)[clear].tolist()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 299])
def test_chunks_do_not_change_the_result(chunk_size):
    train, labels, test = (torch.from_numpy(x) for x in problem())
    whole = knn_predict(train, labels, test, num_classes=5)
    assert len(whole.unique()) == 5
    chunked = knn_predict(train, labels, test, num_classes=5, chunk_size=chunk_size)
    assert torch.equal(whole, chunked)


def test_a_tiny_temperature_is_the_nearest_neighbour():
    train, labels, test = (torch.from_numpy(x).float() for x in problem())
    nearest = knn_predict(train, labels.long(), test, num_classes=5, k=1)
    sharp = knn_predict(train, labels.long(), test, num_classes=5, k=20, temperature=1e-3)
    assert (nearest == sharp).double().mean() > 0.95


@pytest.mark.parametrize("k", [0, 301])
def test_refuses_more_neighbours_than_images(k):
    train, labels, test = (torch.from_numpy(x) for x in problem())
    with pytest.raises(UserError, match=f"k is {k}, but must be from 1 to the 300 training"):
        knn_predict(train, labels, test, num_classes=5, k=k)


def test_accuracy_counts_the_test_images():
    train = LabelledFeatures(torch.eye(4), torch.arange(4))
    test = LabelledFeatures(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    result = evaluate(EncodedSets(train, test, num_classes=4), KnnSettings(k=1))
    assert result == {"accuracy": 0.75, "settings": {"k": 1, "temperature": 0.07}}

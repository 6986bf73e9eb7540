import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from eval.frozen.features import EncodedSets, LabelledFeatures
from eval.frozen.store import Features
from eval.knn import KnnSettings, evaluate, knn_predict
from mlomae.errors import UserError


def problem(seed=0, num_train=300, num_test=120, num_features=6, num_classes=5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, num_features))
    labels = rng.integers(num_classes, size=num_train)
    train = centres[labels] + rng.normal(size=(num_train, num_features))
    test = rng.normal(size=(num_test, num_features)) * 2  # a scale that must not matter
    return train, labels, test


def tensors(train, labels, test):
    """A bank in three parts, its labels, and the queries, all float32."""
    bank = torch.from_numpy(train.astype("float32")).split(len(train) // 2 - 1)
    return bank, torch.from_numpy(labels), torch.from_numpy(test.astype("float32"))


@pytest.mark.parametrize("weighting", ["exponential", "uniform"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (10, 0.5), (300, 0.07)])
def test_equals_scikit_learn(k, temperature, weighting):
    train, labels, test = problem()
    votes = {"exponential": lambda d: np.exp((1 - d) / temperature), "uniform": "uniform"}
    reference = KNeighborsClassifier(k, metric="cosine", weights=votes[weighting])
    shares = reference.fit(train, labels).predict_proba(test)
    first, second = np.sort(shares, axis=1)[:, :-3:-1].T
    clear = first > second * (1 + 1e-4)  # not decided by float32's rounding, and no tie
    assert clear.mean() > (0.9 if weighting == "exponential" else 0.5)
    predictions = knn_predict(
        *tensors(train, labels, test),
        num_classes=5, k=k, temperature=temperature, weighting=weighting, chunk_size=50,
    )  # fmt: skip
    assert predictions.numpy()[clear].tolist() == shares.argmax(axis=1)[clear].tolist()


def test_equal_votes_go_to_the_first_class():
    bank = [torch.eye(3)]
    labels = torch.tensor([2, 1, 0])
    query = torch.ones(1, 3)
    assert knn_predict(bank, labels, query, num_classes=3, k=3, weighting="uniform").tolist() == [0]


@pytest.mark.parametrize("chunk_size", [7, 64, 299])
def test_chunks_do_not_change_the_result(chunk_size):
    train, labels, test = (torch.from_numpy(x) for x in problem())
    whole = knn_predict([train], labels, test, num_classes=5)
    assert len(whole.unique()) == 5
    bank = train.split(chunk_size)
    chunked = knn_predict(bank, labels, test, num_classes=5, chunk_size=chunk_size)
    assert torch.equal(whole, chunked)


def test_a_tiny_temperature_is_the_nearest_neighbour():
    train, labels, test = tensors(*problem())
    nearest = knn_predict(train, labels, test, num_classes=5, k=1)
    sharp = knn_predict(train, labels, test, num_classes=5, k=20, temperature=1e-3)
    assert (nearest == sharp).double().mean() > 0.95


@pytest.mark.parametrize("k", [0, 301])
def test_refuses_more_neighbours_than_images(k):
    train, labels, test = tensors(*problem())
    with pytest.raises(UserError, match=f"k is {k}, but must be from 1 to the 300 training"):
        knn_predict(train, labels, test, num_classes=5, k=k)


def test_standardising_takes_mean_and_deviation_of_the_training_features():
    train, labels, test = problem()
    scale, shift = np.array([1, 100, 0.01, 5, 1, 30]), np.array([5, -300, 2, 0, 0, 9])
    train, test = train * scale + shift, test * scale + shift
    mean, std = train.mean(axis=0), train.std(axis=0, ddof=1) + 1e-5
    reference = KNeighborsClassifier(10, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = reference.fit((train - mean) / std, labels).predict((test - mean) / std)
    bank, labels, queries = tensors(train, labels, test)
    truth = torch.from_numpy(expected)
    data = EncodedSets(
        LabelledFeatures(Features(bank), labels),
        LabelledFeatures(Features([queries]), truth),
        num_classes=5,
    )
    assert evaluate(data, KnnSettings(standardize=True))["accuracy"] > 0.99
    assert evaluate(data, KnnSettings())["accuracy"] < 0.9


def test_accuracy_counts_the_test_images():
    train = LabelledFeatures(Features([torch.eye(4)]), torch.arange(4))
    test = LabelledFeatures(Features([torch.eye(4)]), torch.tensor([0, 1, 2, 0]))
    result = evaluate(EncodedSets(train, test, num_classes=4), KnnSettings(k=1))
    assert result["accuracy"] == 0.75 and result["settings"]["k"] == 1

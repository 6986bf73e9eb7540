import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from eval import clustering
from eval.clustering import ClusteringSettings, agreement, evaluate, read_classes
from eval.frozen.features import LabelledFeatures
from eval.frozen.kmeans import _start, kmeans
from eval.frozen.store import Features


def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits(return_X_y=True)[0][:600].astype("float32"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_from_the_same_start_is_scikit_learns(seed):
    x = digits().double()
    start = _start(x, 10, torch.Generator().manual_seed(seed))
    reference = KMeans(10, init=start.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    expected = reference.fit_predict(x.numpy())
    clustering = kmeans(x, 10, seed=seed)
    assert clustering.clusters.tolist() == expected.tolist()
    assert clustering.inertia == pytest.approx(reference.inertia_, rel=1e-5)


def test_starts_are_drawn_by_squared_distance():
    """Of 0, 1 and 3, the second centre after 0 is 3 in nine of ten draws: 9 / (1 + 9)."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    starts = [_start(x, 2, torch.Generator().manual_seed(s))[:, 0].tolist() for s in range(3000)]
    after_zero = [second for first, second in starts if first == 0]
    share = np.mean([second == 3 for second in after_zero])
    assert len(after_zero) == pytest.approx(1000, abs=120)
    assert share == pytest.approx(0.9, abs=4 * (0.9 * 0.1 / len(after_zero)) ** 0.5)
    assert all(first != second for first, second in starts)


def test_an_empty_cluster_takes_the_farthest_image(monkeypatch):
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [10.0]])
    start = torch.tensor([[0.0], [0.1], [500.0]])
    monkeypatch.setattr("eval.frozen.kmeans._start", lambda *_: start)
    clustering = kmeans(x, 3, seed=0)
    assert len(clustering.clusters.unique()) == 3


def test_chunks_and_constants_do_not_matter(monkeypatch):
    x = digits()
    whole = kmeans(x, 10, seed=0)
    monkeypatch.setattr("eval.frozen.kmeans._ROWS", 37)
    assert torch.equal(kmeans(x, 10, seed=0).clusters, whole.clusters)
    same = kmeans(torch.ones(20, 3), 2, seed=0)
    assert same.inertia == 0


def test_accuracy_is_that_of_the_best_matching():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    clusters = np.where(rng.random(60) < 0.6, (labels + 1) % 4, rng.integers(4, size=60))
    best = max(
        (np.array(order)[clusters] == labels).mean() for order in itertools.permutations(range(4))
    )
    assert agreement(clusters, labels)["accuracy"] == pytest.approx(best)
    more = np.array([0, 1, 2, 3, 4, 5])  # three of the clusters stay without a class
    assert agreement(more, np.array([0, 0, 1, 1, 2, 2]))["accuracy"] == pytest.approx(0.5)


def test_agreement_of_a_case_computed_by_hand():
    """Two classes of two; clusters {a, a, b}, {b}."""
    scores = agreement(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
    log = np.log
    mutual = 0.5 * log(0.5 / (0.5 * 0.75)) + 0.25 * log(0.25 / (0.5 * 0.75))
    mutual += 0.25 * log(0.25 / (0.5 * 0.25))
    entropies = (log(2) + (-0.75 * log(0.75) - 0.25 * log(0.25))) / 2
    assert scores["nmi"] == pytest.approx(mutual / entropies)
    # pairs: 6 in all, 2 within classes, 3 within clusters, 1 within both; 2 * 3 / 6 expected
    assert scores["ari"] == pytest.approx((1 - 1) / ((2 + 3) / 2 - 1))
    # for these sizes every permutation of the labels has the same mutual information
    assert scores["ami"] == pytest.approx(0, abs=1e-12)
    assert scores["accuracy"] == 0.75


def test_the_best_restart_is_chosen_without_labels():
    x = digits()
    labels = torch.from_numpy(load_digits(return_X_y=True)[1][:600])
    settings = ClusteringSettings(num_restarts=6, normalize=False)
    results = []
    for some in (labels, labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]):
        results.append(evaluate(LabelledFeatures(Features(x.split(100)), some), settings))
    true, shuffled = results
    inertia = [restart["inertia"] for restart in true["restarts"]]
    assert inertia == [restart["inertia"] for restart in shuffled["restarts"]]
    lowest = true["restarts"][int(np.argmin(inertia))]
    for name in ("accuracy", "nmi", "ami", "ari"):
        assert true[f"{name}_best"] == lowest[name]
        mean = np.mean([restart[name] for restart in true["restarts"]])
        assert true[f"{name}_mean"] == pytest.approx(mean)
    assert true["nmi_best"] > 0.5 > 0.1 > shuffled["nmi_best"]


# --- the command --------------------------------------------------------------------------------


def test_the_command_finds_the_colours(run, data, tmp_path):
    common = ["--checkpoint", str(run), "--test", data["train"], "--num_restarts", "3"]
    assert clustering.main(common) == 0
    result = json.loads((run / "eval" / "clustering" / "result.json").read_text())
    assert (result["num_clusters"], result["num_classes"], len(result["restarts"])) == (3, 3, 3)
    assert result["accuracy_best"] > 0.6
    (tmp_path / "classes.txt").write_text("red a note\n\nblue\n")
    assert clustering.main([*common, "--classes", str(tmp_path / "classes.txt")]) == 0
    result = json.loads((run / "eval" / "clustering" / "result.json").read_text())
    assert (result["num_clusters"], result["num_test_images"]) == (2, 40)


def test_the_published_list_has_fifteen_dogs():
    names = read_classes("dogs15")
    assert len(set(names)) == 15 and all(len(n) == 9 and n.startswith("n02") for n in names)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--classes", "dogs15"], "--classes dogs15 has n02085936, which is no class of"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt cannot be read"),
        (["--num_clusters", "61"], "too few for 61 clusters"),
        (["--num_clusters", "1"], "would become 1 clusters, and it takes 2"),
    ],
)
def test_bad_input_is_one_sentence(run, data, capsys, flags, sentence):
    assert clustering.main(["--checkpoint", str(run), "--test", data["train"], *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (run / "eval").exists()

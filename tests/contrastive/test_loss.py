"""Loss and queue on two real ranks, against one process that sees the whole batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.models.contrastive import NnclrHead
from tests.contrastive import dense
from tests.contrastive.rank_cases import SIZES
from tests.ranks import run_ranks

BATCH, QUEUE = 6, 24  # of both ranks
CASES = [
    {"top_k": top_k, "with_target": with_target, "sharded": sharded}
    for top_k, with_target in ((1, False), (4, True))
    for sharded in (False, True)
]
IDS = [f"top{c['top_k']}-{'sharded' if c['sharded'] else 'replicated'}" for c in CASES]


def make_case(top_k: int, with_target: bool, sharded: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(1)
    head = NnclrHead(**SIZES)
    other = NnclrHead(**SIZES)
    for parameter in (*head.parameters(), *other.parameters()):
        parameter.data += 0.3 * normal(*parameter.shape)
    ids = torch.arange(BATCH) * 5
    queue_id = torch.randperm(QUEUE, generator=generator)
    queue_id[: BATCH // 2] = ids[::2]  # so that the nearest is often excluded
    return {
        "head": head.state_dict(),
        "target": other.projector.state_dict() if with_target else None,
        "features": normal(2, BATCH, SIZES["embed_dim"]) * torch.tensor([1.0, 2.0])[:, None, None],
        "labels": torch.arange(BATCH) % 3,
        "ids": ids,
        "queue": {
            "queue": torch.nn.functional.normalize(normal(QUEUE, SIZES["projection_dim"]), dim=1),
            "queue_y": torch.randint(3, (QUEUE,), generator=generator),
            "queue_id": queue_id,
            "queue_ptr": torch.tensor([QUEUE - BATCH]),
        },
        "step": 3,
        "temperature": 0.2,
        "top_k": top_k,
        "sharded": sharded,
    }


def make_queue_case() -> dict[str, Any]:
    """Five batches through a queue of three."""
    torch.manual_seed(5)
    unit = torch.nn.functional.normalize
    pushes = [
        {
            "vectors": unit(torch.randn(BATCH, 3), dim=1),
            "labels": torch.randint(9, (BATCH,)),
            "ids": torch.randint(1000, (BATCH,)),
        }
        for _ in range(5)
    ]
    probes = unit(torch.randn(BATCH, 3), dim=1)
    probes[0] = pushes[-1]["vectors"][0]  # its own entry must not be found
    return {"size": 3 * BATCH, "pushes": pushes, "probes": probes}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank found in `CASES`, and in the case of queues."""
    cases, folder = [make_case(**case) for case in CASES], tmp_path_factory.mktemp("loss")
    function = "tests.contrastive.rank_cases:losses_and_queues"
    return run_ranks(function, 2, folder, cases=cases, queue_case=make_queue_case())


@pytest.fixture(scope="module")
def outcomes(ranks: Any) -> Any:
    """(case, what each rank found, what one process finds) of every case."""
    cases = [make_case(**case) for case in CASES]
    found = []
    for case, *both in zip(cases, *(own for own, _ in ranks), strict=True):
        draws = torch.cat([own["draws"].view(2, -1) for own in both], dim=1)
        found.append((case, both, dense.loss(case, draws)))
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_two_ranks_have_the_loss_and_the_gradients_of_the_whole_batch(
    outcomes: Any, number: int
) -> None:
    _, ranks, expected = outcomes[number]
    mean = sum(float(own["loss"]) for own in ranks) / 2
    assert mean == pytest.approx(expected["loss"], rel=1e-5)
    assert float(ranks[0]["loss"]) != pytest.approx(expected["loss"], rel=1e-3)
    assert sum(float(own["accuracy"]) for own in ranks) / 2 == pytest.approx(expected["accuracy"])
    # a rank's gradient is that of the sum of both ranks' losses
    features = torch.cat([own["features"] for own in ranks], dim=1) / 2
    assert_close(features, expected["features"])
    assert expected["weights"].keys() == ranks[0]["weights"].keys()
    for own in ranks:
        for name, gradient in expected["weights"].items():
            assert_close(own["weights"][name], gradient)


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_view_a_of_all_ranks_enters_the_queue(outcomes: Any, number: int) -> None:
    case, ranks, expected = outcomes[number]
    targets = torch.cat([own["targets"] for own in ranks], dim=1)
    assert_close(targets, expected["targets"])
    state = {**case["queue"], "queue_ptr": torch.tensor([0])}
    for own in ranks:
        for name, new in (("queue", targets[0]), ("queue_y", case["labels"])):
            whole = torch.cat([state[name][: QUEUE - BATCH], new])
            assert torch.equal(own["queue"][name], whole)
        assert torch.equal(own["queue"]["queue_id"][-BATCH:], case["ids"])
        assert torch.equal(own["queue"]["queue_ptr"], state["queue_ptr"])


def test_running_statistics_are_those_of_the_whole_batch_view_by_view(outcomes: Any) -> None:
    case, ranks, _ = outcomes[0]
    inputs = [view @ case["head"]["projector.0.weight"].T for view in case["features"]]
    mean, variance = dense.running_statistics(inputs)
    for own in ranks:
        assert_close(own["head"]["projector.1.running_mean"], mean)
        assert_close(own["head"]["projector.1.running_var"], variance)


def test_neighbours_are_drawn_evenly_and_by_step_alone() -> None:
    from mlomae.contrastive.loss import NnclrLoss, TwoViews

    loss = NnclrLoss("head", queue=None, temperature=1.0, top_k=5, seed=3)  # type: ignore[arg-type]
    batches = [TwoViews(torch.empty(0), torch.empty(0), torch.arange(500), s) for s in (0, 1, 1)]
    first, second, again = (loss._draw(batch) for batch in batches)
    assert torch.equal(second, again) and not torch.equal(first, second)
    assert not torch.equal(first[:500], first[500:])  # the views draw by themselves
    counts = torch.cat([first, second]).bincount(minlength=5)
    assert len(counts) == 5 and counts.min() > 330 and counts.max() < 470  # 400 in the mean


# --- the queue -----------------------------------------------------------------------------------


def test_a_queue_is_first_in_first_out_and_the_same_in_parts(ranks: Any) -> None:
    pushes, probes, size = (make_queue_case()[key] for key in ("pushes", "probes", "size"))
    ranks = [own for _, own in ranks]
    start = ranks[0]["replicated"][0]
    assert torch.allclose(start["queue"].norm(dim=1), torch.ones(size), atol=1e-6)
    assert start["queue_y"].eq(-1).all() and start["queue_id"].eq(-1).all()

    entries = [(vector, -1, -1) for vector in start["queue"]]
    place = 0
    for number, push in enumerate(pushes, start=1):
        for entry in zip(*push.values(), strict=True):
            entries[place % size] = entry
            place += 1
        for kind in ("replicated", "sharded"):
            for rank, found in enumerate(own[kind][number] for own in ranks):
                assert torch.equal(found["queue"], torch.stack([vector for vector, *_ in entries]))
                assert found["queue_y"].tolist() == [int(label) for _, label, _ in entries]
                assert found["queue_id"].tolist() == [int(id_) for *_, id_ in entries]
                assert found["queue_ptr"].tolist() == [place % size]
                for own_probe in range(BATCH // 2):
                    i = rank * (BATCH // 2) + own_probe
                    order = dense.ranking(probes[i], int(push["ids"][i]), found)
                    assert found["nearest"][own_probe].tolist() == order[:5]
                    assert torch.equal(found["taken"][own_probe], found["queue"][order[1]])
    for own in ranks:
        for kind in ("replicated", "sharded"):
            for name in ("queue", "queue_y", "queue_id", "queue_ptr"):
                assert torch.equal(own[kind][-1][name], own[kind][-2][name])  # restored


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32's rounding, relative to the largest value."""
    scale = max(float(expected.abs().max()), 1e-2)  # a shift before a batch norm has none
    torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=0, atol=2e-5)

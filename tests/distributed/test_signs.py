"""Who is to blame for a hang, by the signs that the ranks have given."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mlomae.distributed.signs import Sign, judge


def sign(rank: int, **differing: Any) -> Sign:
    """Of a rank that has waited in a collective call for a minute."""
    values = {
        "rank": rank,
        "host": f"node{rank // 2}",
        "beat": 9,
        "num_marks": 5,
        "place": "a step",
    }
    values |= {"waits_in": "barrier", "seconds": 60.0, "clock": 1000.0, "has_ended": False}
    return Sign(**values | differing)


def later(*signs: Sign, living: Iterable[int]) -> list[Sign]:
    """A second look ten seconds after: who lives has given another sign."""
    changes = {"beat": 10, "seconds": 70.0, "clock": 1010.0}
    return [replace(s, **changes) if rank in living else s for rank, s in enumerate(signs)]


def judged(*signs: Sign, living: Iterable[int] = range(99), **options: float) -> Any:
    settings = {"timeout": 60.0, "apart": 10.0, "now": 1010.0} | options
    return judge(signs, later(*signs, living=living), **settings)


def test_all_ranks_in_one_call_are_all_named():
    verdict = judged(*map(sign, range(4)))
    assert verdict.ranks == [0, 1, 2, 3]
    assert verdict.sentence == "all 4 ranks have not left `a step` (in barrier) for 70 s"


def test_of_ranks_that_all_wait_the_one_with_the_fewest_marks_is_named():
    verdict = judged(sign(0), sign(1, num_marks=4, place="saving"), sign(2))
    assert verdict.ranks == [1]
    assert verdict.sentence == (
        "rank 1 on node0 has not left `saving` (in barrier) for 70 s, and ranks 0, 2 wait in "
        "barrier (`a step`)"
    )


def test_who_waits_for_nobody_is_named_though_it_has_the_most_marks():
    assert judged(sign(0, waits_in="", num_marks=8), sign(1), sign(2)).ranks == [0]


def test_a_host_that_is_gone_is_named_with_its_ranks():
    verdict = judged(*(sign(rank, clock=900.0) for rank in range(6)), living=(0, 1, 4, 5))
    assert verdict.sentence == (
        "ranks 2-3 on node1 have given no sign for 110 s (last seen in `a step`), and ranks 0-1, "
        "4-5 wait in barrier (`a step`)"
    )


def test_a_rank_that_comes_forward_keeps_all_alive():
    signs = [sign(0), sign(1), sign(2, clock=0.0)]
    moved = [*later(*signs[:1], living=[0]), replace(sign(1), beat=10, seconds=3.0), signs[2]]
    assert judge(signs, moved, timeout=60.0, apart=10.0, now=1010.0) == 3.0


def test_clocks_that_differ_condemn_nobody_alone():
    """A living rank whose clock is an hour behind; a silent one whose clock is an hour ahead."""
    assert judged(sign(0), sign(1, clock=-2600.0)).ranks == [0, 1]
    ahead = [sign(0), sign(1, clock=4600.0)]
    assert judged(*ahead, living=[0]) is None
    assert judged(*ahead, living=[0], apart=31.0).ranks == [1]


def test_a_rank_that_never_gave_a_sign_is_named():
    signs = [sign(0), None]
    verdict = judge(signs, [*later(sign(0), living=[0]), None], timeout=60.0, apart=31.0, now=0.0)
    assert verdict.sentence.startswith("rank 1 has given no sign since the start, and rank 0 waits")

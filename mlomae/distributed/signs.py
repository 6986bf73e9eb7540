"""What the ranks of a hung launch have said of themselves, and who is to blame."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_NAMED = 8  # runs of ranks that a sentence lists


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        beat: number of this sign, counted from 0.
        num_marks: marks that it has made.
        place: of the latest.
        waits_in: the collective call that it is in; empty when in none.
        seconds: that it has been in this place.
        clock: its clock, in seconds since 1970.
        has_ended: whether it has left the watch.
    """

    rank: int
    host: str
    beat: int
    num_marks: int
    place: str
    waits_in: str
    seconds: float
    clock: float
    has_ended: bool


@dataclass(frozen=True)
class Verdict:
    """Which ranks hang, the sentence that says so, and the rank that reached it."""

    ranks: list[int]
    sentence: str
    speaker: int = -1


def judge(
    before: Sequence[Sign | None],
    after: Sequence[Sign | None],
    *,
    timeout: float,
    apart: float,
    now: float,
) -> Verdict | float | None:
    """Who hangs, by two looks at the signs of all ranks.

    A rank without a new sign between the looks is silent once its last is half a timeout old, by
    its clock against the reader's or, where clocks differ, by the time between the looks.

    Args:
        before: the signs at the first look, by rank; None: never given.
        after: those at the second, long enough later for a new sign of every living rank.
        timeout: seconds.
        apart: seconds between the looks.
        now: the reader's clock, in seconds since 1970.

    Returns:
        The verdict; or the seconds, less than `timeout`, since some living rank came to its
        place; or None while a rank may be silent: look again.
    """
    living: list[Sign] = []
    silent: dict[int, float] = {}  # for how many seconds
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        if new is not None and not new.has_ended and new != old:
            living.append(new)
        else:
            silent[rank] = max(apart, now - new.clock if new else 0.0)
    seconds = min((sign.seconds for sign in living), default=timeout)
    if seconds < timeout:
        return seconds
    if not silent:
        return _of_living(living)
    if min(silent.values()) < timeout / 2:
        return None
    return _of_silent(silent, after, living)


def _of_silent(
    silent: dict[int, float], signs: Sequence[Sign | None], living: list[Sign]
) -> Verdict:
    """Those that give no sign, of the kind that the first of them is."""
    first = signs[min(silent)]
    alike = [r for r in sorted(silent) if _kind(signs[r]) == _kind(first)]
    who = _name(alike) + (f" on {first.host}" if first else "")
    have = "has" if len(alike) == 1 else "have"
    if first is None:
        what = f"{have} given no sign since the start"
    elif first.has_ended:
        what = f"{have} ended"
    else:
        what = f"{have} given no sign for {silent[alike[0]]:.0f} s (last seen in `{first.place}`)"
    return Verdict(alike, f"{who} {what}{_others(living)}")


def _kind(sign: Sign | None) -> tuple[str, bool] | None:
    return None if sign is None else (sign.host, sign.has_ended)


def _of_living(signs: list[Sign]) -> Verdict:
    """Of those that wait for nobody the ranks that have come least far, or of all."""
    waiting = [sign for sign in signs if sign.waits_in]
    suspects = [sign for sign in signs if not sign.waits_in] or waiting
    fewest = min(sign.num_marks for sign in suspects)
    blamed = [sign for sign in suspects if sign.num_marks == fewest]
    others = [sign for sign in signs if sign not in blamed]
    first, ranks = blamed[0], [sign.rank for sign in blamed]
    if not others and len(signs) > 1:
        who = f"all {len(signs)} ranks have"
    else:
        who = f"{_name(ranks)} on {first.host} {'has' if len(ranks) == 1 else 'have'}"
    where = f" (in {first.waits_in})" if first.waits_in else ""
    sentence = f"{who} not left `{first.place}`{where} for {first.seconds:.0f} s"
    return Verdict(ranks, sentence + _others(others))


def _others(signs: list[Sign]) -> str:
    """Where most of the others wait."""
    if not signs:
        return ""
    (place, waits_in), _ = Counter((sign.place, sign.waits_in) for sign in signs).most_common(1)[0]
    there = [sign.rank for sign in signs if (sign.place, sign.waits_in) == (place, waits_in)]
    return f", and {places(there, place, waits_in)}"


def places(ranks: list[int], place: str, waits_in: str) -> str:
    """`rank 0 waits in barrier (`saving`)`, or `rank 0 is in `saving``."""
    one = len(ranks) == 1
    if waits_in:
        return f"{_name(ranks)} {'waits' if one else 'wait'} in {waits_in} (`{place}`)"
    return f"{_name(ranks)} {'is' if one else 'are'} in `{place}`"


def _name(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 4`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    more = f" and {len(runs) - _NUM_NAMED} more runs" if len(runs) > _NUM_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(texts[:_NUM_NAMED])}{more}"

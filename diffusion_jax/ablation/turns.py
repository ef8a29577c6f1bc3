"""Schedule training runs of known lengths on slots, so that all slots end together."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """A part of run number ``index`` on one slot: the run trains until its step ``until``."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    until: int


def take_turns(
    done: Sequence[int], lengths: Sequence[int], num_slots: int, multiple: int
) -> list[Turn]:
    """The turns in the order in which slots take them when they become free.

    McNaughton's rule (1959): lay the runs end to end and cut them where a slot is full. A slot is
    full after the mean number of steps per slot, or after the steps of the longest run if that is
    more. If a run is cut, its first part is the first turn of one slot and its second part is the
    last turn of another slot, so the two parts do not overlap in time. With ``multiple`` = 1 no
    other schedule ends earlier; larger multiples approximate it.

    Args:
        done: steps that each run has taken already.
        lengths: the total number of steps of each run.
        num_slots: runs that train at once.
        multiple: a cut is rounded down to a multiple of this number of steps. A run whose cut would
            be at or before its ``done`` steps is not cut.
    """
    left = [length - step for step, length in zip(done, lengths)]
    if sum(steps > 0 for steps in left) <= num_slots:
        return [Turn(index, length) for index, length in enumerate(lengths)]
    full = max(-(-sum(left) // num_slots), *left)
    turns: list[tuple[int, Turn]] = []  # (the time at which the turn should begin, the turn)
    begin = 0
    for index, (step, length) in enumerate(zip(done, lengths)):
        past = begin + left[index] - full
        cut = (step + past) // multiple * multiple
        if past > 0 and cut > step:
            turns.append((0, Turn(index, cut)))
        turns.append((begin, Turn(index, length)))
        begin = past if past >= 0 else begin + left[index]
    return [turn for _, turn in sorted(turns, key=lambda timed: timed[0])]

"""The order in which runs of known length take turns on slots, so that all slots end together."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """The run of number ``index``, on a slot until it has taken the step ``until``."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a turn for
    until: int


def take_turns(
    done: Sequence[int], lengths: Sequence[int], num_slots: int, multiple: int
) -> list[Turn]:
    """The turns in the order in which slots take them when they become free.

    McNaughton's rule (1959): the runs are laid end to end and cut where a slot is full. A slot is
    full at the mean number of steps of all slots, or at the longest run if that is more. The first
    part of a run that is cut comes first on the next slot; its last part is the last turn of a
    slot. No slot waits.

    Args:
        done: steps that each run has taken already.
        lengths: steps of each run in all.
        num_slots: runs that train at once.
        multiple: a run is cut at a multiple of this number of steps, rounded down, or not at all.
    """
    left = [length - step for step, length in zip(done, lengths)]
    if sum(steps > 0 for steps in left) <= num_slots:
        return [Turn(index, length) for index, length in enumerate(lengths)]
    full = max(-(-sum(left) // num_slots), *left)
    turns: list[tuple[int, Turn]] = []  # each with the time at which it should begin
    begin = 0
    for index, (step, length) in enumerate(zip(done, lengths)):
        past = begin + left[index] - full
        cut = (step + past) // multiple * multiple
        if past > 0 and cut > step:
            turns.append((0, Turn(index, cut)))
        turns.append((begin, Turn(index, length)))
        begin = past if past >= 0 else begin + left[index]
    return [turn for _, turn in sorted(turns, key=lambda timed: timed[0])]

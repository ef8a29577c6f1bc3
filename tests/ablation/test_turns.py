"""Runs that take turns on slots: every step once, no run on two slots, no slot waits."""

import math

from hypothesis import given
from hypothesis import strategies as st

from diffusion_jax.ablation.turns import take_turns


def play(turns, done, num_slots):
    """Simulate the slots; return the number of ticks and the steps that each run has taken.

    In a tick each busy slot takes one step. A free slot takes the first waiting turn whose run is
    on no other slot. All turns must be taken in the end.
    """
    waiting, steps, slots, ticks = list(turns), list(done), {}, 0
    while True:
        for slot in range(num_slots):
            taken = {turn.index for turn in slots.values()}
            resting = [turn for turn in waiting if turn.index not in taken]
            while slot not in slots and resting:
                turn = resting.pop(0)
                waiting.remove(turn)
                if steps[turn.index] < turn.until:
                    slots[slot] = turn
        if not slots:
            assert not waiting
            return ticks, steps
        for slot, turn in tuple(slots.items()):
            steps[turn.index] += 1
            if steps[turn.index] == turn.until:
                del slots[slot]
        ticks += 1


RUNS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (min(pair), max(pair))),
    min_size=1,
    max_size=12,
)


@given(RUNS, st.integers(1, 5))
def test_all_slots_end_together_or_with_the_longest_run(runs, num_slots):
    done, lengths = zip(*runs)
    left = [length - step for step, length in runs]
    ticks, steps = play(take_turns(done, lengths, num_slots, 1), done, num_slots)
    assert steps == list(lengths)
    assert ticks == max(math.ceil(sum(left) / num_slots), *left)


@given(RUNS, st.integers(1, 5), st.integers(1, 40))
def test_runs_are_cut_only_at_multiples(runs, num_slots, multiple):
    done, lengths = zip(*runs)
    turns = take_turns(done, lengths, num_slots, multiple)
    _, steps = play(turns, done, num_slots)
    assert steps == list(lengths)
    for turn in turns:
        assert turn.until == lengths[turn.index] or turn.until % multiple == 0
    if multiple > max(lengths):
        assert sorted(turns) == [(index, length) for index, length in enumerate(lengths)]


def test_seven_equal_runs_on_two_slots_take_the_time_of_three_and_a_half():
    turns = take_turns([0] * 7, [150] * 7, 2, 75)
    assert turns[1] == (3, 75)
    assert turns[-1] == (3, 150)
    assert play(turns, [0] * 7, 2)[0] == 525


def test_runs_with_a_slot_each_are_not_cut():
    turns = take_turns([0, 30, 100, 30], [100] * 4, 3, 1)
    assert turns == [(0, 100), (1, 100), (2, 100), (3, 100)]

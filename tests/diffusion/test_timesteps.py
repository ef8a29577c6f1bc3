"""Timestep samplers: the distribution of timesteps, their weights, and the history of losses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import timesteps
from diffusion_jax.diffusion.timesteps import (
    HISTORY,
    TIMESTEP_SAMPLERS,
    UNIFORM_SHARE,
    LossHistory,
    TimestepDraw,
)


@functools.cache
def drawn(name, num_batches, batch_size, num_timesteps):
    """The rows (timestep - 1) that are drawn for many batches: [num_batches, batch_size]."""

    def of_batch(key):
        indices = jnp.arange(batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        sampler = TIMESTEP_SAMPLERS[name]
        state = sampler.init(num_timesteps)
        draw = TimestepDraw(key, keys, indices, batch_size)
        return sampler.draw(state, draw, num_timesteps)[0]

    return np.asarray(jax.jit(jax.vmap(of_batch))(jax.random.split(jax.random.key(0), num_batches)))


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(3, 5)])
def test_every_timestep_is_uniform(name, batch_size, num_timesteps):
    num_batches = 20_000
    position = drawn(name, num_batches, batch_size, num_timesteps)
    assert position.min() == 0
    assert position.max() == num_timesteps - 1
    expected = num_batches / num_timesteps
    for of_example in position.T:
        chi_square = np.sum((np.bincount(of_example, minlength=num_timesteps) - expected) ** 2)
        chi_square /= expected
        # chi-square with T - 1 degrees of freedom has mean T - 1 and variance 2 (T - 1)
        freedom = num_timesteps - 1
        assert chi_square <= freedom + 6 * np.sqrt(2 * freedom)


def test_uniform_timesteps_are_independent():
    # the joint counts of two examples of a batch, 25 cells
    first, second, _ = drawn("uniform", 20_000, 3, 5).T
    counts, expected = np.bincount(5 * first + second, minlength=25), 20_000 / 25
    assert np.sum((counts - expected) ** 2) / expected < 24 + 6 * np.sqrt(2 * 24)


@pytest.mark.parametrize("num_timesteps", [8, 100])
def test_low_discrepancy_takes_every_row_once(num_timesteps):
    position = drawn("low_discrepancy", 200, num_timesteps, num_timesteps)
    np.testing.assert_array_equal(np.sort(position), np.tile(np.arange(num_timesteps), (200, 1)))
    # in order, wrapping around once
    np.testing.assert_array_equal(np.diff(position) % num_timesteps, 1 % num_timesteps)
    assert len(np.unique(position[:, 0])) > 5  # the first row is random


@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(12, 4), (7, 11)])
def test_low_discrepancy_fills_every_stretch_evenly(batch_size, num_timesteps):
    # An interval holds its share of evenly spaced points, rounded up or down
    for position in drawn("low_discrepancy", 200, batch_size, num_timesteps):
        for first, last in itertools.combinations(range(num_timesteps + 1), 2):
            share = batch_size * (last - first) / num_timesteps
            count = np.sum((first <= position) & (position < last))
            assert np.floor(share - 1e-3) <= count <= np.ceil(share + 1e-3)


def test_low_discrepancy_draws_no_row_outside_the_schedule(monkeypatch):
    # the offsets 0 and the largest float32 number below 1
    for offset in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        monkeypatch.setattr(jax.random, "uniform", lambda key, value=offset: jnp.float32(value))
        for num_timesteps in (1, 10, 1000, 4000):
            key = jax.random.key(0)
            draw = TimestepDraw(key, jax.random.split(key, 16), jnp.arange(16), 16)
            position, weights = timesteps.low_discrepancy((), draw, num_timesteps)
            assert position.min() >= 0
            assert position.max() < num_timesteps
            np.testing.assert_array_equal(weights, 1)


def history_of(losses, num_timesteps):
    """The last HISTORY losses of each timestep, one loss after the other as in iDDPM's code."""
    history = [[] for _ in range(num_timesteps)]
    for row, loss in losses:
        history[row] = [*history[row], loss][-HISTORY:]
    return history


def test_the_history_has_the_last_losses_of_each_timestep():
    """This holds too where a batch has more losses of one timestep than the history stores."""
    draws, state, fed = (
        np.random.default_rng(0),
        timesteps.TIMESTEP_SAMPLERS["importance"].init(5),
        [],
    )
    for size in (1, 7, 40, 3, 100):
        rows, losses = draws.integers(0, 4, size), draws.random(size).astype(np.float32)
        state = jax.jit(timesteps.update_history)(state, jnp.asarray(rows), jnp.asarray(losses))
        fed += zip(rows, losses)
        for row, history in enumerate(history_of(fed, 5)):
            assert state.counts[row] == sum(r == row for r, _ in fed)
            np.testing.assert_array_equal(
                np.sort(state.losses[row])[HISTORY - len(history) :], np.sort(history)
            )


def warm(num_timesteps):
    """A full history, with larger losses at later timesteps."""
    losses = np.random.default_rng(1).random((num_timesteps, HISTORY)).astype(np.float32)
    losses *= np.linspace(0.1, 3, num_timesteps, dtype=np.float32)[:, None]
    return LossHistory(jnp.asarray(losses), jnp.full(num_timesteps, HISTORY))


def test_importance_is_the_root_of_the_second_moment():
    """iDDPM eq. 18, mixed with the uniform distribution as in its code.

    It is uniform while any timestep's history is not full, and if all losses are 0.
    """
    state = warm(20)
    moment = np.sqrt(np.mean(np.float64(state.losses) ** 2, axis=1))
    expected = (1 - UNIFORM_SHARE) * moment / moment.sum() + UNIFORM_SHARE / 20
    found = timesteps.importance_probabilities(state)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    cold = state._replace(counts=state.counts.at[3].set(HISTORY - 1))
    np.testing.assert_allclose(timesteps.importance_probabilities(cold), 1 / 20, rtol=1e-6)
    nothing = state._replace(losses=jnp.zeros_like(state.losses))
    np.testing.assert_allclose(timesteps.importance_probabilities(nothing), 1 / 20, rtol=1e-6)


def test_importance_draws_from_its_probabilities_and_the_weights_undo_them():
    state, size, num_timesteps = warm(20), 200_000, 20
    keys = jax.random.split(jax.random.key(0), size)
    draw = TimestepDraw(keys[0], keys, jnp.arange(size), size)
    rows, weights = timesteps.importance(state, draw, num_timesteps)
    p = np.float64(timesteps.importance_probabilities(state))
    expected = size * p
    chi_square = np.sum((np.bincount(rows, minlength=num_timesteps) - expected) ** 2 / expected)
    assert chi_square < 19 + 6 * np.sqrt(2 * 19)
    np.testing.assert_allclose(weights, 1 / (num_timesteps * p[rows]), rtol=1e-5)
    # The weighted mean of any f(t) is an unbiased estimate of its plain mean
    f = np.arange(num_timesteps) ** 2.0
    values = f[rows] * np.float64(weights)
    assert abs(values.mean() - f.mean()) < 5 * values.std() / np.sqrt(size)

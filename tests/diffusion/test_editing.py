"""Image editing with Gaussian data, for which the results are known in closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import cosine_betas, gaussian, rows

from diffusion_jax.diffusion import process, samplers, schedules
from diffusion_jax.diffusion.editing import diffuse, inpaint, slerp, until, vary
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers import SAMPLERS
from diffusion_jax.diffusion.samplers.ancestral import ancestral
from diffusion_jax.diffusion.samplers.chain import sample, trajectory
from diffusion_jax.diffusion.samplers.ddim import ddim
from diffusion_jax.errors import ConfigError

KEY = jax.random.key(5)
MEAN, VARIANCE = 0.4, 0.05
DATA = gaussian(MEAN, VARIANCE)
SCHEDULE = schedules.cosine(8)


def split(number, count, key=KEY):
    """``count`` keys, different for each ``number``."""
    return jax.random.split(jax.random.fold_in(key, number), count)


@jax.jit
def draw(sampler, schedule, like, key=KEY, x_T=None, indices=None):
    return sample(key, DATA, schedule, sampler, like.shape, x_T=x_T, indices=indices)


@jax.jit
def latent_of(schedule, x_0):
    return samplers.invert(DATA, schedule, x_0, num_iterations=10)


def check_moments(found, mean, variance):
    """Assert a sample's mean and variance within 4.5 deviations, sqrt(v / n) and v sqrt(2 / n)."""
    found = np.asarray(found, np.float64)
    assert abs(found.mean() - mean) < 4.5 * np.sqrt(variance / found.size)
    assert abs(found.var() / variance - 1) < 4.5 * np.sqrt(2 / found.size)


# --- RePaint's path -------------------------------------------------------------------------

LENGTHS = range(1, 12)
PATHS = [(n, j, r) for n in LENGTHS for j in range(1, n) for r in range(1, 5)]


def path_of(num_steps, jump_length, num_resamples, sampler=ancestral()):  # noqa: B008
    x_0 = jnp.zeros((1, 1))
    wrapped = inpaint(sampler, x_0, jnp.ones((1, 1)), num_resamples, jump_length)
    return wrapped.path(num_steps), wrapped


def test_a_path_written_out_by_hand():
    path, _ = path_of(num_steps=6, jump_length=2, num_resamples=2)
    assert path.tolist() == [6, 5, 4, 3, 4, 5, 4, 3, 2, 1, 2, 3, 2, 1, 0]


def test_jumps_of_length_1_are_algorithm_1_of_repaint():
    # For t = T .. 1: U times x_t -> x_{t-1}, with x_{t-1} -> x_t in between unless t = 1
    path, _ = path_of(num_steps=4, jump_length=1, num_resamples=3)
    assert path.tolist() == [4, 3, 4, 3, 4, 3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_every_path_has_the_transitions_of_repaint(num_steps):
    for n, jump_length, num_resamples in PATHS:
        if n != num_steps:
            continue
        path, wrapped = path_of(num_steps, jump_length, num_resamples)
        steps = np.diff(path)
        assert (path[0], path[-1]) == (num_steps, 0)
        assert np.isin(steps, (-1, 1)).all()
        assert (path == 0).sum() == 1  # no path goes up from x_0
        # Between states i and i + 1: num_resamples downward moves inside a jump, else one
        top = 1 + (num_steps - 1) // jump_length * jump_length
        i = np.arange(num_steps)
        jumped = (i >= 1) & (i < top)
        down = np.bincount(path[1:][steps < 0], minlength=num_steps)
        up = np.bincount(path[:-1][steps > 0], minlength=num_steps)
        np.testing.assert_array_equal(down, np.where(jumped, num_resamples, 1))
        np.testing.assert_array_equal(up, np.where(jumped, num_resamples - 1, 0))
        # Upward moves come as one or several whole jumps
        runs = "".join("+" if step > 0 else "-" for step in steps).split("-")
        assert all(len(run) % jump_length == 0 for run in runs)
        assert wrapped.num_evaluations(num_steps) == down.sum()


def published_times(num_steps, jump_length, num_resamples):
    """The times of RePaint's published schedule (get_schedule_jump, only its first kind of jump).

    They begin at T - 1, go down to 0 and end with -1. At each of the times 0, j, 2j, ... below
    T - j the chain goes j times up and j times down again, and repeats that num_resamples - 1
    times in all.
    """
    times = [num_steps - 1]
    for place in reversed(range(0, num_steps - jump_length, jump_length)):
        times += range(times[-1] - 1, place - 1, -1)
        top = place + jump_length
        times += (num_resamples - 1) * [*range(place + 1, top), *range(top, place - 1, -1)]
    return np.array([*times, *range(times[-1] - 1, -2, -1)])


@pytest.mark.parametrize(
    ("num_steps", "jump_length", "num_resamples"),
    [(250, 10, 10), (250, 10, 1), (100, 7, 3), (51, 10, 2), (50, 10, 2), (20, 19, 4), (5, 1, 5)],
)
def test_the_states_are_those_of_the_published_schedule(num_steps, jump_length, num_resamples):
    """A published time is one less than our state: x_0 is -1 there and 0 here."""
    path, wrapped = path_of(num_steps, jump_length, num_resamples)
    times = published_times(num_steps, jump_length, num_resamples)
    np.testing.assert_array_equal(path - 1, times)
    if (num_steps, jump_length, num_resamples) == (250, 10, 10):  # the setting of the paper
        # 250 moves down, and from 24 places 9 jumps of 10 states up and down again
        assert len(times) == 251 + 24 * 9 * 20
        assert wrapped.num_evaluations(num_steps) == 250 + 24 * 9 * 10


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("jump_length", [1, 3, 20])
def test_one_resample_is_the_plain_path(num_steps, jump_length):
    path, wrapped = path_of(num_steps, jump_length, 1)
    np.testing.assert_array_equal(path, ancestral().path(num_steps))
    assert wrapped.num_evaluations(num_steps) == num_steps


# --- RePaint's steps ------------------------------------------------------------------------

STATES = {name: SAMPLERS[name]().init(jnp.zeros((1, 1)), SCHEDULE, SCHEDULE) for name in SAMPLERS}
NO_MEMORY = [name for name, state in STATES.items() if state == ()]
KINDS = list({type(SAMPLERS[name]()): SAMPLERS[name]() for name in NO_MEMORY}.values())
HALF = jnp.arange(6).reshape(1, 6) < 3  # a mask: the first three of six pixels are unknown


@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: type(sampler).__name__)
def test_the_known_pixels_stay_and_upward_moves_do_not_call_the_network(sampler):
    calls = []

    def predict(x_t, row):
        jax.debug.callback(lambda: calls.append(()))
        return DATA(x_t, row)

    x_0 = jax.random.normal(KEY, (2, 6)).at[0, 4].set(100.0)  # one pixel far from the data
    wrapped = inpaint(sampler, x_0, HALF, num_resamples=2, jump_length=2)
    found = np.asarray(
        jax.jit(lambda schedule: sample(KEY, predict, schedule, wrapped, (2, 6)))(SCHEDULE)
    )
    np.testing.assert_array_equal(found[:, 3:], x_0[:, 3:])
    assert np.isfinite(found).all()
    assert np.abs(found[:, :3] - x_0[:, :3]).min() > 1e-3
    jax.effects_barrier()
    assert len(calls) == wrapped.num_evaluations(len(SCHEDULE))
    assert wrapped.needs_signal == sampler.needs_signal


def test_a_downward_and_an_upward_step_are_those_of_repaint():
    lower, upper = SCHEDULE[3], SCHEDULE[4]
    x_0 = jax.random.normal(KEY, (300, 6))
    x_t = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, 6)[None], x_0.shape)
    keys = split(1, len(x_0))

    @jax.jit
    def step(mask, row, row_prev):
        wrapped = inpaint(ancestral("beta"), x_0, mask, num_resamples=2, jump_length=1)
        return wrapped.step(samplers.Step(keys, DATA, (), x_t, row, row_prev))[0]

    mean = process.posterior_mean(upper, DATA(x_t, upper).x_0, x_t)
    everything, nothing = (jnp.full((1, 6), value) for value in (True, False))
    noises = [
        (step(everything, upper, lower) - mean) / jnp.sqrt(upper.beta),
        (step(nothing, upper, lower) - jnp.sqrt(lower.alpha_bar) * x_0)
        / jnp.sqrt(lower.one_minus_alpha_bar),
        (step(HALF, lower, upper) - jnp.sqrt(upper.alpha) * x_t) / jnp.sqrt(upper.beta),
    ]
    for noise in noises:
        check_moments(noise, 0, 1)
    # The noises of the sampler, of the known pixels and of the upward move are independent
    correlation = np.corrcoef([np.ravel(noise) for noise in noises]) - np.eye(3)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(x_0.size)
    # The mask selects between sampled and known pixels
    both = jnp.where(HALF, step(everything, upper, lower), step(nothing, upper, lower))
    np.testing.assert_array_equal(step(HALF, upper, lower), both)


def test_nothing_known_and_no_resampling_is_the_sampler_itself():
    # The keys differ, but DDIM without noise does not use them
    x_T = jax.random.normal(KEY, (2, 6))
    wrapped = inpaint(ddim(), x_T, jnp.ones((2, 6)), 1, 1)
    np.testing.assert_array_equal(
        draw(wrapped, SCHEDULE, x_T, KEY, x_T), draw(ddim(), SCHEDULE, x_T, KEY, x_T)
    )


def test_an_inpainted_image_depends_on_its_number_alone():
    x_0 = jax.random.normal(KEY, (4, 6))
    found, again = (
        draw(inpaint(ancestral(), x_0[order], HALF, 2, 1), SCHEDULE, x_0, indices=order)
        for order in (jnp.arange(4), jnp.array([3, 1, 0, 2]))
    )
    np.testing.assert_array_equal(again, found[jnp.array([3, 1, 0, 2])])
    assert len(np.unique(found[:, :3])) == 12


# Two correlated pixels, of which the first is known. Both are computed in float64: the moments of
# RePaint's chain, and the exact conditional N(m_2 + C_21 / C_11 (x_1 - m_1), C_22 - C_21^2 / C_11).

PAIR_MEAN = np.array([0.1, -0.2])
COVARIANCE = 0.25 * np.array([[1.0, 0.9], [0.9, 1.0]])
KNOWN = 1.1
EXACT_MEAN = PAIR_MEAN[1] + 0.9 * (KNOWN - PAIR_MEAN[0])
EXACT_VARIANCE = 0.25 * (1 - 0.9**2)
EIGENVALUES, EIGENVECTORS = np.linalg.eigh(COVARIANCE)


def predict_pair(x_t, row):
    total = row.alpha_bar * EIGENVALUES + row.one_minus_alpha_bar
    precision = (EIGENVECTORS / total[None]) @ EIGENVECTORS.T
    centred = (x_t - (jnp.sqrt(row.alpha_bar) * PAIR_MEAN)[None]) @ precision
    return Prediction(
        x_0=PAIR_MEAN[None] + jnp.sqrt(row.alpha_bar) * centred @ COVARIANCE,
        eps=jnp.sqrt(row.one_minus_alpha_bar) * centred,
    )


def exact_moments(betas, path):
    """Mean and variance of the unknown pixel at the end of RePaint's chain of linear moves."""
    table = rows(betas)
    mean, covariance = np.zeros(2), np.eye(2)
    for state, following in itertools.pairwise(path):
        row = table[max(state, following) - 1]  # the row of the transition between the states
        if following > state:
            mean = np.sqrt(row.alpha) * mean
            covariance = row.alpha * covariance + row.beta * np.eye(2)
            continue
        signal = np.sqrt(row.alpha_bar)
        total = row.alpha_bar * COVARIANCE + row.noise * np.eye(2)
        to_x_0 = signal * COVARIANCE @ np.linalg.inv(total)
        of_x_0 = np.sqrt(row.alpha_bar_prev) * row.beta / row.noise
        slope = of_x_0 * to_x_0 + np.sqrt(row.alpha) * row.noise_prev / row.noise * np.eye(2)
        shift = of_x_0 * (PAIR_MEAN - to_x_0 @ (signal * PAIR_MEAN))
        slope[0], shift[0] = 0, np.sqrt(row.alpha_bar_prev) * KNOWN
        mean = slope @ mean + shift
        noise = np.diag([row.noise_prev, row.posterior_variance])
        covariance = slope @ covariance @ slope.T + noise
    return mean[1], covariance[1, 1]


@pytest.mark.parametrize(("num_resamples", "jump_length"), [(5, 1), (3, 4)])
def test_moments_of_the_inpainted_pixel_follow_the_recursion(num_resamples, jump_length):
    betas = cosine_betas(20)
    x_0 = jnp.broadcast_to(jnp.array([[KNOWN, 50.0]]), (4096, 2))  # 50.0 is masked out
    wrapped = inpaint(ancestral("posterior"), x_0, jnp.array([[0, 1]]), num_resamples, jump_length)
    found = jax.jit(lambda schedule: sample(KEY, predict_pair, schedule, wrapped, x_0.shape))(
        schedules.from_betas(betas)
    )
    check_moments(found[:, 1], *exact_moments(betas, wrapped.path(20)))


def bias(num_steps, num_resamples, jump_length):
    """The error of the mean in deviations of the conditional, and the ratio of the variances."""
    path, _ = path_of(num_steps, jump_length, num_resamples)
    mean, variance = exact_moments(cosine_betas(num_steps), path)
    return abs(mean - EXACT_MEAN) / np.sqrt(EXACT_VARIANCE), variance / EXACT_VARIANCE


@pytest.mark.parametrize("num_steps", [50, 250])
def test_more_resampling_brings_the_pixel_nearer_to_its_conditional(num_steps):
    errors = [bias(num_steps, num_resamples, 1)[0] for num_resamples in (1, 2, 5, 20)]
    assert errors[0] > 1  # plain replacement is off by more than a standard deviation
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 0.15 * errors[0]


def test_with_many_steps_and_resamples_the_mean_is_that_of_the_conditional():
    error, ratio = bias(num_steps=400, num_resamples=40, jump_length=1)
    assert error < 0.03
    # The ancestral chain itself loses some variance, and resampling repeats that
    assert 0.8 < ratio < 1


# --- compilation ----------------------------------------------------------------------------


def test_other_images_and_masks_compile_nothing_anew():
    traces = []

    def predict(x_t, row):
        traces.append(())
        return DATA(x_t, row)

    run = jax.jit(lambda key, sampler: sample(key, predict, SCHEDULE, sampler, (2, 6)))
    run(KEY, inpaint(ddim(0.5), jnp.zeros((2, 6)), HALF, 2, 2))
    once = len(traces)
    for value, mask, eta in [(1.0, HALF, 0.5), (1.0, ~HALF, 0.5), (0.0, np.eye(2, 6), 0.7)]:
        x_0 = jnp.full((2, 6), value)
        found = run(KEY, inpaint(ddim(eta), x_0, mask, 2, 2))
        known = ~np.broadcast_to(mask, (2, 6)).astype(bool)
        assert (np.asarray(found)[known] == value).all()
    assert len(traces) == once


def test_images_and_masks_may_be_traced():
    x_0 = jax.random.normal(KEY, (2, 6))

    @partial(jax.pmap, devices=jax.devices()[:2])
    def run(x_0, mask):
        wrapped = inpaint(ancestral(), x_0, mask, num_resamples=2, jump_length=1)
        return sample(KEY, DATA, SCHEDULE, wrapped, x_0.shape)

    found = run(x_0[:, None], jnp.stack([HALF, HALF]))
    np.testing.assert_array_equal(found[:, 0, 3:], x_0[:, 3:])


def test_inpainting_without_resampling_can_return_frames():
    x_0 = jax.random.normal(KEY, (2, 6))
    wrapped = inpaint(ancestral(), x_0, HALF, num_resamples=1, jump_length=1)
    run = jax.jit(partial(trajectory, KEY, DATA, shape=(2, 6), num_frames=len(SCHEDULE) + 1))
    found, x_t, predicted = run(schedule=SCHEDULE, sampler=wrapped)
    np.testing.assert_array_equal(found[:, 3:], x_0[:, 3:])
    expected = DATA(x_t[-2], SCHEDULE[0]).x_0  # before the last step
    np.testing.assert_allclose(predicted[-2], expected, rtol=1e-5, atol=1e-6)


# --- SDEdit ---------------------------------------------------------------------------------


def test_until_keeps_the_rows_up_to_the_timestep():
    full = schedules.linear(100)
    short = schedules.respace(full, 10)  # 10, 20 .. 100
    for schedule, timestep, length in [
        (full, 1, 1),
        (full, 42, 42),
        (full, 42.5, 42),
        (full, 100, 100),
        (short, 10, 1),
        (short, 59, 5),
        (short, 60, 6),
        (short, 100, 10),
    ]:
        lower = until(schedule, timestep)
        assert len(lower) == length
        jax.tree.map(np.testing.assert_array_equal, lower, schedule[:length])


@pytest.mark.parametrize("timestep", [1, 30, 100])
def test_diffused_images_are_those_of_the_forward_process(timestep):
    row = schedules.linear(100)[timestep - 1]
    x_0 = jnp.broadcast_to(jnp.array([[-1.0, 0.0, 2.0]]), (4096, 3))
    x_t = diffuse(split(0, len(x_0)), row, x_0)
    check_moments(x_t - jnp.sqrt(row.alpha_bar) * x_0, 0, float(row.one_minus_alpha_bar))
    some = jnp.array([7, 3])
    np.testing.assert_array_equal(diffuse(split(0, len(x_0))[some], row, x_0[some]), x_t[some])


def test_sdedit_of_data_gives_data():
    x_0 = MEAN + np.sqrt(VARIANCE) * jax.random.normal(KEY, (16, 1024))
    lower = until(schedules.cosine(400), 160)
    x_t = diffuse(split(0, len(x_0)), lower[-1], x_0)
    edited = np.asarray(draw(ddim(), lower, x_0, jax.random.key(1), x_t), np.float64)
    # The chain's own error is a percent or two of the variance
    assert abs(edited.mean() - MEAN) < 0.05 * np.sqrt(VARIANCE)
    assert abs(edited.var() / VARIANCE - 1) < 0.03


def chain_below(timestep):
    """A chain of five steps from a timestep; all have one length and so are compiled once."""
    return schedules.respace(until(schedules.cosine(100), timestep), 5)


def test_sdedit_with_less_noise_keeps_more_of_the_drawing():
    drawing = jnp.linspace(-3, 3, 64).reshape(8, 8)
    distances = []
    for timestep in (5, 30, 60, 100):
        lower = chain_below(timestep)
        assert lower.timestep[-1] == timestep
        x_t = diffuse(split(0, 8), lower[-1], drawing)
        edited = draw(ddim(), lower, drawing, KEY, x_t)
        distances.append(float(jnp.abs(edited - drawing).mean()))
    assert (np.diff(distances) > 0).all()


# --- interpolation --------------------------------------------------------------------------

arc = jax.jit(slerp)
FRACTIONS = jnp.array([0.0, 0.25, 1 / 3, 1.0])


def test_slerp_follows_the_circle():
    x, y = jnp.array([[[3.0, 0.0]], [[1.0, 0.0]]]), jnp.array([[[0.0, 3.0]], [[0.5, 0.75**0.5]]])
    found = arc(x, y, FRACTIONS)
    assert found.shape == (4, 2, 1, 2)
    for image, (radius, angle) in enumerate([(3, np.pi / 2), (1, np.pi / 3)]):
        turned = np.asarray(FRACTIONS, np.float64) * angle
        expected = radius * np.stack([np.cos(turned), np.sin(turned)], axis=-1)
        np.testing.assert_allclose(found[:, image, 0], expected, rtol=2e-6, atol=2e-6)


def test_slerp_of_noise_keeps_the_norm_of_noise():
    x, y = jax.random.normal(KEY, (2, 3, 64, 64))
    middle = arc(x, y, jnp.array([0.5]))[0]
    norm = partial(jnp.linalg.norm, axis=(1, 2))
    np.testing.assert_allclose(norm(middle), (norm(x) + norm(y)) / 2, rtol=0.01)
    assert (norm((x + y) / 2) < 0.75 * norm(x)).all()


X = jax.random.normal(KEY, (2, 5))
SECOND = {
    "other": jax.random.normal(jax.random.key(9), (2, 5)),
    "same": X,
    "longer": 2 * X,
    "nearly the same": X * (1 + 1e-6 * jnp.arange(5)[None]),
    "opposite": -X,
    "zero": jnp.zeros_like(X),
}


@pytest.mark.parametrize("name", SECOND)
def test_slerp_begins_and_ends_exactly(name):
    y = SECOND[name]
    found = arc(X, y, jnp.linspace(0, 1, 5))
    np.testing.assert_array_equal(found[0], X)
    np.testing.assert_array_equal(found[-1], y)
    if name != "other":
        straight = X[None] + jnp.linspace(0, 1, 5)[:, None, None] * (y - X)[None]
        np.testing.assert_allclose(found, straight, rtol=1e-5, atol=1e-6)


def test_slerp_of_close_latents_is_accurate():
    # arccos in float32 cannot represent angles below 3e-4
    angle = 1e-4
    x, y = jnp.array([[1.0, 0.0]]), jnp.array([[np.cos(angle), np.sin(angle)]])
    found = arc(x, jnp.float32(y), jnp.array([0.3]))[0, 0, 1]
    np.testing.assert_allclose(found, np.sin(0.3 * angle), rtol=1e-5)


def test_images_come_back_from_the_ends_of_an_interpolation():
    schedule = schedules.linear(100, rescale=True)
    first, second = MEAN + np.sqrt(VARIANCE) * jax.random.normal(KEY, (2, 3, 4))
    latents = [latent_of(schedule, x_0) for x_0 in (first, second)]
    x_T = arc(*latents, jnp.array([0.0, 0.5, 1.0]))
    begin, _, end = (draw(ddim(), schedule, first, KEY, x) for x in x_T)
    np.testing.assert_allclose(begin, first, atol=2e-4)
    np.testing.assert_allclose(end, second, atol=2e-4)


# --- variations -----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("timestep", [1, 20, 60, 100])
def test_variations_keep_the_distribution_of_x_t(timestep, strength):
    variance = 0.5  # of the data: large enough to show beside the noise
    row = schedules.cosine(100)[timestep - 1]
    exact = rows(cosine_betas(100))[timestep - 1]
    total = exact.alpha_bar * variance + exact.noise
    centre = np.sqrt(exact.alpha_bar) * MEAN
    x_t = centre + np.sqrt(total) * jax.random.normal(KEY, (32, 1024))
    prediction = gaussian(MEAN, variance)(x_t, row)
    varied = jax.jit(vary)(split(2, len(x_t)), row, x_t, prediction, strength)
    # E[Var(x_0 | x_t)] of the docstring
    left = variance * exact.noise / total
    shortfall = (1 - np.cos(strength * np.pi / 2)) ** 2 * exact.alpha_bar * left
    check_moments(varied, centre, total - shortfall)
    if timestep == 100:  # x_T is noise, and a rotation of noise is noise
        check_moments(varied, 0, 1)


def test_strength_0_returns_x_t_and_strength_1_draws_new_noise():
    row, keys = SCHEDULE[3], split(2, 3)
    x_t = jax.random.normal(KEY, (3, 4))
    prediction = DATA(x_t, row)
    np.testing.assert_array_equal(vary(keys, row, x_t, prediction, 0.0), x_t)
    np.testing.assert_allclose(
        vary(keys, row, x_t, prediction, 1.0), diffuse(keys, row, prediction.x_0), atol=1e-6
    )
    traced = jax.jit(vary)(keys, row, x_t, prediction, jnp.zeros(()))
    np.testing.assert_array_equal(traced, x_t)


def test_stronger_variations_lie_further_away():
    lower = chain_below(60)
    x_0 = MEAN + np.sqrt(VARIANCE) * jax.random.normal(KEY, (8, 8))
    x_t = diffuse(split(0, 8), lower[-1], x_0)
    prediction = DATA(x_t, lower[-1])
    images = [
        draw(ddim(), lower, x_0, KEY, vary(split(2, 8), lower[-1], x_t, prediction, strength))
        for strength in (0.0, 0.1, 0.3, 1.0)
    ]
    distances = [float(jnp.abs(image - images[0]).mean()) for image in images]
    assert (np.diff(distances) > 0).all()


# --- what is refused ------------------------------------------------------------------------

IMAGE = jnp.zeros((2, 6))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(NO_MEMORY)))
def test_samplers_with_a_memory_are_refused(name):
    with pytest.raises(ConfigError, match=r"^sampler = '\w+': must be one without memory") as error:
        inpaint(SAMPLERS[name](), IMAGE, HALF, 2, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("sampler", lambda: inpaint(inpaint(ddim(), IMAGE, HALF, 2, 1), IMAGE, HALF, 2, 1)),
        ("num_resamples", lambda: inpaint(ddim(), IMAGE, HALF, 0, 1)),
        ("jump_length", lambda: inpaint(ddim(), IMAGE, HALF, 2, 0)),
        ("jump_length", lambda: draw(inpaint(ddim(), IMAGE, HALF, 2, 8), SCHEDULE, IMAGE)),
        ("mask", lambda: inpaint(ddim(), IMAGE, 0.5 * HALF, 2, 1)),
        ("mask", lambda: inpaint(ddim(), IMAGE, jnp.ones((2, 5)), 2, 1)),
        ("mask", lambda: inpaint(ddim(), IMAGE, jnp.ones((3, 2, 6)), 2, 1)),
        ("timestep", lambda: until(SCHEDULE, 0.5)),
        ("timestep", lambda: until(SCHEDULE, 9)),
        ("timestep", lambda: until(SCHEDULE, float("nan"))),
        ("timestep", lambda: until(schedules.respace(SCHEDULE, 2), 3)),
        ("fractions", lambda: slerp(IMAGE, IMAGE, jnp.array([0.0, 1.5]))),
        ("strength", lambda: vary(split(0, 2), SCHEDULE[0], IMAGE, DATA(IMAGE, SCHEDULE[0]), 1.1)),
        ("strength", lambda: vary(split(0, 2), SCHEDULE[0], IMAGE, DATA(IMAGE, SCHEDULE[0]), -1.0)),
    ],
)
def test_an_impossible_argument_is_named(field, call):
    with pytest.raises(ConfigError, match=rf"^{field} = .*: must be ") as error:
        call()
    assert "\n" not in str(error.value)

"""Reverse chains of Gaussian data, where every step is linear, against their closed form."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import (
    BETAS,
    Step,
    ancestral_step,
    columns,
    ddim_step,
    gaussian,
    linear_betas,
    moments,
    rows,
)

from diffusion_jax.diffusion import process, samplers, schedules
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.samplers import SAMPLERS
from diffusion_jax.diffusion.samplers.ancestral import PredictorCorrector, ancestral
from diffusion_jax.diffusion.samplers.chain import sample, trajectory
from diffusion_jax.diffusion.samplers.ddim import ddim
from diffusion_jax.diffusion.samplers.edm import Edm
from diffusion_jax.diffusion.samplers.pndm import Plms
from diffusion_jax.errors import ConfigError

VARIANCES = ("beta", "posterior")  # the fixed variances

MEAN, VARIANCE = 0.4, 0.05  # of the data
DATA = gaussian(MEAN, VARIANCE)
SCHEDULE = schedules.cosine(12)
KEY = jax.random.key(3)
BOTH = [(name, num_timesteps) for name in BETAS for num_timesteps in (10, 1000)]


# One name for each sampler class, because several names make the same class.
STEPS = {type(create()): name for name, create in reversed(SAMPLERS.items())}


@pytest.fixture(params=STEPS.values())
def sampler(request):
    return SAMPLERS[request.param]()


def reversed_steps(betas, step_of_row):
    return [step_of_row(row, MEAN, VARIANCE) for row in reversed(rows(betas))]


def ancestral_chain(betas, variance):
    sigma2 = {"beta": lambda row: row.beta, "posterior": lambda row: row.posterior_variance}
    return reversed_steps(
        betas, lambda row, *data: ancestral_step(row, *data, sigma2[variance](row))
    )


def ddim_chain(betas, eta):
    return reversed_steps(betas, lambda row, *data: ddim_step(row, *data, eta))


@partial(jax.jit, static_argnames=("shape", "num_frames"))
def run(schedule, sampler, shape, num_frames=0, key=KEY, x_T=None, indices=None):
    """A trajectory with the exact denoiser, compiled once for all tests with equal shapes."""
    options = {"num_frames": num_frames, "x_T": x_T, "indices": indices}
    return trajectory(key, DATA, schedule, sampler, shape, **options)


MANY = (16, 1024)  # independent samples: all dimensions are alike


CHAINS = [
    (ancestral(variance), lambda b, v=variance: ancestral_chain(b, v)) for variance in VARIANCES
]
CHAINS += [(ddim(eta), lambda b, e=eta: ddim_chain(b, e)) for eta in (0.0, 0.5, 1.0)]
CHAIN_NAMES = [*VARIANCES, "ddim 0", "ddim 0.5", "ddim 1"]
chains = pytest.mark.parametrize(("sampler", "exact_chain"), CHAINS, ids=CHAIN_NAMES)


# --- one step -------------------------------------------------------------------------------


@jax.jit
def every_step(sampler, schedule, x_t):
    """One step from x_t at every row, T first, each with the same keys: [T, ...]."""
    keys, state = jax.random.split(KEY, len(x_t)), sampler.init(x_t, schedule, schedule)

    def step(row, row_prev):
        now = samplers.Step(keys, DATA, state, x_t, row, row_prev)
        return sampler.step(now)[0]

    return jax.vmap(step)(schedule[::-1], schedules.with_terminal_row(schedule)[:-1][::-1])


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("num_timesteps", [10, 1000])
@chains
def test_every_step_is_the_linear_map_of_the_papers(sampler, exact_chain, name, num_timesteps):
    # slope x_t + shift + deviation z, where the same keys give the same z
    betas = BETAS[name](num_timesteps)
    schedule, exact = schedules.from_betas(betas), exact_chain(betas)
    x_t = jnp.broadcast_to(jnp.array([0.0, 1.0, -2.0])[None], (2, 3))
    found = every_step(sampler, schedule, x_t)
    z = np.asarray(samplers.normal(jax.random.split(KEY, 2), x_t), np.float64)
    slope, shift, deviation = np.transpose(exact)[:, :, None, None]
    expected = slope * np.asarray(x_t) + shift + deviation * z
    # Decoding x_0 from eps near x_T divides by sqrt(alpha_bar); the posterior mean multiplies by it
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BETAS)
def test_ddim_with_eta_1_is_ancestral_on_the_full_grid(name):
    schedule = schedules.from_betas(BETAS[name](1000))
    x_t = jax.random.normal(KEY, (2, 3))
    found = every_step(ddim(eta=1.0), schedule, x_t)
    expected = every_step(ancestral("posterior"), schedule, x_t)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_last_ancestral_step_adds_no_noise(variance):
    x_0, states, _ = run(SCHEDULE, ancestral(variance), (3, 2), len(SCHEDULE) + 1)
    # the posterior mean at t = 1 is x_0
    np.testing.assert_allclose(x_0, DATA(states[-2], SCHEDULE[0]).x_0, rtol=1e-6)
    # The step before the last does add noise
    mean = process.posterior_mean(SCHEDULE[1], DATA(states[-3], SCHEDULE[1]).x_0, states[-3])
    assert np.abs(states[-2] - mean).min() > 1e-4


# --- whole chains of Gaussian data ----------------------------------------------------------


def check_moments(x_0, mean, variance):
    """Assert a sample's mean and variance within 4.5 deviations, sqrt(v / n) and v sqrt(2 / n)."""
    n, x_0 = x_0.size, np.asarray(x_0, np.float64)
    assert abs(x_0.mean() - mean) < 4.5 * np.sqrt(variance / n)
    assert abs(x_0.var() / variance - 1) < 4.5 * np.sqrt(2 / n)


@pytest.mark.parametrize(("name", "num_timesteps"), BOTH)
@chains
def test_moments_follow_the_recursion_of_the_chain(sampler, exact_chain, name, num_timesteps):
    betas = BETAS[name](num_timesteps)
    x_0, *_ = run(schedules.from_betas(betas), sampler, MANY)
    check_moments(x_0, *moments(exact_chain(betas)))


@pytest.mark.parametrize("variance", [0.05, 0.25])
@pytest.mark.parametrize("name", BETAS)
def test_the_posterior_variance_falls_short_of_the_data_and_beta_does_not(name, variance):
    # A property of the chain (DDPM section 3.2: the variances bound the entropy), without sampling
    def shortfall(sigma2):
        exact = [ancestral_step(row, 0.0, variance, sigma2(row)) for row in rows(BETAS[name](1000))]
        return 1 - moments(exact[::-1])[1] / variance

    posterior = shortfall(lambda row: row.posterior_variance)
    beta = shortfall(lambda row: row.beta)
    assert 0.005 < posterior < 0.07
    assert -0.01 < beta < 0


@pytest.mark.parametrize("variance", VARIANCES)
def test_moments_of_the_chain_follow_from_its_measured_steps(variance):
    # The slope, shift and deviation of each step are measured, so there is no sampling noise
    betas = linear_betas(1000)
    x_t = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    z = np.asarray(samplers.normal(jax.random.split(KEY, 2), x_t), np.float64)
    found = every_step(ancestral(variance), schedules.from_betas(betas), x_t)
    # three equations x_{t-1} = slope x_t + shift + deviation z for the three unknowns
    left = np.stack([[0, 1, 0], np.ones(3), z[0]], axis=1)
    steps = np.linalg.solve(left, np.asarray(found, np.float64)[:, 0].T).T
    exact = ancestral_chain(betas, variance)
    measured = moments([Step(*step) for step in steps])
    np.testing.assert_allclose(measured, moments(exact), rtol=1e-3)


def test_every_sampler_samples_gaussian_data(sampler):
    # 100 steps of any sampler; the chain of ancestral itself loses 13 % of the variance
    x_0 = np.asarray(run(schedules.cosine(100), sampler, MANY)[0])
    assert abs(x_0.mean() - MEAN) < 0.05 * np.sqrt(VARIANCE)
    assert abs(x_0.var() / VARIANCE - 1) < 0.2


# --- DDIM as a solver of the probability-flow ODE -------------------------------------------


def test_ddim_without_noise_is_a_function_of_x_T():
    x_T = jax.random.normal(KEY, (3, 2))
    first, second = (
        run(SCHEDULE, ddim(eta=0.0), (3, 2), 0, jax.random.key(seed), x_T)[0] for seed in (0, 1)
    )
    np.testing.assert_array_equal(first, second)
    third, *_ = run(SCHEDULE, ddim(eta=0.5), (3, 2), 0, jax.random.key(1), x_T)
    assert np.abs(third - first).min() > 1e-4


def test_ddim_converges_to_the_flow_with_order_1():
    # The flow keeps every quantile of x_t, which is N(sqrt(ab) m, ab c + 1 - ab) at each t
    betas = linear_betas(1000)
    schedule, alpha_bar = schedules.from_betas(betas), columns(betas).alpha_bar[-1]
    x_T = np.linspace(-2, 2, 9).reshape(9, 1)
    scale = np.sqrt(VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar))
    exact = MEAN + scale * (x_T - np.sqrt(alpha_bar) * MEAN)
    num_steps, errors = [50, 100, 200], []
    for n in num_steps:
        x_0, *_ = run(schedules.respace(schedule, n), ddim(), (9, 1), x_T=jnp.float32(x_T))
        errors.append(np.abs(x_0 - exact).max())
    order = -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
    assert 0.85 < order < 1.15, (order, errors)
    assert errors[-1] < 0.02


# --- keys, batches, schedules ---------------------------------------------------------------


def test_an_image_depends_on_the_key_and_its_number_alone(sampler):
    def draw(indices, key=KEY):
        return run(SCHEDULE, sampler, (len(indices), 2), key=key, indices=jnp.array(indices))[0]

    whole = draw(range(8))
    np.testing.assert_array_equal(run(SCHEDULE, sampler, (8, 2))[0], whole)
    for part in ([6, 1, 4], [0, 2, 7]):
        np.testing.assert_allclose(draw(part), whole[jnp.array(part)], rtol=1e-6, atol=1e-7)
    assert len(np.unique(whole)) == whole.size
    assert np.abs(draw(range(8), jax.random.key(4)) - whole).min() > 0


def test_the_noise_of_steps_and_images_is_independent():
    # The noise computed from the states of the chain: x_T and T - 1 draws for each image
    schedule, shape = SCHEDULE, (20, 400)
    _, states, _ = run(schedule, ancestral("beta"), shape, len(schedule) + 1)
    noise = [states[0]]
    for n, row in enumerate([schedule[i] for i in range(len(schedule) - 1, 0, -1)]):
        mean = process.posterior_mean(row, DATA(states[n], row).x_0, states[n])
        noise.append((states[n + 1] - mean) / jnp.sqrt(row.beta))
    noise = np.asarray(jnp.stack(noise), np.float64).reshape(-1, shape[1])
    assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / noise.size)
    # the correlations of 28,680 pairs, each N(0, 1/400)
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlation).max() < 6.5 / np.sqrt(shape[1])


def test_a_given_x_T_is_where_the_chain_starts(sampler):
    x_T = 5 + jax.random.normal(KEY, (3, 2))
    x_0, frames, _ = run(SCHEDULE, sampler, (3, 2), 2, x_T=x_T)
    np.testing.assert_array_equal(frames[0], x_T)
    np.testing.assert_array_equal(frames[1], x_0)


def test_in_respaced_chains_the_network_gets_the_timestep_of_each_noise_level(sampler):
    calls = []

    def predict(x_t, row):
        jax.debug.callback(
            lambda *call: calls.append([float(value) for value in call]), row.timestep, row.log_snr
        )
        return DATA(x_t, row)

    full = schedules.cosine(100)
    draw = jax.jit(lambda rows: sample(KEY, predict, rows, sampler, (4, 3), native=full))
    for spacing in ("trailing", "quadratic"):
        calls.clear()
        short = schedules.respace(full, 7, spacing)
        assert bool(jnp.isfinite(draw(short)).all())
        jax.effects_barrier()
        timestep, log_snr = np.array(calls).T
        # the timestep with this log SNR in the full schedule, interpolated between rows
        known = np.asarray(full.log_snr, np.float64)
        expected = np.interp(-log_snr, -known, np.asarray(full.timestep))
        np.testing.assert_allclose(timestep, expected, atol=0.02)
        assert sampler.goes_off_grid or set(timestep) == set(np.asarray(short.timestep))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_first_row_is_exactly_a_jump_from_x_0(name):
    # At these lengths two ways to compute beta of the first row round differently
    full = schedules.SCHEDULES[name](1000)
    for num_steps in (1, 33, 55, 118, 400, 410, 429, 1000):
        first = schedules.respace(full, num_steps)[0]
        assert first.beta == first.one_minus_alpha_bar
        assert first.alpha == first.alpha_bar


@pytest.mark.parametrize("num_steps", [1, 33])
def test_the_chain_ends_at_the_last_x_0_that_was_predicted(sampler, num_steps):
    # Multistep samplers must not extrapolate over the last step, which has infinite width. With 33
    # of 1000 timesteps its beta rounds differently in two formulas, which made the end NaN.
    chain = schedules.respace(schedules.cosine(1000), num_steps)
    x_0, _, predicted = run(chain, sampler, (3, 2), num_steps + 1)
    # predictor_corrector predicts twice in a step; the last eps of PLMS is a combination
    if not isinstance(sampler, PredictorCorrector | Plms):
        np.testing.assert_allclose(x_0, predicted[-2], rtol=2e-5, atol=1e-6)
    assert bool(jnp.isfinite(x_0).all())


@chains
def test_respaced_chains_follow_their_own_recursion(sampler, exact_chain):
    # the betas of the jumps, from the full chain's alpha_bar in float64
    betas = linear_betas(100)
    short = schedules.respace(schedules.from_betas(betas), 10)
    alpha_bar = columns(betas).alpha_bar[np.int32(short.timestep) - 1]
    jumps = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    mean, variance = moments(exact_chain(jumps))
    check_moments(run(short, sampler, MANY)[0], mean, variance)


def test_a_chain_from_zero_terminal_snr(sampler):
    # x_T has no part of x_0, but decoding v is well defined there
    schedule = schedules.zero_terminal_snr(schedules.cosine(100))
    assert schedule.alpha_bar[-1] == 0

    def predict(x_t, row):
        output = PREDICTIONS["v"].encode(row, DATA(x_t, row), x_t)
        return PREDICTIONS["v"].decode(row, x_t, output)

    if sampler.needs_signal:
        pytest.skip("its sigma is infinite there: refused, see test_main")
    draw = partial(trajectory, KEY, predict, sampler=sampler, shape=(8, 500), num_frames=3)
    x_0, frames, _ = jax.jit(draw)(schedule=schedule)
    assert bool(jnp.isfinite(frames).all())
    assert abs(x_0.mean() - MEAN) < 0.02
    assert abs(x_0.var() / VARIANCE - 1) < 0.25


# --- trajectories ---------------------------------------------------------------------------


def test_frames_are_states_of_the_chain(sampler):
    num_states = len(SCHEDULE) + 1
    x_0, states, _ = map(np.asarray, run(SCHEDULE, sampler, (3, 2), num_states))
    assert states.shape == (num_states, 3, 2)
    np.testing.assert_array_equal(states[-1], x_0)
    none = run(SCHEDULE, sampler, (3, 2), 0)
    np.testing.assert_allclose(none.x_0, x_0, rtol=1e-6)  # another program may round differently
    assert none.x_t.shape == (0, 3, 2)  # no frames are kept unless asked
    num_frames = 5
    again, frames, _ = run(SCHEDULE, sampler, (3, 2), num_frames)
    np.testing.assert_array_equal(again, x_0)
    np.testing.assert_array_equal(frames[0], states[0])
    np.testing.assert_array_equal(frames[-1], x_0)
    # The frames are the states nearest to an even spacing
    which = [(states == frame).all(axis=(1, 2)).argmax() for frame in np.asarray(frames)]
    assert all((states[i] == frame).all() for i, frame in zip(which, np.asarray(frames)))
    even = np.arange(num_frames) * len(SCHEDULE) / (num_frames - 1)
    assert np.abs(which - even).max() <= 0.5


def test_each_state_is_a_step_from_the_state_before():
    # DDIM without noise
    _, states, predicted = run(SCHEDULE, ddim(), (3, 2), len(SCHEDULE) + 1)
    rows_prev = schedules.with_terminal_row(SCHEDULE)[:-1]
    for n, i in enumerate(reversed(range(len(SCHEDULE)))):
        keys = jax.random.split(KEY, 3)
        now = samplers.Step(keys, DATA, (), states[n], SCHEDULE[i], rows_prev[i])
        after, _ = ddim().step(now)
        np.testing.assert_allclose(states[n + 1], after, rtol=1e-5, atol=1e-6)
        x_0 = DATA(states[n], SCHEDULE[i]).x_0
        np.testing.assert_allclose(predicted[n], x_0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(predicted[-1], states[-1])


# --- compilation ----------------------------------------------------------------------------


def test_other_values_compile_nothing_anew(sampler):
    traces = []

    def predict(x_t, row):
        traces.append(())
        return DATA(x_t, row)

    draw = jax.jit(lambda *inputs: sample(*inputs[:1], predict, *inputs[1:], (2, 3)))
    draw(KEY, SCHEDULE, sampler)
    once = len(traces)
    results = [
        draw(jax.random.key(seed), schedules.cosine(12, s=s), other)
        for seed, s, other in [(0, 0.0, sampler), (0, 0.1, sampler), (1, 0.1, sampler)]
    ]
    for leaf in jax.tree.leaves(sampler):
        halved = jax.tree.map(lambda value, of=leaf: value * 0.5 + 0.25, sampler)
        results.append(draw(KEY, SCHEDULE, halved))
        assert isinstance(leaf, float)
    assert len(traces) == once
    assert len({float(result[0, 0]) for result in results[:3]}) == 3
    # With twelve steps the churn of edm is at its limit, so halving it changes nothing
    assert isinstance(sampler, Edm) or len({float(r[0, 0]) for r in results}) == len(results)


def test_no_sampler_is_taken_for_another():
    """Their tree structures differ, although jax compares only the static fields of dataclasses."""
    structures = {type(create()): jax.tree.structure(create()) for create in SAMPLERS.values()}
    for one, other in itertools.combinations(structures, 2):
        assert structures[one] != structures[other], (one, other)


def test_eta_is_a_leaf():
    assert jax.tree.leaves(ddim(eta=0.3)) == [0.3]
    assert jax.tree.leaves(ddim(eta=jnp.float32(0.25))) == [0.25]


def scans(jaxpr):
    """The number of scans and while loops in a jaxpr, including nested ones."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name in ("scan", "while")
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                part = getattr(part, "jaxpr", part)
                count += scans(part) if hasattr(part, "eqns") else 0
    return count


@pytest.mark.parametrize("num_frames", [0, 4])
def test_the_chain_is_one_scan(sampler, num_frames):
    def draw(key, schedule):
        return trajectory(key, DATA, schedule, sampler, (2, 3), num_frames=num_frames)

    assert scans(jax.make_jaxpr(draw)(KEY, SCHEDULE).jaxpr) == 1


@pytest.mark.parametrize("name", ["ancestral", "dpmpp_3m", "pndm"])
def test_memory_does_not_grow_with_the_steps(name):
    sampler = SAMPLERS[name]()
    shape, num_frames = (2, 64, 64), 4

    def temporary(num_timesteps):
        schedule = schedules.linear(num_timesteps)
        draw = partial(trajectory, KEY, DATA, sampler=sampler, shape=shape, num_frames=num_frames)
        compiled = jax.jit(draw).lower(schedule=schedule).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state = 4 * np.prod(shape)
    # A step costs two rows of 8 numbers (the schedule and its reverse), and no array like an image
    assert temporary(500) - temporary(20) < 480 * state / 100


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("variance", lambda: ancestral("beta_tilde")),
        ("variance", lambda: ancestral("")),
        # the prediction has no learned variance
        ("variance", lambda: sample(KEY, DATA, SCHEDULE, ancestral("learned"), (2, 3))),
        ("eta", lambda: ddim(eta=-0.1)),
        ("eta", lambda: ddim(eta=1.5)),
        ("eta", lambda: ddim(eta=float("nan"))),
        ("num_frames", lambda: trajectory(KEY, DATA, SCHEDULE, ddim(), (2, 3), num_frames=1)),
        ("num_frames", lambda: trajectory(KEY, DATA, SCHEDULE, ddim(), (2, 3), num_frames=14)),
        ("num_frames", lambda: trajectory(KEY, DATA, SCHEDULE, ddim(), (2, 3), num_frames=-2)),
    ],
)
def test_an_impossible_argument_is_named(field, call):
    with pytest.raises(ConfigError, match=rf"^{field} = .*: (must be |unknown {field}\b)") as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_argument_of_a_sampler_has_a_default(name):
    assert all(
        parameter.default is not parameter.empty
        for parameter in inspect.signature(SAMPLERS[name]).parameters.values()
    )

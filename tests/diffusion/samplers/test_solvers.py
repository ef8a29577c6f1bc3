"""Samplers as numerical methods: order, statistics, evaluations, agreement with other libraries."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import numpy_solvers
import pytest
from gaussian import gaussian, mixture
from hypothesis import strategies
from numpy_solvers import Node, Problem
from rounding import UNIT
from scipy.integrate import solve_ivp

from diffusion_jax.diffusion import samplers, schedules
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers import SAMPLERS
from diffusion_jax.diffusion.samplers.base import phi, width
from diffusion_jax.diffusion.samplers.chain import invert, sample
from diffusion_jax.diffusion.schedules.families import SCHEDULES
from diffusion_jax.diffusion.schedules.spacings import GRIDS, SPACINGS
from diffusion_jax.errors import ConfigError

KEY = jax.random.key(5)
WEIGHTS, MEANS, VARIANCE = (0.6, 0.4), ((-0.7,), (0.9,)), 0.05
MIXTURE = mixture(WEIGHTS, MEANS, VARIANCE)

# --- orders of convergence ------------------------------------------------------------------

HIGH, LOW = 4.0, -5.0  # log SNR at the end and at the beginning of the flow
STARTS = np.linspace(-2, 2, 9).reshape(9, 1)  # values of x_T


@pytest.fixture(scope="module")
def exact_flow():
    """x_t at the end of the probability flow, from an adaptive solver of order 8 in float64."""

    def slope(u, y):  # dy/du = sigma eps, u = log sigma
        sigma = np.exp(u)
        alpha_bar = 1 / (1 + sigma**2)
        x_t = np.sqrt(alpha_bar) * y[:, None]
        total = alpha_bar * VARIANCE + (1 - alpha_bar)
        gaps = x_t - np.sqrt(alpha_bar) * np.ravel(MEANS)
        log_share = np.log(WEIGHTS) - gaps**2 / (2 * total)
        share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return sigma * np.sqrt(1 - alpha_bar) * (share * gaps).sum(axis=1) / total

    starts = STARTS[:, 0] * np.sqrt(1 + np.exp(-LOW))
    ends = -LOW / 2, -HIGH / 2
    y = solve_ivp(slope, ends, starts, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return y / np.sqrt(1 + np.exp(-HIGH))


@jax.jit
def along(sampler, log_snr, x_T):
    """The end of a chain over a grid of log SNRs, without the step to x_0."""
    rows = schedules.from_log_snr(log_snr, jnp.arange(1.0, len(log_snr) + 1))
    keys = jax.random.split(KEY, len(x_T))

    def step(carry, interval):
        return sampler.step(samplers.Step(keys, MIXTURE, *carry, *interval))[::-1], None

    intervals = rows[1:][::-1], rows[:-1][::-1]
    return jax.lax.scan(step, (sampler.init(x_T, rows, rows), x_T), intervals)[0][1]


# The lowest and highest measured order. The first step of 3M has order 1, which limits its order.
ORDERS = {
    "ddim": (0.9, 1.1),
    "euler": (0.9, 1.1),
    "dpmpp_1s": (0.9, 1.1),
    "heun": (1.9, 2.1),
    "dpmpp_2s": (1.9, 2.1),
    "dpmpp_2m": (1.9, 2.1),
    "plms": (1.9, 2.1),
    "pndm": (1.9, 2.1),
    "dpmpp_3m": (2.6, 3.3),
    "unipc": (2.8, 3.1),
}
STOCHASTIC = ("ancestral", "euler_ancestral", "edm", "dpmpp_2m_sde", "predictor_corrector")


def test_every_sampler_has_an_order_or_is_stochastic():
    assert {*ORDERS, *STOCHASTIC} == set(SAMPLERS)


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence_to_the_exact_flow(exact_flow, name):
    with jax.enable_x64(True):
        num_steps, errors = [40, 80, 160], []
        for n in num_steps:
            found = along(SAMPLERS[name](), jnp.linspace(HIGH, LOW, n + 1), jnp.asarray(STARTS))
            assert found.dtype == jnp.float64
            errors.append(np.abs(np.asarray(found)[:, 0] - exact_flow).max())
    order = -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
    low, high = ORDERS[name]
    assert low < order < high, (order, errors)


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 0.9, 0.999, 1.001, 3.0, 30.0])
def test_phi_is_exact_in_float32(h):
    h = float(np.float32(h))
    with mpmath.workdps(40):
        two = mpmath.expm1(-mpmath.mpf(h)) / h + 1
        three = two / h - mpmath.mpf(1) / 2
        found = phi(jnp.float32(h))
        np.testing.assert_allclose(found, [float(two), float(three)], rtol=5e-7)


# --- steps of papers and other libraries, in float64 numpy -----------------------------------


def k_diffusion_step(sigma, sigma_prev, denoised, x, eta, z):
    """k-diffusion's sample_euler_ancestral (eta = 0: sample_euler) in its coordinates y."""
    up = min(sigma_prev, eta * np.sqrt(sigma_prev**2 * (sigma**2 - sigma_prev**2) / sigma**2))
    down = np.sqrt(sigma_prev**2 - up**2)
    return x + (x - denoised) / sigma * (down - sigma) + up * z


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_euler_steps_are_those_of_k_diffusion(eta):
    schedule = schedules.cosine(20)
    rows = schedules.with_terminal_row(schedule)
    sampler = samplers.euler() if eta == 0 else samplers.euler_ancestral(eta)
    x_t = jnp.linspace(-1.5, 1.5, 6).reshape(2, 3)
    keys = jax.random.split(KEY, 2)
    data = gaussian(0.3, 0.1)
    for i in range(len(schedule)):
        row, row_prev = rows[i + 1], rows[i]
        found, _ = sampler.step(samplers.Step(keys, data, (), x_t, row, row_prev))
        signal, signal_prev = (np.sqrt(float(r.alpha_bar)) for r in (row, row_prev))
        z = np.asarray(samplers.normal(keys, x_t), np.float64)
        denoised = np.asarray(data(x_t, row).x_0, np.float64)
        y = k_diffusion_step(
            float(row.sigma), float(row_prev.sigma), denoised, np.asarray(x_t) / signal, eta, z
        )
        np.testing.assert_allclose(found, signal_prev * y, rtol=2e-5, atol=2e-5)


def test_dpmpp_2m_is_the_papers_formula():
    # DPM-Solver++ algorithm 2 in float64, with the alphas and sigmas of the chain's log SNRs
    schedule = schedules.respace(schedules.linear(1000), 6)
    alpha_bar = 1 / (1 + np.exp(-np.asarray(schedule.log_snr, np.float64)))
    lam = np.log(alpha_bar / (1 - alpha_bar)) / 2
    x_t, data = 0.7, gaussian(0.3, 0.1)
    x, before = x_t, None
    for i in range(5, 0, -1):
        d = float(data(jnp.full((1, 1), x), schedule[i]).x_0[0, 0])
        h = lam[i - 1] - lam[i]
        if before is None:
            mixed = d
        else:
            r = (lam[i] - lam[i + 1]) / h
            mixed = (1 + 1 / (2 * r)) * d - before / (2 * r)
        sigma, sigma_prev = np.sqrt(1 - alpha_bar[i]), np.sqrt(1 - alpha_bar[i - 1])
        x = sigma_prev / sigma * x - np.sqrt(alpha_bar[i - 1]) * np.expm1(-h) * mixed
        before = d
    expected = float(data(jnp.full((1, 1), x), schedule[0]).x_0[0, 0])
    x_T = jnp.full((1, 1), x_t)
    found = sample(KEY, data, schedule, samplers.dpmpp_2m(), (1, 1), x_T=x_T)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)


def posterior_mean_of_mixture(y, sigma):
    """D(y; sigma) = E[x_0 | y] for y = x_0 + sigma z and the mixture above, by Bayes' rule."""
    total = VARIANCE + sigma**2
    gaps = y[..., None] - np.ravel(MEANS)
    log_share = np.log(WEIGHTS) - gaps**2 / (2 * total)
    share = np.exp(log_share - log_share.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    return (share * (np.ravel(MEANS) + VARIANCE / total * gaps)).sum(axis=-1)


def edm_step(y, sigma, sigma_next, num_steps, z):
    """Karras et al. 2022, algorithm 2, lines 4 to 11: churn 40 in [0.05, 50], S_noise 1.003."""
    gamma = min(40 / num_steps, np.sqrt(2) - 1) if 0.05 <= sigma <= 50 else 0.0
    sigma_hat = sigma + gamma * sigma
    y_hat = y + np.sqrt(sigma_hat**2 - sigma**2) * 1.003 * z
    slope = (y_hat - posterior_mean_of_mixture(y_hat, sigma_hat)) / sigma_hat
    y_next = y_hat + (sigma_next - sigma_hat) * slope
    if sigma_next > 0:
        slope_next = (y_next - posterior_mean_of_mixture(y_next, sigma_next)) / sigma_next
        y_next = y_hat + (sigma_next - sigma_hat) * (slope + slope_next) / 2
    return y_next, gamma


@jax.jit
def step_of_mixture(sampler, keys, state, x_t, row, row_prev):
    return sampler.step(samplers.Step(keys, MIXTURE, state, x_t, row, row_prev))


# churn / num_steps is 0.31 for 128 steps; for 20 steps gamma is limited to sqrt(2) - 1
@pytest.mark.parametrize("num_steps", [20, 128])
def test_edm_is_algorithm_2_of_the_paper(num_steps):
    native = schedules.cosine(1000)
    chain = schedules.respace(native, num_steps, "karras", sigma_min=0.02, sigma_max=80.0)
    sampler = samplers.edm(churn=40.0, churn_min=0.05, churn_max=50.0, noise=1.003)
    rows = schedules.with_terminal_row(chain)
    sigma = np.sqrt(np.float64(rows.one_minus_alpha_bar) / np.float64(rows.alpha_bar))
    x_t = jnp.linspace(-2, 2, 32)[:, None]
    y = np.float64(x_t)[:, 0] * np.hypot(1, sigma[-1])
    state, gammas = sampler.init(x_t, chain, native), []
    for i in range(num_steps, 0, -1):
        keys = jax.random.split(jax.random.fold_in(KEY, i), len(x_t))
        z = np.float64(samplers.normal(keys, x_t))[:, 0]
        x_t, state = step_of_mixture(sampler, keys, state, x_t, rows[i], rows[i - 1])
        y, gamma = edm_step(y, sigma[i], sigma[i - 1], num_steps, z)
        gammas.append(gamma)
        expected = y / np.hypot(1, sigma[i - 1])
        np.testing.assert_allclose(x_t[:, 0], expected, rtol=0, atol=1e-4)
    # gamma is 0 where sigma is above 50 or below 0.05
    assert set(gammas) == {0.0, min(40 / num_steps, np.sqrt(2) - 1)}
    assert gammas[0] == gammas[-1] == 0


def test_stochastic_samplers_without_noise_are_deterministic_methods():
    schedule = schedules.respace(schedules.cosine(100), 9, "karras", sigma_max=80.0)
    draw = jax.jit(lambda sampler: sample(KEY, MIXTURE, schedule, sampler, (4, 1)))
    np.testing.assert_array_equal(draw(samplers.dpmpp_2m_sde(0.0)), draw(samplers.dpmpp_2m()))
    np.testing.assert_allclose(draw(samplers.edm(churn=0.0)), draw(samplers.heun()), atol=2e-6)
    np.testing.assert_array_equal(draw(samplers.euler_ancestral(0.0)), draw(samplers.euler()))


# --- rounding: whole chains against the same chains in float64 ---------------------------------

MEAN, SPREAD = 0.4, 0.05  # mean and variance of the data
DATA = gaussian(MEAN, SPREAD)
FULL = {name: create(1000) for name, create in SCHEDULES.items() if name != "from_betas"}
FULL["from_betas"] = schedules.from_betas(1e-4 + 0.02 * np.sin(np.arange(1000)) ** 2)
FULL["zero terminal SNR"] = schedules.zero_terminal_snr(FULL["cosine"])
CHAINS = [*itertools.product(FULL, [*SPACINGS, *GRIDS])]
POINTS = np.linspace(-2, 2, 4)  # values of x_T in every chain
KEYS = jax.random.split(KEY, len(POINTS))


def stack(chains):
    return jax.tree.map(lambda *columns: np.stack(columns), *chains)


@functools.cache
def chains_of(num_steps):
    """The rows of all CHAINS with their row t = 0, [chain, t], and which of the chains exist."""
    chains, exist = [], []
    for name, spacing in CHAINS:
        try:
            chains.append(schedules.respace(FULL[name], num_steps, spacing))
            exist.append(True)
        except ConfigError:  # no grid reaches zero SNR; leading and quadratic need two steps
            chains.append(schedules.respace(FULL[name], num_steps))
            exist.append(False)
    return stack(map(schedules.with_terminal_row, chains)), np.array(exist)


@jax.jit
def step_all(sampler, state, x_t, row, row_prev):
    def step(*carry):
        return sampler.step(samplers.Step(KEYS, DATA, *carry))

    return jax.vmap(step)(state, x_t, row, row_prev)


def ends_of(sampler, chains, native):
    """x_0 of every chain, [chain, point]; all chains take each step at once."""
    t = [jax.tree.map(lambda column, t=t: column[:, t], chains) for t in range(len(chains.beta.T))]
    x_t = np.broadcast_to(np.float32(POINTS)[:, None], (len(CHAINS), len(POINTS), 1))
    rows = jax.tree.map(lambda column: column[:, 1:], chains)
    state = jax.vmap(sampler.init)(x_t, rows, native)
    for row_prev, row in reversed([*itertools.pairwise(t)]):
        x_t, state = step_all(sampler, state, x_t, row, row_prev)
    return np.asarray(x_t)[..., 0]


def exact_ends_of(name, chains, native, num_copies):
    """x_0 in float64, and for ``num_copies`` copies with random errors: [chain, 1 + copy, point].

    In float32 a value that a step computes has fewer than 16 roundings of at most UNIT each. Each
    copy gets a random relative error of that size in every value.
    """
    source = np.random.default_rng(0)
    shape = len(CHAINS), 1 + num_copies, len(POINTS)

    def rounded(value):
        error = 16 * UNIT * source.normal(size=shape)
        return value * (1 + error * (np.arange(shape[1]) > 0)[:, None])

    nodes = []
    for t in reversed(range(chains.beta.shape[1])):
        signal2, noise2 = (
            np.float64(column[:, t])[:, None, None]
            for column in (chains.alpha_bar, chains.one_minus_alpha_bar)
        )
        half_log_snr = (np.log(signal2) - np.log(noise2)) / 2
        nodes.append(Node(np.sqrt(signal2), np.sqrt(noise2), half_log_snr))
    draws = [samplers.fold(KEYS, number) for number in (0, 1)]
    noise = (samplers.normal(keys, jnp.zeros((len(POINTS), 1))) for keys in (KEYS, *draws))
    problem = Problem(
        mean=MEAN,
        variance=SPREAD,
        lowest=np.float64(native.log_snr)[:, -1, None, None] / 2,
        noise=tuple(np.float64(z)[:, 0] for z in noise),
        rounded=rounded,
    )
    return numpy_solvers.SOLVERS[name](problem, nodes, np.broadcast_to(POINTS, shape))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # zero SNR, and chains that do not exist
def test_float32_chains_of_every_schedule_and_spacing_are_as_exact_as_rounding_allows(name):
    """The error is at most the effect of as many random roundings on the method in float64.

    So a method that amplifies rounding (Heun and PNDM with few steps) has a larger bound. The
    errors are at most a fifth of the bound. Widths computed as differences of log SNRs gave errors
    of 7 to 18,000 times the bound in large jumps.
    """
    sampler = SAMPLERS[name]()
    native = stack(FULL[of] for of, _ in CHAINS)
    reaches = (not sampler.needs_signal) | (native.alpha_bar[:, -1] > 0)
    for num_steps in range(1, 21):
        chains, exist = chains_of(num_steps)
        found = ends_of(sampler, chains, native)
        exact = exact_ends_of(name, chains, native, num_copies=8)
        rounding = np.abs(exact[:, 1:] - exact[:, :1]).max(axis=(1, 2))
        error = np.abs(found - exact[:, 0]).max(axis=1)
        lost = exist & reaches & ~(error <= rounding)
        assert not lost.any(), [
            (num_steps, *CHAINS[i], error[i], rounding[i]) for i in np.flatnonzero(lost)
        ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # zero SNR
def test_the_width_of_a_step_is_exact_in_large_jumps_too():
    """It is half the difference of two log SNRs, and infinite only where an SNR is 0 or infinite.

    The columns are rounded, so log SNRs are known to 2 UNIT and r = beta / (1 - alpha_bar) to 4
    UNIT. The relative error of 1 - r is up to 10 times as large, because r is at most 0.9 where
    1 - r is used.
    """
    for num_steps in (1, 2, 3, 4, 5, 10, 20, 200):
        chains, exist = chains_of(num_steps)
        rows = jax.tree.map(lambda column: column[:, 1:], chains)
        found = np.float64(jax.vmap(jax.vmap(width))(rows))
        signal2, noise2 = (np.float64(c) for c in (chains.alpha_bar, chains.one_minus_alpha_bar))
        expected = -np.diff(np.log(signal2) - np.log(noise2)) / 2
        np.testing.assert_allclose(found[exist], expected[exist], rtol=40 * UNIT, atol=4 * UNIT)
        ends = (signal2[:, 1:] == 0) | (noise2[:, :-1] == 0)
        np.testing.assert_array_equal(np.isinf(found), ends)


@pytest.mark.parametrize("num_steps", [3, 4, 5, 10])
def test_the_width_of_the_first_step_of_the_cosine_schedule_is_exact(num_steps):
    """In 40 digits: alpha_bar = cos^2(angle) / cos^2(first angle), with beta_T clipped at 0.999."""
    chain = schedules.respace(schedules.cosine(1000), num_steps)
    with mpmath.workdps(40):
        angles = [(mpmath.mpf(t) / 1000 + 0.008) / 1.008 * mpmath.pi / 2 for t in range(1000)]
        bars = [(mpmath.cos(angle) / mpmath.cos(angles[0])) ** 2 for angle in angles]
        log_snrs = [
            mpmath.log(bar / (1 - bar))
            for bar in (bars[999] / 1000, bars[1000 - round(1000 / num_steps)])
        ]
    np.testing.assert_allclose(width(chain[-1]), float(log_snrs[1] - log_snrs[0]) / 2, rtol=2e-6)


@pytest.mark.parametrize("digits", [-3, 0, 3])
def test_edm_does_not_raise_sigma_above_the_noisiest_row(digits):
    """At the row T no noise is added, even if alpha_bar is off by a few float32 roundings."""
    full = schedules.linear(16)
    alpha_bar = full.alpha_bar.at[-1].multiply(1 + digits * 2 * UNIT)
    chain = dataclasses.replace(full, alpha_bar=alpha_bar)
    draws = [
        sample(key, DATA, chain[-1:], samplers.edm(), (2, 1), x_T=jnp.ones((2, 1)), native=full)
        for key in (KEYS[0], KEYS[1])
    ]
    np.testing.assert_array_equal(draws[0], draws[1])  # no noise is added
    np.testing.assert_allclose(draws[0], DATA(jnp.ones((2, 1)), full[-1]).x_0, rtol=1e-5)


# --- the statistics of whole chains -----------------------------------------------------------

MEANS_2D = np.array([[-0.8, -0.5], [0.7, -0.4], [0.1, 0.8]])
WEIGHTS_2D = np.array([0.5, 0.3, 0.2])
NUM_POINTS = 2000
# enough steps for a method of first order; stochastic samplers need more
NUM_STEPS = dict.fromkeys(ORDERS, 100) | dict.fromkeys(STOCHASTIC, 250)


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, 0 only for equal distributions (Szekely & Rizzo 2013)."""

    def mean_distance(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1).mean()

    n, m = len(x), len(y)
    within = mean_distance(x, x) * n / (n - 1) + mean_distance(y, y) * m / (m - 1)
    return 2 * mean_distance(x, y) - within


def exact_points(seed, n=NUM_POINTS):
    source = np.random.default_rng(seed)
    which = source.choice(len(WEIGHTS_2D), n, p=WEIGHTS_2D)
    return MEANS_2D[which] + np.sqrt(0.02) * source.normal(size=(n, 2))


@jax.jit
def points_of(sampler, chain):
    """Samples of the mixture; two names of one sampler are compiled once."""
    predict = mixture(WEIGHTS_2D, MEANS_2D, 0.02)
    return sample(KEY, predict, chain, sampler, (NUM_POINTS, 2))


@pytest.fixture(scope="module")
def unlike():
    """The energy distances between exact samples: the spread of the distance by chance."""
    return [energy_distance(exact_points(2 * i), exact_points(2 * i + 1)) for i in range(8)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_a_mixture(name, unlike):
    spacing = "log_snr" if name in ORDERS else "trailing"
    chain = schedules.respace(schedules.linear(1000), NUM_STEPS[name], spacing)
    points = np.asarray(points_of(SAMPLERS[name](), chain), np.float64)
    exact = exact_points(99)
    # 0.003 for the discretisation is like moving 1 point in 20 by a standard deviation
    assert energy_distance(points, exact) < np.mean(unlike) + 4 * np.std(unlike) + 0.003
    mean = WEIGHTS_2D @ MEANS_2D
    centred = MEANS_2D - mean
    covariance = (WEIGHTS_2D * centred.T) @ centred + 0.02 * np.eye(2)
    # 4 standard errors of a mean and of a covariance, plus 0.02 and 5 % for the discretisation
    error = 4 * np.sqrt(np.diag(covariance) / NUM_POINTS) + 0.02
    assert (np.abs(points.mean(axis=0) - mean) < error).all()
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    gap = np.abs(np.cov(points.T) - covariance) / scale
    assert gap.max() < 4 * np.sqrt(2 / NUM_POINTS) + 0.05


def test_the_energy_distance_sees_a_wrong_distribution(unlike):
    # Points moved by 0.1 and a weight that is 0.1 too small exceed the tolerance of the test above
    least = np.mean(unlike) + 4 * np.std(unlike) + 0.003
    points, source = exact_points(1), np.random.default_rng(2)
    moved = points - np.sign(points - points.mean(axis=0)) * 0.1
    assert energy_distance(moved, exact_points(99)) > least
    is_first = np.linalg.norm(points - MEANS_2D[0], axis=1) < 0.5
    fewer = points[~is_first | (source.uniform(size=len(points)) < 0.67)]  # 0.5 becomes 0.4
    assert energy_distance(fewer, exact_points(99)) > least


# --- evaluations ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_num_evaluations_is_the_number_of_network_calls(name):
    calls = []

    def predict(x_t, row):
        jax.debug.callback(lambda t: calls.append(float(t)), row.timestep)
        return Prediction(x_t, x_t)

    sampler = SAMPLERS[name]()
    # A single step is a special case for samplers with several evaluations per step
    for num_steps in (5,) if sampler.num_evaluations(5) == 5 else (1, 5):
        calls.clear()
        chain = schedules.respace(schedules.linear(100), num_steps)
        jax.block_until_ready(sample(KEY, predict, chain, sampler, (2, 1)))
        jax.effects_barrier()
        assert len(calls) == sampler.num_evaluations(num_steps)


# --- grids ------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    num_timesteps=strategies.integers(2, 120),
    share=strategies.floats(0, 1),
    spacing=strategies.sampled_from([*SPACINGS, *GRIDS]),
)
def test_a_respaced_chain_of_any_length_is_a_schedule(num_timesteps, share, spacing):
    num_steps = 1 + round(share * (num_timesteps - 1))
    # a single step at t = 1 is refused
    hypothesis.assume(num_steps > 1 or spacing not in ("leading", "quadratic"))
    full = schedules.cosine(num_timesteps)
    short = schedules.respace(full, num_steps, spacing)
    assert len(short) == num_steps
    beta = np.asarray(short.beta)
    assert ((beta > 0) & (beta <= 1)).all()
    assert (np.diff(short.timestep) > 0).all()
    if spacing not in ("leading", "quadratic"):  # these begin below T, as published
        assert short.timestep[-1] == num_timesteps
        np.testing.assert_allclose(short.alpha_bar[-1], full.alpha_bar[-1], rtol=1e-5)
    # The last step ends at x_0
    assert short.alpha_bar_prev[0] == 1
    assert short.beta[0] == short.one_minus_alpha_bar[0]
    product = np.cumprod(1 - beta.astype(np.float64))
    np.testing.assert_allclose(short.one_minus_alpha_bar, 1 - product, rtol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_are_even_in_their_own_coordinate(grid):
    full = schedules.linear(1000)
    rows = schedules.respace(full, 12, grid, rho=5.0, sigma_min=0.02, sigma_max=50.0)
    sigma = np.asarray(rows.sigma, np.float64)
    np.testing.assert_allclose(sigma[[0, -1]], [0.02, 50.0], rtol=2e-6)
    coordinate = {"log_snr": np.log(sigma), "karras": sigma ** (1 / 5)}[grid]
    np.testing.assert_allclose(np.diff(coordinate), np.diff(coordinate).mean(), rtol=1e-4)
    # The network gets the timestep of the full schedule at this noise level
    timestep = np.interp(np.log(sigma), np.log(np.asarray(full.sigma, np.float64)), full.timestep)
    np.testing.assert_allclose(rows.timestep, timestep, rtol=1e-4)
    many = schedules.respace(full, 3000, grid)
    assert (np.diff(np.asarray(many.log_snr)) < 0).all()
    assert bool(jnp.isfinite(sample(KEY, MIXTURE, many[::100], samplers.heun(), (2, 1))).all())


# --- DDIM backwards ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [100, 400])
def test_inversion_followed_by_sampling_returns_the_image(num_steps):
    chain = schedules.respace(schedules.linear(1000), num_steps)
    x_0 = jnp.array([[-1.0], [-0.7], [-0.2], [0.3], [0.9], [1.2]])
    errors = []
    for num_iterations in (1, 5, 20):
        x_T = invert(MIXTURE, chain, x_0, num_iterations)
        again = sample(KEY, MIXTURE, chain, samplers.ddim(0.0), x_0.shape, x_T=x_T)
        errors.append(np.abs(again - x_0).max())
    assert errors[0] > 2 * errors[1]  # the published inversion is not exact
    assert errors[2] < 1e-4


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("snr", lambda: samplers.predictor_corrector(snr=0.0)),
        ("num_corrections", lambda: samplers.predictor_corrector(num_corrections=0)),
        ("variance", lambda: samplers.predictor_corrector(variance="fixed")),
        ("eta", lambda: samplers.euler_ancestral(-0.1)),
        ("eta", lambda: samplers.dpmpp_2m_sde(-0.1)),
        ("churn", lambda: samplers.edm(churn=-1.0)),
        ("churn_min", lambda: samplers.edm(churn_min=-1.0)),
        ("churn_max", lambda: samplers.edm(churn_max=float("nan"))),
        ("churn_min", lambda: samplers.edm(churn_min=2.0, churn_max=1.0)),
        ("noise", lambda: samplers.edm(noise=0.0)),
        ("num_iterations", lambda: invert(MIXTURE, schedules.cosine(3), jnp.zeros((1, 1)), 0)),
        ("rho", lambda: schedules.respace(schedules.cosine(9), 3, "karras", rho=0.0)),
        ("sigma_min", lambda: schedules.respace(schedules.cosine(9), 3, "karras", sigma_min=0.0)),
        ("sigma_max", lambda: schedules.respace(schedules.cosine(9), 3, "karras", sigma_max=1e9)),
        (
            "spacing",
            lambda: schedules.respace(schedules.jsd(9), 3, "log_snr"),
        ),
    ],
)
def test_an_impossible_argument_is_named(field, call):
    with pytest.raises(ConfigError, match=rf"^{field} = .*: (must be |unknown {field}\b)") as error:
        call()
    assert "\n" not in str(error.value)

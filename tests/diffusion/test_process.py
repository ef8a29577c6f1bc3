"""The forward process and the predictions against Bayes' rule and the papers' formulas."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import BETAS, columns, cosine_betas, rows
from rounding import UNIT

from diffusion_jax.diffusion import process, schedules
from diffusion_jax.diffusion.parametrisations import PREDICTIONS, determines_x_0
from diffusion_jax.diffusion.process import Prediction

SHORT = 8
KINDS = sorted(PREDICTIONS)
PAIRS = list(itertools.product(KINDS, KINDS))


def draw(shape, seed=0):
    """x_0 in the range of images, and standard normal noise."""
    of_x_0, of_eps = jax.random.split(jax.random.key(seed))
    return jax.random.uniform(of_x_0, shape, minval=-1.0), jax.random.normal(of_eps, shape)


def truth_at(row, shape=(3, 2), seed=0):
    """A true (x_0, eps) and its x_t at a row."""
    x_0, eps = draw(shape, seed)
    return Prediction(x_0, eps), process.q_sample(row, x_0, eps)


def every_row(schedule):
    return [schedule[i] for i in range(len(schedule))]


# --- q(x_t | x_0) ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETAS)
def test_q_sample_is_the_chain_of_single_steps(name):
    # x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z_t, repeated t times, is linear in x_0 and all z
    betas = BETAS[name](20)
    schedule = schedules.from_betas(betas)
    of_x_0, of_noise = 1.0, np.zeros(0)
    for i, beta in enumerate(betas):
        of_x_0 = np.sqrt(1 - beta) * of_x_0
        of_noise = np.append(np.sqrt(1 - beta) * of_noise, np.sqrt(beta))
        one, zero = jnp.ones(()), jnp.zeros(())
        np.testing.assert_allclose(process.q_sample(schedule[i], one, zero), of_x_0, rtol=1e-6)
        jump = process.q_sample(schedule[i], zero, one)
        np.testing.assert_allclose(jump**2, np.sum(of_noise**2), rtol=1e-6)


@pytest.mark.parametrize("i", [0, 3, SHORT - 1])
def test_q_sample_has_the_moments_of_q(i):
    row, betas = schedules.cosine(SHORT)[i], cosine_betas(SHORT)
    alpha_bar, n = columns(betas).alpha_bar[i], 200_000
    x_t = process.q_sample(row, jnp.full(n, 0.7), jax.random.normal(jax.random.key(i), (n,)))
    x_t, variance = np.asarray(x_t, np.float64), 1 - alpha_bar
    assert abs(x_t.mean() - np.sqrt(alpha_bar) * 0.7) < 5 * np.sqrt(variance / n)
    assert abs(x_t.var() / variance - 1) < 5 * np.sqrt(2 / n)


@pytest.mark.parametrize("num_timesteps", [10, 1000, 4000])
@pytest.mark.parametrize("name", BETAS)
def test_forward_and_posterior_in_float32(name, num_timesteps):
    betas = BETAS[name](num_timesteps)
    schedule, row = schedules.from_betas(betas), columns(betas)
    x_0, eps = draw((num_timesteps,))
    x_t = process.q_sample(schedule, x_0, eps)
    x_0, eps = np.asarray(x_0, np.float64), np.asarray(eps, np.float64)
    exact = np.sqrt(row.alpha_bar) * x_0 + np.sqrt(row.noise) * eps
    np.testing.assert_allclose(x_t, exact, rtol=0, atol=1e-6)
    mean, variance = jax.vmap(process.posterior)(schedule, jnp.float32(x_0), jnp.float32(exact))
    # DDPM eq. 7, in float64
    weight_0 = np.sqrt(row.alpha_bar_prev) * row.beta / row.noise
    weight_t = np.sqrt(row.alpha) * row.noise_prev / row.noise
    np.testing.assert_allclose(mean, weight_0 * x_0 + weight_t * exact, rtol=0, atol=2e-6)
    np.testing.assert_allclose(variance, row.posterior_variance, rtol=2e-6)


# --- q(x_{t-1} | x_t, x_0) ------------------------------------------------------------------


def bayes(row, x_0, x_t):
    """Mean and variance of q(x_{t-1}|x_t,x_0), proportional to q(x_t|x_{t-1}) q(x_{t-1}|x_0)."""
    centre, width = np.sqrt(row.alpha_bar_prev) * x_0, np.sqrt(row.noise_prev)
    x = centre + width * np.linspace(-14, 14, 200_001)
    log_density = -((x_t - np.sqrt(row.alpha) * x) ** 2) / (2 * row.beta)
    log_density -= (x - centre) ** 2 / (2 * width**2)
    density = np.exp(log_density - log_density.max())
    mean = np.sum(x * density) / np.sum(density)
    return mean, np.sum((x - mean) ** 2 * density) / np.sum(density)


BAYES_CASES = [
    (name, num_timesteps, t)
    for name in BETAS
    for num_timesteps in (10, 1000)
    for t in (2, 3, num_timesteps // 2, num_timesteps - 1, num_timesteps)
]
# At t = 2 sqrt(alpha_bar) and sqrt(alpha) differ by the tiny beta_1, which float32 does not show
MISPRINT_CASES = [case for case in BAYES_CASES if case[2] > 2]
MEAN_TOLERANCE = 2e-6  # float32 rounding of means of order 1
POINTS = [(0.8, -1.1), (-0.3, 0.4), (1.0, 2.0)]  # (x_0, z): x_t = sqrt(ab) x_0 + sqrt(1 - ab) z


@pytest.mark.parametrize(("name", "num_timesteps", "t"), BAYES_CASES)
def test_posterior_is_bayes_rule(name, num_timesteps, t):
    betas = BETAS[name](num_timesteps)
    row, exact = schedules.from_betas(betas)[t - 1], rows(betas)[t - 1]
    for x_0, z in POINTS:
        x_t = np.sqrt(exact.alpha_bar) * x_0 + np.sqrt(exact.noise) * z
        mean, variance = process.posterior(row, jnp.float32(x_0), jnp.float32(x_t))
        expected_mean, expected_variance = bayes(exact, x_0, x_t)
        np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=MEAN_TOLERANCE)
        np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)


@pytest.mark.parametrize("name", BETAS)
def test_posterior_of_the_first_step_is_x_0_itself(name):
    # q(x_{t-1} | x_0) at t = 1 is a point mass, and so is its product with any likelihood
    x_0, x_t = draw((5,))
    mean, variance = process.posterior(schedules.from_betas(BETAS[name](10))[0], x_0, x_t)
    np.testing.assert_allclose(mean, x_0, rtol=3e-7)
    assert variance == 0


@pytest.mark.parametrize(("name", "num_timesteps", "t"), MISPRINT_CASES)
def test_bayes_rule_refutes_the_misprinted_posterior_mean(name, num_timesteps, t):
    # The misprint has sqrt(alpha_bar) in place of sqrt(alpha), as in many notes on DDPM
    row = rows(BETAS[name](num_timesteps))[t - 1]
    misses = []
    for x_0, z in POINTS:
        x_t = np.sqrt(row.alpha_bar) * x_0 + np.sqrt(row.noise) * z
        x_0_part = np.sqrt(row.alpha_bar_prev) * row.beta / row.noise * x_0
        misprint = x_0_part + np.sqrt(row.alpha_bar) * row.noise_prev / row.noise * x_t
        misses.append(abs(misprint - bayes(row, x_0, x_t)[0]))
    assert max(misses) > 10 * MEAN_TOLERANCE


# --- predictions ----------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_converting_between_two_predictions_and_back_changes_nothing(first, second, zero_snr):
    schedule = schedules.cosine(SHORT)
    schedule = schedules.zero_terminal_snr(schedule) if zero_snr else schedule
    whole = all(determines_x_0(PREDICTIONS[kind], schedule) for kind in (first, second))
    known = SHORT if whole else SHORT - 1
    for row in every_row(schedule)[:known]:
        truth, x_t = truth_at(row)
        found = truth
        for kind in (first, second, first):
            output = PREDICTIONS[kind].encode(row, found, x_t)
            found = PREDICTIONS[kind].decode(row, x_t, output)
            # Dividing by sqrt(alpha_bar_T) = 0.0062 at the last row magnifies rounding 160-fold
            np.testing.assert_allclose(found.x_0, truth.x_0, rtol=0, atol=2e-4)
            np.testing.assert_allclose(found.eps, truth.eps, rtol=0, atol=2e-5)
            np.testing.assert_allclose(
                process.q_sample(row, found.x_0, found.eps), x_t, rtol=0, atol=2e-6
            )


ZERO_SNR = {
    "nowhere": schedules.cosine(SHORT),
    "at the end": schedules.zero_terminal_snr(schedules.cosine(SHORT)),
    "inside": schedules.from_betas([0.1, 1.0, 0.1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ZERO_SNR)
def test_determines_x_0_says_where_zero_snr_leaves_x_0_undetermined(kind, where):
    schedule = ZERO_SNR[where]
    finite = []
    for row in every_row(schedule):
        truth, x_t = truth_at(row)
        decoded = PREDICTIONS[kind].decode(row, x_t, PREDICTIONS[kind].encode(row, truth, x_t))
        finite.append(bool(jnp.isfinite(decoded.x_0).all()))
    assert all(finite) == determines_x_0(PREDICTIONS[kind], schedule)
    needed = {"nowhere": (), "at the end": ("eps", "score"), "inside": ("eps", "score", "mu")}
    assert all(finite) == (kind not in needed[where])


def velocity(row, x_0, eps):
    """Salimans & Ho 2022, appendix D: dz/dphi of z = cos(phi) x + sin(phi) eps."""
    phi, h = np.arctan2(np.sqrt(row.noise), np.sqrt(row.alpha_bar)), 1e-5
    z = [np.cos(angle) * x_0 + np.sin(angle) * eps for angle in (phi - h, phi + h)]
    return (z[1] - z[0]) / (2 * h)


def score(row, x_0, eps):
    """d/dx_t log N(x_t; sqrt(ab) x_0, 1 - ab) as a central difference."""
    x_t, h = np.sqrt(row.alpha_bar) * x_0 + np.sqrt(row.noise) * eps, 1e-4 * np.sqrt(row.noise)
    log_q = [
        -((x - np.sqrt(row.alpha_bar) * x_0) ** 2) / (2 * row.noise) for x in (x_t - h, x_t + h)
    ]
    return (log_q[1] - log_q[0]) / (2 * h)


def mu(row, x_0, eps):
    """DDPM eq. 11."""
    x_t = np.sqrt(row.alpha_bar) * x_0 + np.sqrt(row.noise) * eps
    return (x_t - row.beta / np.sqrt(row.noise) * eps) / np.sqrt(row.alpha)


PAPERS = {
    "eps": lambda row, x_0, eps: eps,
    "x_0": lambda row, x_0, eps: x_0,
    "v": velocity,
    "mu": mu,
    "score": score,
}


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_papers(kind, name):
    betas = BETAS[name](20)
    schedule = schedules.from_betas(betas)
    for i, exact in enumerate(rows(betas)):
        truth, x_t = truth_at(schedule[i])
        target = PREDICTIONS[kind].encode(schedule[i], truth, x_t)
        x_0, eps = (np.asarray(value, np.float64) for value in truth[:2])
        np.testing.assert_allclose(target, PAPERS[kind](exact, x_0, eps), rtol=1e-5, atol=2e-6)


def test_mu_of_the_first_step_is_x_0():
    row = schedules.cosine(SHORT)[0]
    truth, x_t = truth_at(row)
    np.testing.assert_allclose(PREDICTIONS["mu"].encode(row, truth, x_t), truth.x_0, rtol=3e-7)


@pytest.mark.parametrize("name", BETAS)
def test_v_is_decoded_in_float32_at_every_timestep(name):
    # Decoding v is the only decoding that never divides, so no row of a long schedule loses digits
    schedule = schedules.from_betas(BETAS[name](1000))
    x_0, eps = draw((1000,))
    x_t = process.q_sample(schedule, x_0, eps)
    output = PREDICTIONS["v"].encode(schedule, Prediction(x_0, eps), x_t)
    found = PREDICTIONS["v"].decode(schedule, x_t, output)
    # In units of UNIT hypot(x_0, eps): x_t, v and the decoded values are rounded by 2 each, where
    # x_t and v together count sqrt(2) times as much, and the squared weights add up to 1 within 3.
    # The sum is below 8.
    bound = 8 * UNIT * np.hypot(x_0, eps)
    assert (np.abs(found.x_0 - x_0) <= bound).all()
    assert (np.abs(found.eps - eps) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_under_jit_and_vmap_over_rows_and_examples(kind):
    schedule = schedules.cosine(SHORT)
    x_0, eps = draw((SHORT, 2, 3))

    def there_and_back(row, x_0, eps):
        x_t = process.q_sample(row, x_0, eps)
        output = PREDICTIONS[kind].encode(row, Prediction(x_0, eps), x_t)
        decoded = PREDICTIONS[kind].decode(row, x_t, output)
        return x_t, output, decoded, process.posterior(row, x_0, x_t)

    one_by_one = [there_and_back(schedule[i], x_0[i], eps[i]) for i in range(SHORT)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    found = jax.jit(jax.vmap(there_and_back))(schedule, x_0, eps)
    # Dividing by sqrt(alpha_bar) = 0.0062 at the last row magnifies the rounding of a fused program
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), found, expected)


# --- clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(SHORT))
def test_clip_x_0_keeps_x_t(i):
    row = schedules.cosine(SHORT)[i]
    x_0, eps = draw((50,))
    prediction = Prediction(3 * x_0, eps, jnp.zeros(50))
    x_t = process.q_sample(row, prediction.x_0, prediction.eps)
    clipped = process.clip_x_0(row, x_t, prediction)
    np.testing.assert_array_equal(clipped.x_0, np.clip(prediction.x_0, -1, 1))
    np.testing.assert_allclose(process.q_sample(row, *clipped[:2]), x_t, rtol=0, atol=2e-6)
    inside = np.abs(prediction.x_0) <= 1
    assert 0 < inside.sum() < 50
    # x_0 inside [-1, 1] is unchanged, but eps = (x_t - sqrt(ab) x_0) / sqrt(1 - ab) rounds
    atol = 3e-7 / np.sqrt(row.one_minus_alpha_bar)
    np.testing.assert_allclose(clipped.eps[inside], eps[inside], rtol=1e-6, atol=atol)
    assert clipped.log_variance is prediction.log_variance

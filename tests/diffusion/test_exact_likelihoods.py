"""Likelihoods known to many digits: data of five levels, L_0 in far tails, a Gaussian's flow."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from gaussian import columns, cosine_betas, linear_betas, mixture
from scipy import stats

from diffusion_jax.diffusion import likelihood, process, samplers, schedules
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers.ancestral import ancestral
from diffusion_jax.diffusion.variances import VARIANCES

# --- data of five levels --------------------------------------------------------------------

# x_0 is one of five levels, and E[x_0 | x_t] itself takes the place of a network. Then the bound is
# a sum of integrals over eps. log p(x_0) is known as well, because the density of x_{t-1} is an
# integral over that of x_t. All integrals are sums on a grid.

LAW = np.array([0.1, 0.35, 0.05, 0.3, 0.2])
LEVELS = np.linspace(-1, 1, len(LAW))
NUM_TIMESTEPS = 8
ENTROPY = 2.0639  # bits
KNOWN = {  # for each variance: -E log2 p(x_0) and the bound, in bits
    "posterior": (2.13881, 3.09193),
    "beta": (2.12986, 2.31633),
}
EXACT = mixture(LAW, LEVELS[:, None], 0.0)

POINTS = np.linspace(-7, 7, 701)  # the grid of x_t
EPS = np.linspace(-8, 8, 401)
EPS_MASS = stats.norm.pdf(EPS) / stats.norm.pdf(EPS).sum()
# the ends of the bins: halfway between two levels
EDGES = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])


def expected_x_0(row, t, x_t):
    """E[x_0 | x_t] by Bayes' rule in float64."""
    gaps = x_t[:, None] - np.sqrt(row.alpha_bar[t]) * LEVELS
    log_share = np.log(LAW) - gaps**2 / (2 * row.noise[t])
    share = np.exp(log_share - log_share.max(axis=1, keepdims=True))
    return share @ LEVELS / share.sum(axis=1)


def variances_of_p(row, variance):
    """sigma_t^2; at t = 1 the posterior variance of t = 2, as in the code of DDPM and iDDPM."""
    posterior = row.posterior_variance
    first = posterior[1]
    sigma2 = posterior if variance == "posterior" else row.beta.copy()
    sigma2[0] = first
    return sigma2


def masses(mean, deviation):
    """The mass of N(mean, deviation^2) in the bin of each level, from its smaller tail."""
    normal = stats.norm(mean[:, None], deviation)
    low, high = EDGES[:-1][None], EDGES[1:][None]
    above = mean[:, None] < LEVELS[None]
    return np.where(above, normal.sf(low) - normal.sf(high), normal.cdf(high) - normal.cdf(low))


def nll_by_hand(variance):
    """-E log2 p(x_0) from the papers' formulas in float64, with densities of x_t on a grid."""
    row = columns(cosine_betas(NUM_TIMESTEPS))
    sigma2, step = variances_of_p(row, variance), POINTS[1] - POINTS[0]
    density = stats.norm.pdf(POINTS)
    for t in range(NUM_TIMESTEPS - 1, 0, -1):
        of_x_0 = np.sqrt(row.alpha_bar_prev[t]) * row.beta[t] / row.noise[t]
        of_x_t = np.sqrt(row.alpha[t]) * row.noise_prev[t] / row.noise[t]
        mean = of_x_0 * expected_x_0(row, t, POINTS) + of_x_t * POINTS
        kernel = stats.norm.pdf(POINTS[:, None], mean[None], np.sqrt(sigma2[t]))
        density = kernel @ density * step
    mass = masses(expected_x_0(row, 0, POINTS), np.sqrt(sigma2[0]))
    return -LAW @ np.log2(density @ mass * step)


def bound_by_hand(variance):
    """The bound in bits by the papers' formulas in float64: integrals over eps, sums over x_0."""
    row = columns(cosine_betas(NUM_TIMESTEPS))
    sigma2, posterior = variances_of_p(row, variance), row.posterior_variance
    total = 0.0
    for level, (x_0, probability) in enumerate(zip(LEVELS, LAW)):
        mean, noise = np.sqrt(row.alpha_bar[-1]) * x_0, row.noise[-1]
        nats = (mean**2 + noise - 1 - np.log(noise)) / 2
        for t in range(NUM_TIMESTEPS):
            x_t = np.sqrt(row.alpha_bar[t]) * x_0 + np.sqrt(row.noise[t]) * EPS
            guess = expected_x_0(row, t, x_t)
            if t == 0:
                terms = -np.log(masses(guess, np.sqrt(sigma2[0]))[:, level])
            else:
                gap = np.sqrt(row.alpha_bar_prev[t]) * row.beta[t] / row.noise[t] * (x_0 - guess)
                ratio = posterior[t] / sigma2[t]
                terms = (gap**2 / sigma2[t] + ratio - 1 - np.log(ratio)) / 2
            nats += EPS_MASS @ terms
        total += probability * nats
    return total / np.log(2)


def nll_of_the_chain(variance):
    """-E log2 p(x_0) of the chain that the sampler ``ancestral`` runs, with the library's L_0.

    The results of a step with two keys give its mean and deviation at each point of the grid.
    """
    points, keys = POINTS[:, None], jax.random.split(jax.random.key(0), (2, len(POINTS)))
    with jax.enable_x64(True):
        schedule = schedules.clip_posterior_variance(schedules.cosine(NUM_TIMESTEPS))
        schedule = jax.tree.map(lambda column: jnp.asarray(column, jnp.float64), schedule)
        x_t = jnp.asarray(points)
        noise = np.array([samplers.normal(key, x_t) for key in keys])

        @jax.jit
        def step(keys, row, row_prev):
            now = samplers.Step(keys, EXACT, (), x_t, row, row_prev)
            return ancestral(variance).step(now)[0]

        density, width = stats.norm.pdf(POINTS), POINTS[1] - POINTS[0]
        for t in range(NUM_TIMESTEPS - 1, 0, -1):
            ends = np.array([step(key, schedule[t], schedule[t - 1]) for key in keys])
            deviation = (ends[1] - ends[0]) / (noise[1] - noise[0])
            np.testing.assert_allclose(deviation, np.full_like(deviation, deviation[0]), rtol=1e-6)
            mean = (ends - deviation * noise).mean(axis=0)
            kernel = stats.norm.pdf(points, mean.T, deviation.T)
            density = kernel @ density * width
        first = schedule[0]
        mean = EXACT(x_t, first).x_0
        log_variance = VARIANCES[variance].log_variance(first, None)
        decode = functools.partial(likelihood.decoder_log_likelihood, levels=len(LAW))
        log_mass = jax.vmap(decode, (0, None, None))(jnp.asarray(LEVELS), mean, log_variance)
        probabilities = np.exp(log_mass)[:, :, 0] @ density * width
    return -LAW @ np.log2(probabilities)


def bound_of_the_terms(variance):
    """The library's terms in float32, as an evaluation computes them."""
    x_0 = jnp.float32(np.repeat(LEVELS, len(EPS)))[:, None]
    eps = jnp.float32(np.tile(EPS, len(LEVELS)))[:, None]
    mass = np.outer(LAW, EPS_MASS).ravel()

    @jax.jit
    def of_schedule(schedule):
        def term(row):
            guess = EXACT(process.q_sample(row, x_0, eps), row).x_0
            log_variance = VARIANCES[variance].log_variance(row, None)
            return likelihood.variational_term(row, x_0, guess, log_variance, len(LAW))

        clipped = schedules.clip_posterior_variance(schedule)
        return jax.lax.map(term, clipped), likelihood.prior_term(schedule[-1], x_0)

    terms, of_prior = of_schedule(schedules.cosine(NUM_TIMESTEPS))
    total = np.float64(terms)[..., 0].sum(axis=0) + np.float64(of_prior)[:, 0]
    return mass @ total / np.log(2)


@pytest.mark.parametrize("variance", KNOWN)
def test_the_negative_log_likelihood_of_five_levels(variance):
    known, _ = KNOWN[variance]
    found = nll_of_the_chain(variance)
    np.testing.assert_allclose(found, nll_by_hand(variance), rtol=1e-7)
    assert abs(found - known) < 5e-6


@pytest.mark.parametrize("variance", KNOWN)
def test_the_bound_of_five_levels(variance):
    _, known = KNOWN[variance]
    found = bound_of_the_terms(variance)
    np.testing.assert_allclose(found, bound_by_hand(variance), rtol=1e-6)
    assert abs(found - known) < 6e-6  # half a unit of the last digit, and float32


@pytest.mark.parametrize("variance", KNOWN)
def test_entropy_negative_log_likelihood_and_bound_are_in_this_order(variance):
    entropy = -LAW @ np.log2(LAW)
    assert abs(entropy - ENTROPY) < 5e-5
    assert entropy < nll_by_hand(variance) < bound_of_the_terms(variance)


# --- L_0 against 40 digits ------------------------------------------------------------------


def log_mass(x_0, mean, deviation, levels):
    """log of the mass of N(mean, deviation^2) in the inner bin of x_0, to 40 digits."""
    with mpmath.workdps(40):
        x_0, mean, deviation = (mpmath.mpf(float(value)) for value in (x_0, mean, deviation))
        half = mpmath.mpf(1) / (levels - 1)
        # Both ends of the bin are on one side of the mean, so erfc of that tail has all digits
        ends = [(abs(x_0 - mean) + sign * half) / deviation for sign in (-1, 1)]
        low, high = (mpmath.erfc(end / mpmath.sqrt(2)) / 2 for end in ends)
        return float(mpmath.log(low - high))


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(("bins", "known"), [(5, -16.9270), (25.5, -445.6195)])
def test_l_0_has_its_digits_in_the_far_tails(bins, known, side):
    levels, x_0, deviation = 256, 0.502, 0.0066
    mean, log_variance = x_0 + side * bins * 2 / (levels - 1), 2 * np.log(deviation)
    exact = log_mass(x_0, mean, deviation, levels)
    assert abs(exact - known) < 5e-5
    with jax.enable_x64(True):
        found = likelihood.decoder_log_likelihood(
            jnp.float64(x_0), jnp.float64(mean), jnp.float64(log_variance), levels
        )
        np.testing.assert_allclose(found, exact, rtol=1e-12)
    single = [np.float32(value) for value in (x_0, mean, log_variance)]
    found = likelihood.decoder_log_likelihood(*map(jnp.asarray, single), levels)
    # Compare at the rounded float32 inputs: rounding the inputs is not an error of L_0
    rounded = np.exp(np.float64(single[2]) / 2)
    np.testing.assert_allclose(found, log_mass(*single[:2], rounded, levels), rtol=2e-6)


# --- the flow of a correlated Gaussian ------------------------------------------------------

MEAN = np.array([0.3, -0.4, 0.1])
FACTOR = np.array([[0.6, 0.0, 0.0], [0.45, 0.2, 0.0], [-0.2, 0.3, 0.25]])
COVARIANCE = FACTOR @ FACTOR.T


def predict(x_t, row):
    """The prediction of eps from the score of N(sqrt(ab) m, ab C + (1 - ab) I)."""
    total = row.alpha_bar * COVARIANCE + row.one_minus_alpha_bar * np.eye(3)
    centred = (x_t - (jnp.sqrt(row.alpha_bar) * MEAN)[None]) @ jnp.linalg.inv(total)
    eps = jnp.sqrt(row.one_minus_alpha_bar) * centred
    return Prediction(x_0=process.x_0_of_eps(row, x_t, eps), eps=eps)


@functools.partial(jax.jit, static_argnames="divergence")
def flow(schedule, keys, x_0, divergence):
    options = {"num_steps": 120, "solver": "rk4", "divergence": divergence}
    return likelihood.flow_log_likelihood(predict, schedule, keys, x_0, **options)


def flow_by_hand(alpha_bar, x_0):
    """The exact log p(x_0) of the flow and the matrix log J of its Jacobian J, in float64.

    Along an eigenvector of C with eigenvalue c, y - m grows as sqrt(c + sigma^2).
    """
    first, last = ((1 - ab) / ab for ab in (alpha_bar[0], alpha_bar[-1]))  # sigma^2
    eigenvalues, vectors = np.linalg.eigh(COVARIANCE)
    log_growth = np.log((eigenvalues + last) / (eigenvalues + first)) / 2
    y = MEAN + (x_0 - MEAN) @ vectors * np.exp(log_growth) @ vectors.T
    x_T = np.sqrt(alpha_bar[-1]) * y
    density = stats.norm.logpdf(x_T).sum(axis=1) + 1.5 * np.log(alpha_bar[-1])
    return density + log_growth.sum(), vectors * log_growth @ vectors.T


@pytest.fixture(scope="module")
def points():
    draws = np.random.default_rng(0)
    return MEAN + draws.standard_normal((6, 3)) @ FACTOR.T


@pytest.mark.parametrize(
    ("betas", "is_noise_at_last"), [(cosine_betas(100), True), (linear_betas(100), False)]
)
def test_the_flow_of_a_correlated_gaussian(betas, is_noise_at_last, points):
    """The density is that of the flow; where q(x_T) is N(0, I) it is also the density of the data.

    On the linear schedule with T = 100, q(x_T) is not N(0, I).
    """
    alpha_bar = columns(betas).alpha_bar
    keys = jax.random.split(jax.random.key(0), len(points))
    found = flow(schedules.from_betas(betas), keys, jnp.float32(points), "exact")
    expected, _ = flow_by_hand(alpha_bar, points)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    # the density of the data with the noise of the first row
    noisy = COVARIANCE + (1 / alpha_bar[0] - 1) * np.eye(3)
    density = stats.multivariate_normal(MEAN, noisy).logpdf(points)
    assert (np.abs(expected - density).max() < 1e-3) == is_noise_at_last


def test_a_probe_of_signs_adds_the_correlations_of_the_flow(points):
    """A probe z gives z . log(J) z in place of tr log(J); the mean over all z is the trace."""
    betas = cosine_betas(100)
    keys = jax.random.split(jax.random.key(1), 64)
    x_0 = np.broadcast_to(points[0], (64, 3))
    found = flow(schedules.from_betas(betas), keys, jnp.float32(x_0), "hutchinson")
    exact, log_jacobian = flow_by_hand(columns(betas).alpha_bar, points[:1])
    signs = np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])
    added = np.einsum("zi,ij,zj->z", signs, log_jacobian, signs) - np.trace(log_jacobian)
    assert np.abs(added).min() > 0.05
    assert abs(added.mean()) < 1e-12
    gaps = np.abs(np.float64(found)[:, None] - (exact + added)[None])
    assert gaps.min(axis=1).max() < 2e-4
    assert set(gaps.argmin(axis=1)) == {0, 1, 2, 3}

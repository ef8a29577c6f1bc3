"""The bound and the probability flow against closed forms, quadrature and iDDPM's formulas."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from gaussian import BETAS, columns, cosine_betas, gaussian, linear_betas, mixture
from rounding import UNIT
from scipy import stats

from diffusion_jax.diffusion import likelihood, losses, process, schedules
from diffusion_jax.diffusion.likelihood import DIVERGENCES, SOLVERS, decoder_log_likelihood
from diffusion_jax.diffusion.losses import Examples, LossInputs, NoisedExample, Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS, determines_x_0
from diffusion_jax.diffusion.schedules.families import SCHEDULES
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS, TimestepSampler
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.errors import ConfigError
from diffusion_jax.models import create_model

MEAN, VARIANCE = 0.3, 0.2
ENTROPY = np.log(2 * np.pi * np.e * VARIANCE) / 2  # nats
LN2 = np.log(2)

# --- the formulas of iDDPM, in float64 ------------------------------------------------------


def decoder(x_0, mean, variance, levels):
    """DDPM eq. 13: the mass of the bin of x_0, by the normal distribution function."""
    normal = stats.norm(mean, np.sqrt(variance))
    low = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / (levels - 1))
    high = np.where(x_0 > 0.999, np.inf, x_0 + 1 / (levels - 1))
    # Use the tail that is smaller, so that the difference keeps its digits
    upper = x_0 > mean
    with np.errstate(divide="ignore"):
        return np.log(
            np.where(upper, normal.sf(low) - normal.sf(high), normal.cdf(high) - normal.cdf(low))
        )


def normal_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL of two Gaussians in terms of their log variances, as in the code of iDDPM."""
    gap = log_variance_2 - log_variance_1
    return (gap - 1 + np.exp(-gap) + (mean_1 - mean_2) ** 2 * np.exp(-log_variance_2)) / 2


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("levels", [17, 256])
def test_terms_are_those_of_iddpm(name, variance, levels):
    """At every t, random data, predictions and variances give iDDPM's term in bits/dim."""
    betas = BETAS[name](200)
    row, schedule = columns(betas), schedules.from_betas(betas)
    draws = np.random.default_rng(0)
    x_0 = 2 * draws.integers(0, levels, (200, 6)) / (levels - 1) - 1
    x_0[0, :2] = -1, 1
    guess = np.clip(x_0 + 0.02 * draws.standard_normal(x_0.shape), -1, 1)
    x_t = draws.standard_normal(x_0.shape)
    output = draws.uniform(-1, 1, x_0.shape)

    posterior = row.posterior_variance
    posterior[0] = posterior[1]  # as iDDPM clips the log variance at t = 1
    by_row = {name: column[:, None] for name, column in row._asdict().items()}
    log_beta, log_posterior = np.log(by_row["beta"]), np.log(posterior)[:, None]
    f = (output + 1) / 2
    fixed_large = log_beta.copy()
    fixed_large[0] = log_posterior[1]  # "for a better decoder log likelihood", says its code
    log_variance = {
        "beta": fixed_large,
        "posterior": log_posterior,
        "learned_range": f * log_beta + (1 - f) * log_posterior,
        "learned": output,
    }[variance]

    def mean(x_0):
        of_x_0 = np.sqrt(by_row["alpha_bar_prev"]) * by_row["beta"] / row.noise[:, None]
        of_x_t = np.sqrt(by_row["alpha"]) * row.noise_prev[:, None] / row.noise[:, None]
        return of_x_0 * x_0 + of_x_t * x_t

    expected = normal_kl(mean(x_0), log_posterior, mean(guess), log_variance)
    expected[0] = -decoder(x_0, mean(guess), np.exp(log_variance), levels)[0]
    expected = expected.mean(axis=1) / LN2

    def term(row, x_0, guess, output):
        log_variance = VARIANCES[variance].log_variance(row, output)
        nats = likelihood.variational_term(row, x_0, guess, log_variance, levels)
        return likelihood.bits(jnp.mean(nats))

    arrays = (jnp.asarray(a, jnp.float32) for a in (x_0, guess, output))
    found = jax.jit(jax.vmap(term))(schedules.clip_posterior_variance(schedule), *arrays)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BETAS)
def test_the_prior_term_is_that_of_iddpm(name):
    for num_timesteps in (100, 1000):
        row = columns(BETAS[name](num_timesteps))
        x_0 = np.linspace(-1, 1, 9)
        alpha_bar = row.alpha_bar[-1]
        expected = normal_kl(np.sqrt(alpha_bar) * x_0, np.log(1 - alpha_bar), 0, 0)
        last = schedules.from_betas(BETAS[name](num_timesteps))[-1]
        found = likelihood.prior_term(last, jnp.asarray(x_0, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1e-3, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("num_timesteps", [1, 2, 9])
def test_the_prior_term_is_exact_for_any_amount_of_noise(beta, num_timesteps):
    """It agrees with 40 digits, from almost no noise at T to almost pure noise."""
    last = schedules.constant(num_timesteps, beta)[-1]
    with mpmath.workdps(40):
        alpha_bar = (1 - mpmath.mpf(beta)) ** num_timesteps
        for x_0 in (0.0, 0.5, 1.0):
            expected = (alpha_bar * (x_0**2 - 1) - mpmath.log(1 - alpha_bar)) / 2
            found = likelihood.prior_term(last, jnp.float32(x_0))
            # alpha_bar itself is rounded; at x_0 = 0 the term is about alpha_bar^2 / 4
            allowed = 4 * UNIT * float(alpha_bar) + 1e-6 * float(expected)
            np.testing.assert_allclose(found, float(expected), rtol=0, atol=allowed)
            gradient = jax.grad(lambda x_0: likelihood.prior_term(last, x_0))(jnp.float32(x_0))
            np.testing.assert_allclose(gradient, float(alpha_bar) * x_0, rtol=1e-6)


@pytest.mark.parametrize("deviation", [1e-3, 0.01, 0.3, 10.0])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoder_at_any_distance(deviation, levels):
    """The bins sum to 1; far from the mean L_0 keeps its digits and its gradient is finite."""
    x_0 = 2 * np.arange(levels) / (levels - 1) - 1
    of_levels = functools.partial(decoder_log_likelihood, levels=levels)
    decode, differentiate = jax.jit(of_levels), jax.jit(jax.jacfwd(of_levels, argnums=1))
    for mean in (-3.0, -1.0, 0.123, 0.9):
        log_variance = jnp.float32(2 * np.log(deviation))
        found = decode(jnp.float32(x_0), jnp.float32(mean), log_variance)
        with np.errstate(divide="ignore"):
            expected = decoder(x_0, mean, deviation**2, levels)
        close = expected > -80  # below, scipy's difference of tails has no digits either
        # The mass of a bin that is small against sigma is a difference that loses digits
        np.testing.assert_allclose(found[close], expected[close], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(np.exp(np.float64(found)).sum(), 1, atol=2e-3)
        gradient = differentiate(jnp.float32(x_0), jnp.float32(mean), log_variance)
        assert np.isfinite(gradient).all()


# --- Gaussian data --------------------------------------------------------------------------

# x_0 and eps at the nodes of a Gauss-Hermite rule, so that an expectation is a weighted sum
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
X_0 = MEAN + np.sqrt(VARIANCE) * np.repeat(NODES, len(NODES))
EPS = np.tile(NODES, len(NODES))
WEIGHT = np.outer(WEIGHTS, WEIGHTS).ravel()


def exact_log_variance(row):
    """The log variance of q(x_{t-1} | x_t): posterior variance plus the spread of x_0 given x_t."""
    of_x_0 = (
        VARIANCE * row.one_minus_alpha_bar / (row.alpha_bar * VARIANCE + row.one_minus_alpha_bar)
    )
    gain = PREDICTIONS["mu"].gain(row)
    is_first = row.one_minus_alpha_bar_prev == 0
    return jnp.log(jnp.where(is_first, of_x_0, row.posterior_variance + gain**2 * of_x_0))


def expected_bound(
    schedule, predict, log_variance, x_0=X_0, eps=EPS, weight=WEIGHT, levels=None, prior=True
):
    """The bound in nats per dimension, with its expectation by quadrature."""
    x_0, eps, weight = (jnp.asarray(a, jnp.float32) for a in (x_0, eps, weight))

    @jax.jit
    def total(schedule):
        def term(row):
            x_t = process.q_sample(row, x_0, eps)
            guess = predict(x_t, row).x_0
            return weight @ likelihood.variational_term(row, x_0, guess, log_variance(row), levels)

        clipped = schedules.clip_posterior_variance(schedule)
        return jax.lax.map(term, clipped), weight @ likelihood.prior_term(schedule[-1], x_0)

    terms, of_prior = total(schedule)
    return np.float64(terms).sum() + prior * np.float64(of_prior)


def marginal_kl(alpha_bar):
    """KL(q(x_T) || N(0, 1)) of the Gaussian data: the part of L_T that no network can avoid."""
    variance = alpha_bar * VARIANCE + 1 - alpha_bar
    return (variance + alpha_bar * MEAN**2 - 1 - np.log(variance)) / 2


CASES = [("cosine", 10), ("cosine", 100), ("cosine", 1000), ("linear", 100), ("linear", 1000)]


@pytest.mark.parametrize(("name", "num_timesteps"), CASES)
def test_the_bound_of_the_exact_chain_is_the_entropy(name, num_timesteps):
    """To 1e-3 bits the bound is the entropy plus KL(q(x_T) || N(0, 1)), whatever T is."""
    betas = BETAS[name](num_timesteps)
    expected = ENTROPY + marginal_kl(columns(betas).alpha_bar[-1])
    schedule, data = schedules.from_betas(betas), gaussian(MEAN, VARIANCE)
    assert abs(expected_bound(schedule, data, exact_log_variance) - expected) / LN2 < 1e-3


def _next(schedule, row):
    """The next row, which a network would get if its timestep were off by one."""
    position = jnp.minimum(row.timestep.astype(int), len(schedule) - 1)
    return schedule[position]


@pytest.mark.parametrize("mistake", ["no L_T", "a wrong prior", "a shifted timestep", "a variance"])
def test_a_mistake_in_the_bound_shows(mistake, monkeypatch):
    """Each mistake moves the bound by more than five times the tolerance of the test above."""
    betas = linear_betas(100)
    schedule, data = schedules.from_betas(betas), gaussian(MEAN, VARIANCE)
    expected = ENTROPY + marginal_kl(columns(betas).alpha_bar[-1])
    predict, log_variance = data, exact_log_variance
    if mistake == "a shifted timestep":
        predict = lambda x_t, row: data(x_t, _next(schedule, row))  # noqa: E731
    if mistake == "a variance":
        log_variance = VARIANCES["beta"].log_variance
        log_variance = functools.partial(log_variance, output=None)
    if mistake == "a wrong prior":  # without the share of x_0 in x_T

        def wrong(row, x_0):
            return -(row.alpha_bar + jnp.log1p(-row.alpha_bar)) / 2 + 0 * x_0

        monkeypatch.setattr(likelihood, "prior_term", wrong)
    found = expected_bound(schedule, predict, log_variance, prior=mistake != "no L_T")
    assert abs(found - expected) / LN2 > 5e-3


def quantised(levels):
    """Gaussian data rounded to levels, with nodes for eps: ((x_0, eps, weight), entropy)."""
    values = 2 * np.arange(levels) / (levels - 1) - 1
    normal = stats.norm(MEAN, np.sqrt(VARIANCE))
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    mass = np.diff(normal.cdf(edges))
    grid = np.repeat(values, len(NODES)), np.tile(NODES, levels), np.outer(mass, WEIGHTS).ravel()
    return grid, -np.sum(mass * np.log(mass))


@pytest.mark.parametrize("num_timesteps", [100, 1000, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_the_bound_at_fixed_variance_is_its_quadrature(num_timesteps, variance):
    """It agrees with the papers' formulas in float64, and is well above the entropy."""
    levels, betas = 256, cosine_betas(num_timesteps)
    (x_0, eps, weight), entropy = quantised(levels)
    row = columns(betas)
    posterior = row.posterior_variance
    posterior[0] = posterior[1]
    total = weight @ normal_kl(np.sqrt(row.alpha_bar[-1]) * x_0, np.log(row.noise[-1]), 0, 0)
    for t in range(num_timesteps):
        signal, noise = np.sqrt(row.alpha_bar[t]), row.noise[t]
        x_t = signal * x_0 + np.sqrt(noise) * eps
        share = signal * VARIANCE / (signal**2 * VARIANCE + noise)
        guess = MEAN + share * (x_t - signal * MEAN)
        sigma2 = {"beta": betas if t else posterior, "posterior": posterior}[variance][t]
        if t == 0:
            total -= weight @ decoder(x_0, guess, sigma2, levels)
            continue
        of_x_0 = np.sqrt(row.alpha_bar_prev[t]) * betas[t] / noise
        total += weight @ normal_kl(
            of_x_0 * x_0, np.log(posterior[t]), of_x_0 * guess, np.log(sigma2)
        )
    log_variance = functools.partial(VARIANCES[variance].log_variance, output=None)
    schedule, data = schedules.from_betas(betas), gaussian(MEAN, VARIANCE)
    found = expected_bound(schedule, data, log_variance, x_0, eps, weight, levels)
    np.testing.assert_allclose(found, total, rtol=2e-5)
    excess = (found - entropy) / LN2
    # The excess in bits by quadrature at T = 100, 1000, 4000: beta~ 1.28, 0.90, 0.75;
    # beta 0.25, 0.32, 0.28
    assert excess > {"beta": 0.2, "posterior": 0.7}[variance]


def test_between_fixed_ends_the_excess_falls_as_1_over_t():
    """The sum of L_{t-1} is a Riemann sum of the MMSE over the SNR (Kingma et al. 2021, VDM)."""
    ends, excess, lengths = (6.0, -6.0), [], [32, 64, 128, 256, 512]
    low, high = np.exp(ends[1]), np.exp(ends[0])
    # half the integral of the MMSE c / (1 + c snr) over the SNR
    limit = (np.log1p(VARIANCE * high) - np.log1p(VARIANCE * low)) / 2
    data = gaussian(MEAN, VARIANCE)
    log_variance = functools.partial(VARIANCES["posterior"].log_variance, output=None)
    for num_timesteps in lengths:
        log_snr = np.linspace(*ends, num_timesteps)
        schedule = schedules.from_log_snr(log_snr, np.arange(1.0, num_timesteps + 1))

        def terms(row):
            x_t = process.q_sample(row, jnp.float32(X_0), jnp.float32(EPS))
            guess = data(x_t, row).x_0
            nats = likelihood.variational_term(
                row, jnp.float32(X_0), guess, log_variance(row), None
            )
            return jnp.float32(WEIGHT) @ nats

        clipped = schedules.clip_posterior_variance(schedule)
        middle = np.float64(jax.lax.map(terms, clipped))[1:].sum()
        excess.append(middle - limit)
    rate = -np.polyfit(np.log(lengths), np.log(excess), 1)[0]
    assert abs(rate - 1) < 0.05


# --- the probability flow -------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("solver", "num_steps"), [("heun", 1200), ("rk4", 100)])
def test_the_flow_of_a_gaussian_has_its_density(solver, num_steps, divergence):
    """To 1e-3 bits/dim. One probe is exact here because the Jacobian is a multiple of I."""
    schedule = schedules.cosine(1000)
    x_0 = MEAN + np.sqrt(VARIANCE) * np.random.default_rng(0).standard_normal((5, 3))
    found = likelihood.flow_log_likelihood(
        gaussian(MEAN, VARIANCE),
        schedule,
        jax.random.split(jax.random.key(0), 5),
        jnp.asarray(x_0, jnp.float32),
        num_steps=num_steps,
        solver=solver,
        divergence=divergence,
    )
    sigma2 = float(schedule.sigma[0]) ** 2  # the flow begins at row t = 1
    expected = stats.norm(MEAN, np.sqrt(VARIANCE + sigma2)).logpdf(x_0).sum(axis=1)
    assert np.abs(np.float64(found) - expected).max() / 3 / LN2 < 1e-3


def test_the_flow_of_a_mixture_has_its_density():
    means, weights, variance = np.array([[-0.6, 0.0], [0.5, 0.4]]), np.array([0.3, 0.7]), 0.03
    schedule, source = schedules.cosine(1000), np.random.default_rng(0)
    kind = source.choice(2, 6, p=weights)
    x_0 = means[kind] + np.sqrt(variance) * source.standard_normal((6, 2))
    found = likelihood.flow_log_likelihood(
        mixture(weights, means, variance),
        schedule,
        jax.random.split(jax.random.key(0), 6),
        jnp.asarray(x_0, jnp.float32),
        num_steps=200,
        solver="rk4",
        divergence="exact",
    )
    total = variance + float(schedule.sigma[0]) ** 2
    squares = np.sum((x_0[:, None] - means) ** 2, axis=-1)
    expected = np.log(np.exp(-squares / 2 / total) @ weights / (2 * np.pi * total))
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4)])
def test_solvers_have_their_order(solver, order):
    """The error falls with that power of the step, in float64 between log SNR 6 and -6."""
    with jax.enable_x64(True):
        steps = np.array([8, 16, 32, 64] if order == 2 else [6, 12, 24, 48])
        fine = schedules.from_log_snr(np.linspace(6, -6, 4001), np.arange(1.0, 4002.0))
        schedule = jax.tree.map(lambda column: jnp.asarray(column, jnp.float64), fine)
        x_0 = jnp.array([[0.7], [-0.4]], jnp.float64)
        inputs = gaussian(MEAN, VARIANCE), schedule, jax.random.split(jax.random.key(0), 2), x_0
        flow = functools.partial(likelihood.flow_log_likelihood, solver=solver, divergence="exact")
        found = [np.float64(flow(*inputs, num_steps=int(n))) for n in (*steps, 1000)]
    errors = [np.abs(one - found[-1]).max() for one in found[:-1]]
    rate = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(rate - order) < 0.3


def test_hutchinson_is_unbiased():
    """For a general Jacobian the mean over many probes is the trace."""
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)), jnp.float32)
    y = jnp.ones((2000, 4))
    probes = jax.random.rademacher(jax.random.key(0), y.shape, y.dtype)
    value, traces = likelihood.DIVERGENCES["hutchinson"](lambda y: jnp.sin(y @ matrix), y, probes)
    _, exact = likelihood.DIVERGENCES["exact"](lambda y: jnp.sin(y @ matrix), y[:1], probes[:1])
    np.testing.assert_allclose(value[0], np.sin(np.ones(4) @ np.float64(matrix)), rtol=1e-4)
    expected = np.sum(np.cos(np.ones(4) @ np.float64(matrix)) * np.diag(matrix))
    np.testing.assert_allclose(exact, [expected], rtol=1e-4)
    assert abs(np.mean(traces) - expected) < 5 * np.std(traces) / np.sqrt(len(traces))


def test_dequantised_pixels_have_the_bits_of_their_levels():
    """A uniform density gives log2(levels) bits, and dequantisation noise is uniform in a bin."""
    levels, dims = 17, 3
    density = -np.log(2 + 2 / (levels - 1)) * dims  # over [-1 - half a bin, 1 + half a bin]
    found = likelihood.bits_per_dim(jnp.float32(density), dims, levels)
    np.testing.assert_allclose(found, np.log2(levels), rtol=1e-6)
    noise = likelihood.dequantise(jax.random.key(0), jnp.zeros(100_000), levels)
    assert np.abs(noise).max() <= 1 / (levels - 1)
    np.testing.assert_allclose(np.var(noise), (2 / (levels - 1)) ** 2 / 12, rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_steps": 0}, "num_steps = 0: must be at least 1"),
        ({"solver": "euler"}, "solver = 'euler': unknown solver"),
        ({"divergence": "none"}, "divergence = 'none': unknown divergence"),
    ],
)
def test_impossible_flows_are_named(arguments, named):
    keys = jax.random.split(jax.random.key(0), 1)
    inputs = gaussian(0.0, 1.0), schedules.cosine(10), keys, jnp.zeros((1, 1))
    arguments = {"num_steps": 5, "solver": "heun", "divergence": "exact"} | arguments
    with pytest.raises(ConfigError, match=named):
        likelihood.flow_log_likelihood(*inputs, **arguments)


def test_every_solver_is_consistent():
    for tableau in SOLVERS.values():
        assert abs(sum(tableau.weights) - 1) < 1e-12
        for node, row in zip(tableau.nodes, tableau.matrix):
            assert abs(sum(row) - node) < 1e-12


# --- every objective ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outer_rows():
    """The rows t = 1 and t = T of every schedule, with the names of the schedules."""
    chains = {name: create(1000) for name, create in SCHEDULES.items() if name != "from_betas"}
    chains["zero terminal SNR"] = schedules.zero_terminal_snr(schedules.cosine(1000))
    clipped = {name: schedules.clip_posterior_variance(chain) for name, chain in chains.items()}
    ends = np.array([0, len(chains["linear"]) - 1])
    rows = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(c[ends] for c in clipped.values())
    )
    return [name for name in clipped for _ in range(2)], rows


SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in ("beta", "learned")]


@pytest.mark.parametrize("variance", ["posterior", "learned_range", *SLOWLY])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_objective_is_finite_at_both_ends(kind, variance, outer_rows):
    """Losses and gradients of every weighting and of L_vlb are finite at t = 1 and t = T."""
    names, rows = outer_rows
    outputs = np.random.default_rng(0).standard_normal((2, len(names), 2, 6)).astype(np.float32)
    outputs[1] = np.asarray(jnp.asarray(outputs[1], jnp.bfloat16), np.float32)
    learned = VARIANCES[variance].is_learned

    def of_objective(name, row, output):
        is_vlb = name == "L_vlb"
        objective = Objective(
            PREDICTIONS[kind],
            WEIGHTINGS["vlb" if is_vlb else name](),
            is_vlb,
            VARIANCES[variance],
            0.001,
            TIMESTEP_SAMPLERS["uniform"],
            256,
            None,
            0.0,
        )
        x_0 = jnp.array([[-1.0, 1.0, 127 / 127.5 - 1]])
        eps = jnp.array([[0.3, -2.0, 1.1]])
        x_t = process.q_sample(row, x_0, eps)
        target = PREDICTIONS[kind].encode(row, process.Prediction(x_0, eps), x_t)
        noised = NoisedExample(x_0, x_t, target)
        output = output[:1] if learned else output[:1, :3]
        return losses.example_loss(objective, 1000, row, noised, output)

    @jax.jit
    def everything(outputs):
        return {
            name: jax.vmap(
                jax.vmap(jax.value_and_grad(functools.partial(of_objective, name), argnums=1)),
                in_axes=(None, 0),
            )(rows, outputs)
            for name in (*WEIGHTINGS, "L_vlb")
        }

    for name, (values, gradients) in everything(jnp.asarray(outputs)).items():
        for i, schedule in enumerate(names):
            if not determines_x_0(PREDICTIONS[kind], rows[i]):
                continue
            assert np.isfinite(values[:, i]).all(), (name, schedule, i % 2)
            assert np.isfinite(gradients[:, i]).all(), (name, schedule, i % 2)


@pytest.mark.slow
def test_a_network_in_bfloat16_has_finite_gradients_at_both_ends():
    """The bound of a small U-Net with a learned variance is differentiated at t = 1 and t = T."""
    fields = {
        "name": "unet",
        "width": 8,
        "channel_multipliers": (1,),
        "num_blocks": 1,
        "attention_resolutions": (),
        "head_channels": 8,
        "dropout": 0.0,
        "class_conditional": False,
        "dtype": "bfloat16",
    }
    model = create_model(fields, (4, 4, 1), None, learned_variance=True)
    ends = TimestepSampler(lambda T: (), lambda *_: (jnp.array([0, 999]), jnp.ones(2)), None)
    objective = Objective(
        PREDICTIONS["eps"],
        WEIGHTINGS["vlb"](),
        True,
        VARIANCES["learned_range"],
        0.001,
        ends,
        256,
        None,
        0.0,
    )
    x_0 = jnp.array([-1.0, 0.5])[:, None, None, None] * jnp.ones((2, 4, 4, 1))
    examples = Examples(x_0=x_0, label=None, indices=jnp.arange(2), batch_size=2)
    key = jax.random.key(0)
    inputs = LossInputs(schedules.cosine(1000), (), key, examples)
    losses_of = losses.discrete_time(objective, model.apply)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.sum(losses_of(params, inputs).losses)

    params = jax.tree.map(lambda leaf: leaf + 0.01, model.init(key))  # the last layer begins at 0
    value, gradient = loss(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_l_hybrid_trains_the_variance_by_the_bound_and_the_mean_by_l_simple():
    """iDDPM section 3.1: the L_vlb part of L_hybrid has no gradient with respect to the mean."""

    def loss(output, is_vlb, scale, variance="learned_range"):
        objective = Objective(
            PREDICTIONS["eps"],
            WEIGHTINGS["vlb" if is_vlb else "simple"](),
            is_vlb,
            VARIANCES[variance],
            scale,
            TIMESTEP_SAMPLERS["uniform"],
            None,
            None,
            0.0,
        )
        row = schedules.clip_posterior_variance(schedules.cosine(100))[40]
        x_0, eps = jnp.array([0.2, -0.4]), jnp.array([1.0, -0.3])
        noised = NoisedExample(x_0, process.q_sample(row, x_0, eps), eps)
        return losses.example_loss(objective, 100, row, noised, output)

    output = np.array([0.7, 0.1, -0.3, 0.4])
    with jax.enable_x64(True):  # terms of the variance's gradient nearly cancel
        hybrid = np.float64(jax.grad(loss)(output, False, 0.001))
        bound = np.float64(jax.grad(loss)(output, True, 0.0))
        simple = np.float64(jax.grad(loss)(output[:2], False, 0.0, "posterior"))
    np.testing.assert_allclose(hybrid[:2], simple, rtol=1e-9)
    np.testing.assert_allclose(hybrid[2:], 0.001 * bound[2:], rtol=1e-9)
    assert np.abs(bound).min() > 0
    output = jnp.float32(output)
    whole = loss(output, False, 0.001)
    parts = loss(output[:2], False, 0.0, "posterior") + 0.001 * loss(output, True, 0.0)
    np.testing.assert_allclose(whole, parts, rtol=1e-6)

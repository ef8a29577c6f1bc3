"""Guidance against closed forms: guided Gaussian data are Gaussian with a known mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import cosine_betas, gaussian, mixture, rows
from jax.tree_util import Partial

from diffusion_jax.diffusion import process, schedules
from diffusion_jax.diffusion.guidance import dynamic_threshold, gradient, guide, static_threshold
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers.chain import sample
from diffusion_jax.diffusion.samplers.ddim import ddim
from diffusion_jax.errors import ConfigError

T, BATCH, DIMS = 8, 4, 3
SCHEDULE = schedules.cosine(T)
MEAN, OTHER, VARIANCE = 0.7, -0.4, 0.3
STRONG, WEAK = gaussian(MEAN, VARIANCE), gaussian(OTHER, VARIANCE)
BAD = float("nan"), float("inf")


def x_of(seed=0, shape=(BATCH, DIMS)):
    return jax.random.normal(jax.random.key(seed), shape)


def large(x_t, row):
    """A network with a learned variance whose x_0 leaves [-1, 1], by far in the last example."""
    x_0 = x_t * jnp.arange(1, len(x_t) + 1)[:, None]
    return Prediction(x_0, process.eps_of_x_0(row, x_t, x_0), 0.1 * x_t)


def near(x_t, row):
    return -jnp.sum(jnp.square(x_t - 0.5), axis=1) / 2


EVERY = {
    "guide": guide(large, WEAK, 3.0),
    "rescaled": guide(large, WEAK, 3.0, rescale=0.7),
    "interval": guide(large, WEAK, 3.0, (4, 6)),
    "static": static_threshold(large),
    "dynamic": dynamic_threshold(large, 0.9),
    "gradient": gradient(large, near, 2.0),
    "all": dynamic_threshold(gradient(guide(large, WEAK, 3.0, rescale=0.5), near, 2.0), 0.9),
}


@jax.jit
def _along(predict, x_t, schedule):
    return jax.lax.map(lambda row: predict(x_t, row), schedule)


def along(predict, x_t=None, schedule=SCHEDULE):
    """The predictions at each row of a schedule: [row, example, ...]."""
    return _along(predict, x_of() if x_t is None else x_t, schedule)


def assert_equal(found, expected):
    """Assert that two pytrees are equal, bit for bit."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def chain(predict):
    return sample(jax.random.key(1), predict, SCHEDULE, ddim(0.0), (BATCH, DIMS))


def assert_close(found, expected, rtol=1e-5):
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * (1 + np.abs(other).max()))


# --- every function -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_x_0_and_eps_belong_together_and_the_variance_stays(name):
    x_t = x_of()
    found = along(EVERY[name], x_t)
    assert found.x_0.shape == found.eps.shape == (T, *x_t.shape)
    again = jax.vmap(process.q_sample)(SCHEDULE, found.x_0, found.eps)
    size = (np.abs(found.x_0) + np.abs(found.eps)).max(axis=(1, 2), keepdims=True)
    assert (np.abs(again - x_t[None]) < 2e-6 * size).all()
    np.testing.assert_array_equal(found.log_variance, along(Partial(large), x_t).log_variance)
    # No example depends on the others
    others = along(EVERY[name], x_t.at[1:].set(5.0))
    assert_equal(*(jax.tree.map(lambda leaf: leaf[:, :1], which) for which in (found, others)))


def test_numbers_change_without_another_compilation():
    traces = []

    @jax.jit
    def run(predict, x_t):
        traces.append(())
        return predict(x_t, SCHEDULE[4])

    def every(weight, interval, phi, scale, percentile):
        guided = guide(large, WEAK, weight, interval, phi)
        return dynamic_threshold(gradient(guided, near, scale), percentile)

    numbers = [(3, (1, 5), 0, 1, 1), (2.5, (2.5, np.inf), 0.5, 0.7, 0.9), (1.0, (7, 8), 1, 0, 0.5)]
    found = [run(every(*chosen), x_of()) for chosen in numbers]
    assert len(traces) == 1
    for chosen, compiled in zip(numbers, found):
        assert_close(compiled, every(*chosen)(x_of(), SCHEDULE[4]))
        assert np.abs(compiled.x_0 - large(x_of(), SCHEDULE[4]).x_0).max() > 1e-2
    # Traced numbers give the same results; their ranges are not checked
    traced = jax.jit(lambda *chosen: every(*chosen)(x_of(), SCHEDULE[4]))(*numbers[1])
    assert_close(traced, found[1])


def test_guidance_keeps_the_arrays_of_its_networks():
    # The networks are pytrees: their labels stay integers and arguments of the compiled function
    def network(label, x_t, row):
        return gaussian(jnp.array([MEAN, OTHER])[label][:, None], VARIANCE)(x_t, row)

    run = jax.jit(lambda predict: predict(x_of(), SCHEDULE[3]))
    label = jnp.array([0, 1, 1, 0])
    both = [Partial(network, chosen) for chosen in (label, 1 - label)]
    found = run(guide(*both, 2.0))
    assert_close(
        found, guide(*(partial(network, p.args[0]) for p in both), 2.0)(x_of(), SCHEDULE[3])
    )


@pytest.mark.parametrize(
    ("create", "message"),
    [(lambda w=w: guide(STRONG, WEAK, w), f"weight = {w}: must be a finite") for w in (-1, *BAD)]
    + [
        (lambda ends=ends: guide(STRONG, WEAK, 2, ends), f"interval = {ends}: must be (lo, hi)")
        for ends in ((5, 4), (1, BAD[0]), (BAD[0], 1))
    ]
    + [
        (lambda phi=phi: guide(STRONG, WEAK, 2, rescale=phi), f"rescale = {phi}: must be in [0, 1]")
        for phi in (-0.1, 1.1, *BAD)
    ]
    + [
        (lambda p=p: dynamic_threshold(STRONG, p), f"percentile = {p}: must be in (0, 1]")
        for p in (0, 99.5, *BAD)
    ]
    + [
        (lambda s=s: gradient(STRONG, near, s), f"scale = {s}: must be a finite number >= 0")
        for s in (-1, *BAD)
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_out_of_range_is_one_line(create, message):
    with pytest.raises(ConfigError) as error:
        create()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# --- classifier-free guidance and autoguidance --------------------------------------------------


def log_density(x_t, row, weights, means):
    """Log q(x_t) of a mixture of N(mean, VARIANCE I), in float64 numpy, up to a constant."""
    total = row.alpha_bar * VARIANCE + row.noise
    gaps = x_t - np.sqrt(row.alpha_bar) * np.asarray(means, np.float64)[:, None]
    return np.log(np.asarray(weights) @ np.exp(-np.sum(gaps**2, axis=-1) / (2 * total)))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_the_guided_score_is_that_of_the_weighted_densities(weight):
    weights, means = [0.3, 0.7], [[MEAN] * DIMS, [OTHER] * DIMS]
    found = along(guide(STRONG, mixture(weights, means, VARIANCE), weight))
    x, h = np.asarray(x_of(), np.float64), 1e-5
    steps = h * np.eye(DIMS)[:, None]
    for i, row in enumerate(rows(cosine_betas(T))):

        def log_guided(x, row=row):
            of_all = log_density(x, row, weights, means)
            return of_all + weight * (log_density(x, row, [1.0], means[:1]) - of_all)

        score = [(log_guided(x + step) - log_guided(x - step)) / (2 * h) for step in steps]
        eps = -np.sqrt(row.noise) * np.stack(score, axis=-1)
        x_0 = (x - np.sqrt(row.noise) * eps) / np.sqrt(row.alpha_bar)
        np.testing.assert_allclose(found.eps[i], eps, rtol=1e-4, atol=1e-5)
        # x_0 is 1 / sqrt(alpha_bar) times as sensitive as eps
        np.testing.assert_allclose(found.x_0[i], x_0, rtol=1e-4, atol=1e-5 / np.sqrt(row.alpha_bar))


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_guided_gaussians_are_a_gaussian(weight):
    # log p_weak + w (log p - log p_weak) is quadratic for equal variances; its mean is extrapolated
    extrapolated = gaussian(OTHER + weight * (MEAN - OTHER), VARIANCE)
    guided = guide(STRONG, WEAK, weight)
    assert_close(along(guided), along(Partial(extrapolated)))
    chains = [chain(predict) for predict in (guided, extrapolated)]
    np.testing.assert_allclose(*chains, rtol=1e-4, atol=1e-4)


def test_weight_1_and_guidance_by_the_same_network_change_nothing():
    alone = along(Partial(large))
    assert_equal(along(guide(large, WEAK, 1)), alone)
    assert_equal(along(guide(large, WEAK, 1, rescale=0.7)), alone)
    for rescale in (0.0, 0.7):
        # autoguidance by the same network
        assert_close(along(guide(large, large, 7.5, rescale=rescale)), alone)


def test_the_interval_is_closed_and_of_timesteps():
    # The rows of the shorter chain have the timesteps 2, 4, 6, 8
    for schedule in (SCHEDULE, schedules.respace(SCHEDULE, 4)):
        found = along(guide(large, WEAK, 3.0, (3, 6), 0.5), schedule=schedule)
        guided = along(guide(large, WEAK, 3.0, rescale=0.5), schedule=schedule)
        alone = along(Partial(large), schedule=schedule)
        for i, timestep in enumerate(schedule.timestep):
            expected = guided if 3 <= timestep <= 6 else alone
            assert_equal(*(jax.tree.map(lambda leaf, i=i: leaf[i], p) for p in (found, expected)))


def test_outside_the_interval_the_weak_network_is_not_evaluated():
    calls = {"strong": [], "weak": []}

    def counted(name, predict):
        def of(x_t, row):
            jax.debug.callback(lambda t: calls[name].append(int(t)), row.timestep)
            return predict(x_t, row)

        return of

    guided = guide(counted("strong", STRONG), counted("weak", WEAK), 2.0, (3, 5))
    x_0 = chain(guided)
    jax.effects_barrier()
    assert np.isfinite(x_0).all()
    assert sorted(calls["strong"]) == [*range(1, T + 1)]
    assert sorted(calls["weak"]) == [3, 4, 5]


# --- rescaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_is_algorithm_2_of_lin_et_al_on_v(phi):
    def network(c, x_t, row):  # predicts v, which can be decoded at alpha_bar = 0 too
        return PREDICTIONS["v"].decode(row, x_t, jnp.sin(c * x_t) + c - 1)

    schedule = schedules.zero_terminal_snr(SCHEDULE)
    signal, noise = (
        np.sqrt(np.float64(column))[:, None, None]
        for column in (schedule.alpha_bar, schedule.one_minus_alpha_bar)
    )

    def v_of(prediction):
        return signal * np.float64(prediction.eps) - noise * np.float64(prediction.x_0)

    networks, weight = [Partial(network, c) for c in (1.0, 1.5)], 7.5
    pos, neg = (v_of(along(predict, schedule=schedule)) for predict in networks)
    cfg = neg + weight * (pos - neg)
    std_pos, std_cfg = pos.std(axis=2, keepdims=True), cfg.std(axis=2, keepdims=True)
    expected = cfg * (phi * std_pos / std_cfg + (1 - phi))
    found = along(guide(*networks, weight, rescale=phi), schedule=schedule)
    np.testing.assert_allclose(v_of(found), expected, rtol=1e-4, atol=1e-4)
    again = signal * found.x_0 + noise * found.eps
    np.testing.assert_allclose(again, np.broadcast_to(x_of(), again.shape), rtol=1e-4, atol=1e-5)


def test_phi_0_is_exactly_no_rescaling():
    def plain(x_t, row):
        strong, weak = large(x_t, row), WEAK(x_t, row)
        x_0 = strong.x_0 + 2.0 * (strong.x_0 - weak.x_0)
        return Prediction(x_0, strong.eps + 2.0 * (strong.eps - weak.eps), strong.log_variance)

    assert_equal(along(guide(large, WEAK, 3.0, rescale=0)), along(Partial(plain)))


def test_an_example_of_one_number_has_no_deviation_to_rescale():
    x_t, row = x_of(shape=(BATCH, 1)), SCHEDULE[4]
    guided = guide(STRONG, WEAK, 3.0, rescale=0.7)
    assert_equal(guided(x_t, row), guide(STRONG, WEAK, 3.0)(x_t, row))
    assert np.isfinite(jax.grad(lambda x_t: jnp.sum(guided(x_t, row).eps))(x_t)).all()


# --- thresholding -------------------------------------------------------------------------------


def test_static_thresholding_clips_to_the_range_of_images():
    found, alone = along(static_threshold(large)), along(Partial(large))
    np.testing.assert_array_equal(found.x_0, np.clip(alone.x_0, -1, 1))


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_imagen(percentile):
    x_t = x_of(shape=(BATCH, 5, 4))

    def images(x_t, row):
        x_0 = x_t * jnp.array([0.1, 1.0, 2.0, 8.0])[:, None, None]
        return Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))

    found = dynamic_threshold(images, percentile)(x_t, SCHEDULE[3])
    for i, x_0 in enumerate(np.asarray(images(x_t, SCHEDULE[3]).x_0, np.float64)):
        s = max(1, np.percentile(np.abs(x_0), 100 * percentile))
        np.testing.assert_allclose(found.x_0[i], np.clip(x_0, -s, s) / s, rtol=1e-5, atol=1e-6)
    assert np.abs(found.x_0).max() <= 1
    np.testing.assert_allclose(found.x_0[0], 0.1 * x_t[0], rtol=1e-6)  # inside the range already


# --- gradient guidance --------------------------------------------------------------------------


def test_the_gradient_of_a_likelihood_gives_the_posterior():
    """For y = x_0 + n with n ~ N(0, r), p(x_0 | y) and p(y | x_t) are Gaussian."""
    y, r = jnp.linspace(-1.0, 1.0, DIMS)[None], 0.2

    def log_likelihood(x_t, row):
        left = VARIANCE * row.one_minus_alpha_bar
        left = left / (row.alpha_bar * VARIANCE + row.one_minus_alpha_bar)  # var(x_0 | x_t)
        return -jnp.sum(jnp.square(y - STRONG(x_t, row).x_0), axis=1) / (2 * (left + r))

    variance = 1 / (1 / VARIANCE + 1 / r)
    posterior = gaussian(variance * (MEAN / VARIANCE + y / r), variance)
    guided = gradient(STRONG, log_likelihood)
    assert_close(along(guided), along(Partial(posterior)), rtol=2e-5)
    chains = [chain(predict) for predict in (guided, posterior)]
    np.testing.assert_allclose(*chains, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0, 1, 3.5])
def test_the_shift_of_eps_is_algorithm_2_of_dhariwal_and_nichol(scale):
    found, alone = along(gradient(large, near, scale)), along(Partial(large))
    for i, row in enumerate(rows(cosine_betas(T))):
        shift = np.sqrt(row.noise) * scale * (0.5 - np.float64(x_of()))
        np.testing.assert_allclose(found.eps[i], alone.eps[i] - shift, rtol=1e-5, atol=1e-5)
    if scale == 0:
        assert_equal(found, alone)


def test_a_likelihood_of_the_whole_batch_is_refused():
    for wrong in (lambda x_t, row: jnp.mean(near(x_t, row)), lambda x_t, row: x_t):
        with pytest.raises(ConfigError, match=r"^shape of log_likelihood = \(.*: must be \(4,\)"):
            gradient(STRONG, wrong)(x_of(), SCHEDULE[0])

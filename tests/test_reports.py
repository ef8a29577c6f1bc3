"""Bugs reported in other diffusion libraries do not exist here: one test for each report."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from gaussian import columns, cosine_betas, ddim_step, gaussian, linear_betas, linear_prediction
from gaussian import rows as exact_rows
from jax.experimental.compilation_cache import compilation_cache

from diffusion_jax.config.config import load
from diffusion_jax.data.batches import read_batches
from diffusion_jax.data.dataset import DatasetInfo, Split
from diffusion_jax.diffusion import (
    learned_schedule,
    likelihood,
    losses,
    process,
    samplers,
    schedules,
)
from diffusion_jax.diffusion.learned_schedule import LearnedSchedule
from diffusion_jax.diffusion.losses import NoisedExample, Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.samplers import SAMPLERS
from diffusion_jax.diffusion.schedules.spacings import SPACINGS
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.errors import ConfigError
from diffusion_jax.experiment.objective import create_objective
from diffusion_jax.models import create_model
from diffusion_jax.runtime.compilation import start_cache

MEAN, VARIANCE = 0.4, 0.05
DATA = gaussian(MEAN, VARIANCE)
KEYS = jax.random.split(jax.random.key(2), 2)
Z = np.asarray(samplers.normal(KEYS, jnp.zeros((2, 3))), np.float64)


@jax.jit
def step_of(sampler, row, row_prev, x_0=0.0, eps=0.0, log_variance=0.0):
    """One step from x_t = 0 with a fixed prediction; its noise is Z."""
    x_t = jnp.zeros((2, 3))
    prediction = Prediction(*(jnp.full_like(x_t, value) for value in (x_0, eps, log_variance)))
    now = samplers.Step(KEYS, lambda x_t, row: prediction, (), x_t, row, row_prev)
    return sampler.step(now)[0]


def steps(chain):
    """The intervals of a chain from x_T down: (row, row_prev)."""
    rows = schedules.with_terminal_row(chain)
    return [(rows[i], rows[i - 1]) for i in range(len(chain), 0, -1)]


def exact_jumps(betas, timesteps):
    """The columns of a chain that visits some timesteps, in float64 from the betas of all."""
    alpha_bar = np.append(1.0, columns(betas).alpha_bar)[np.int64(timesteps)]
    return columns(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))


# --- samplers -------------------------------------------------------------------------------


def test_diffusers_14213():
    """Euler ancestral returned NaN on the cosine schedule in 4 to 10 steps.

    It took the root of sigma_prev^2 - sigma_up^2. Float32 rounds that below 0 where sigma falls a
    hundredfold in one step. Here sigma_down = sigma_prev^2 / sigma is right to 1e-5 at every step.
    """
    sampler = samplers.euler_ancestral()
    for num_steps in range(4, 11):
        chain = schedules.respace(schedules.cosine(1000), num_steps)
        alpha_bar = exact_jumps(cosine_betas(1000), chain.timestep).alpha_bar[::-1]
        sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        ends = np.append(sigma[1:], 0.0)
        down, up = ends**2 / sigma, ends * np.sqrt(1 - (ends / sigma) ** 2)
        for i, (row, row_prev) in enumerate(steps(chain)):
            found = step_of(sampler, row, row_prev, eps=1.0)
            expected = np.sqrt(row_prev.alpha_bar) * (down[i] + up[i] * Z)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_diffusers_12771():
    """DPM-Solver++ on the Karras grid of the cosine schedule stepped past the end of its chain.

    It truncated timesteps to integers, so nine of twenty were the same, and it searched for its
    step by timestep. Here timesteps need not be integers, and each step gets its rows.
    """
    full = schedules.cosine(1000)
    chain = schedules.respace(full, 20, "karras")
    timesteps = np.asarray(chain.timestep, np.float64)
    assert len(timesteps) == 20
    assert (np.diff(timesteps) > 0).all()
    assert len(np.unique(np.floor(timesteps))) < 15  # as integers they would repeat
    network_timesteps = []

    def predict(x_t, row):
        jax.debug.callback(lambda t: network_timesteps.append(float(t)), row.timestep)
        return DATA(x_t, row)

    sampler = samplers.dpmpp_2m()
    x_0 = samplers.sample(jax.random.key(0), predict, chain, sampler, (2, 3), native=full)
    jax.effects_barrier()
    np.testing.assert_array_equal(network_timesteps, timesteps[::-1])
    assert np.isfinite(x_0).all()


def test_diffusers_14569():
    """Ancestral samples were NaN with the fixed variance beta stored as a logarithm.

    The standard deviation was the square root of the logarithm. Here every variance is a logarithm
    until the step, which uses exp(log beta / 2) for a fixed beta and for a network's.
    """
    chain = schedules.linear(1000)[499:501]
    row, row_prev = chain[1], chain[0]
    log_beta = np.log(linear_betas(1000)[500])
    fixed = step_of(samplers.ancestral("beta"), row, row_prev)
    learned = step_of(samplers.ancestral("learned"), row, row_prev, log_variance=log_beta)
    np.testing.assert_allclose(fixed, np.exp(log_beta / 2) * Z, rtol=1e-6)
    np.testing.assert_allclose(learned, fixed, rtol=1e-6)


def test_diffusers_12633():
    """DDIM on "linspace" stepped by T // N = 100, although its timesteps are 111 apart.

    Each step ended at another noise level than the one where the next step began. Here a step ends
    at the row of the next timestep: for x_0 = 1 and eps = 0 it returns sqrt(alpha_bar) of that row.
    """
    chain = schedules.respace(schedules.linear(1000), 10, "linspace")
    np.testing.assert_array_equal(chain.timestep, 1 + 111 * np.arange(10))
    alpha_bar = np.append(1.0, columns(linear_betas(1000)).alpha_bar)
    ends = [*(1 + 111 * np.arange(8, -1, -1)), 0]
    for (row, row_prev), end in zip(steps(chain), ends):
        found = step_of(samplers.ddim(), row, row_prev, x_0=1.0)
        np.testing.assert_allclose(found, np.full((2, 3), np.sqrt(alpha_bar[end])), rtol=1e-6)


def test_diffusers_11347():
    """DDIM on "linspace" in 5 steps of 100 did not end a step at the next timestep of its chain.

    If the network predicts the true x_0, eps must stay the same along the whole chain.
    """
    betas, x_0 = cosine_betas(100), jnp.array([[-0.7, 0.1, 0.9]])
    chain = schedules.respace(schedules.from_betas(betas), 5, "linspace")

    def predict(x_t, row):
        return Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))

    eps = jnp.array([[1.3, -0.2, 0.6]])
    x_T = process.q_sample(chain[-1], x_0, eps)
    options = {"num_frames": 6, "x_T": x_T}
    found = samplers.trajectory(
        jax.random.key(0), predict, chain, samplers.ddim(), (1, 3), **options
    )
    timesteps = np.array([100, 75, 51, 26, 1, 0])  # the report counts from 0: 99, 74, 50, 25, 0
    alpha_bar = np.append(1.0, columns(betas).alpha_bar)[timesteps][:, None, None]
    expected = np.sqrt(alpha_bar) * np.float64(x_0) + np.sqrt(1 - alpha_bar) * np.float64(eps)
    np.testing.assert_allclose(found.x_t, expected, rtol=0, atol=2e-5)


def test_diffusers_9261():
    """DDPM in 13 "trailing" steps of 1000 ended its steps one timestep off.

    1000 // 13 is 76, but the timesteps are 76 or 77 apart. Here beta, the posterior mean and the
    posterior variance belong to the whole jump between two timesteps of the chain.
    """
    chain = schedules.respace(schedules.linear(1000), 13, "trailing")
    published = [999, 922, 845, 768, 691, 614, 537, 461, 384, 307, 230, 153, 76]  # counted from 0
    np.testing.assert_array_equal(chain.timestep[::-1], np.array(published) + 1)
    exact = exact_rows(exact_jumps(linear_betas(1000), chain.timestep).beta)
    for (row, row_prev), jump in zip(steps(chain), reversed(exact)):
        found = step_of(samplers.ancestral("posterior"), row, row_prev, x_0=1.0)
        mean = np.sqrt(jump.alpha_bar_prev) * jump.beta / jump.noise
        np.testing.assert_allclose(found, mean + np.sqrt(jump.posterior_variance) * Z, rtol=2e-5)


def test_diffusers_10003():
    """A chain of T = 1000 steps requested timestep 1000, although timesteps were 0..999.

    An offset of 1 was added to the timesteps. Here every spacing with T steps is the full chain.
    """
    full = schedules.scaled_linear(1000)
    for spacing in SPACINGS:
        chain = schedules.respace(full, 1000, spacing)
        np.testing.assert_array_equal(chain.timestep, np.arange(1, 1001))
        np.testing.assert_array_equal(chain.alpha_bar, full.alpha_bar)
        np.testing.assert_allclose(chain.beta, full.beta, rtol=1e-6)
        np.testing.assert_allclose(chain.posterior_variance, full.posterior_variance, rtol=1e-6)


def test_diffusers_3006():
    """In a chain that skips timesteps, the upper bound of "learned_range" was the beta of one step.

    Here both bounds belong to the whole jump: its beta at output 1, its beta~ at output -1.
    """
    chain = schedules.respace(schedules.linear(1000), 10)
    jumps = exact_jumps(linear_betas(1000), chain.timestep)
    log_variance = VARIANCES["learned_range"].log_variance
    high, low = (log_variance(chain[1:], jnp.full(9, output)) for output in (1.0, -1.0))
    np.testing.assert_allclose(high, np.log(jumps.beta[1:]), rtol=1e-5)
    np.testing.assert_allclose(low, np.log(jumps.posterior_variance[1:]), rtol=1e-5)
    assert (high > np.log(linear_betas(1000)[99::100][1:]) + 1).all()


ONE_STEP = {
    "trailing": {},
    "linspace": {},
    "log_snr": {},
    "karras": {"sigma_max": 20.0},
}


@pytest.mark.parametrize("name", ["euler", "heun", "unipc", "dpmpp_2m"])
def test_diffusers_14572(name):
    """A chain of one step had NaN sigmas: the spacing of its grid divided by a length of 0.

    Here a single step begins at the noisiest row and ends at E[x_0 | x_T].
    """
    full = schedules.linear(1000)
    x_T = jnp.linspace(-2, 2, 6).reshape(2, 3)

    @jax.jit
    def draw(chain):
        key = jax.random.key(0)
        return samplers.sample(key, DATA, chain, SAMPLERS[name](), (2, 3), x_T=x_T, native=full)

    alpha_bar = columns(linear_betas(1000)).alpha_bar[-1]
    for spacing, ends in ONE_STEP.items():
        chain = schedules.respace(full, 1, spacing, **ends)
        expected = 1 / (1 + ends["sigma_max"] ** 2) if ends else alpha_bar
        np.testing.assert_allclose(chain.alpha_bar, [expected], rtol=1e-5)
        row = exact_rows(np.array([1 - expected]))[0]
        (slope, shift), _ = linear_prediction(row, MEAN, VARIANCE)
        np.testing.assert_allclose(draw(chain), slope * np.float64(x_T) + shift, atol=1e-5)


# --- schedules ------------------------------------------------------------------------------


def test_diffusers_2585():
    """DDIM in 50 steps of 1000 began at timestep 981, where x_t is not pure noise.

    That is the spacing "leading", which stays for models that were sampled with it. The default
    begins at T. A single step of "leading" or "quadratic" would begin at timestep 1, where there is
    hardly any noise to remove, so it is an error.
    """
    full = schedules.scaled_linear(1000)
    leading = schedules.respace(full, 50, "leading").timestep
    np.testing.assert_array_equal(leading, np.arange(1, 982, 20))
    for num_steps in (1, 21, 50):
        for options in ({}, {"spacing": "trailing"}, {"spacing": "linspace"}):
            chain = schedules.respace(full, num_steps, **options)
            assert len(chain) == num_steps
            assert chain.timestep[-1] == 1000
    for spacing in ("leading", "quadratic"):
        with pytest.raises(ConfigError):
            schedules.respace(full, 1, spacing)


@pytest.mark.parametrize("s", [0.008, 0.0])
def test_monai_8427(s):
    """A cosine schedule had alpha_bar = 1 at its first timestep, and images were NaN.

    Here a chain has no row for t = 0, and 1 - alpha_bar is a column of its own, which is right even
    where alpha_bar_1 rounds to 1.
    """
    for num_timesteps in (250, 1000, 10_000):
        schedule = schedules.cosine(num_timesteps, s=s)
        with mpmath.workdps(40):
            theta = [
                (mpmath.mpf(t) / num_timesteps + mpmath.mpf(s))
                / (1 + mpmath.mpf(s))
                * mpmath.pi
                / 2
                for t in (0, 1)
            ]
            noise = float(1 - (mpmath.cos(theta[1]) / mpmath.cos(theta[0])) ** 2)
        np.testing.assert_allclose(schedule.one_minus_alpha_bar[0], noise, rtol=1e-6)
        of_x_0, of_x_t = process.posterior_coefficients(schedule)
        assert np.isfinite(of_x_0).all()
        assert np.isfinite(of_x_t).all()
        assert (of_x_0[0], of_x_t[0]) == (1, 0)


def test_a_bug_like_monai_8427_in_the_prior_term():
    """L_T is finite and exact for a chain that ends with hardly any noise.

    L_T contains -log(1 - alpha_bar). Subtracting alpha_bar from 1 in float32 gives 0 there, and an
    infinite bound; the column one_minus_alpha_bar has all its digits.
    """
    x_0 = np.array([-1.0, 0.0, 0.5])
    for beta in (1e-9, 1e-7, 1e-3):
        last = schedules.from_betas(np.full(2, beta))[-1]
        with mpmath.workdps(40):
            alpha_bar = (1 - mpmath.mpf(beta)) ** 2
            exact = [(alpha_bar * x**2 - alpha_bar - mpmath.log(1 - alpha_bar)) / 2 for x in x_0]
        found = likelihood.prior_term(last, jnp.float32(x_0))
        np.testing.assert_allclose(found, np.float64(exact), rtol=1e-6)


def test_vdm_11():
    """The monotone network of a learned schedule did not keep its ends gamma_0 and gamma_1.

    Here the output of the network is scaled between two ends that are separate parameters.
    """
    recipe = LearnedSchedule(20, 6.0, -5.0)
    params = learned_schedule.init(recipe, jax.random.key(0))
    inner = [name for name in params if name not in learned_schedule.ENDS]
    for name in inner:
        moved = 2 * jax.random.normal(jax.random.key(1), jnp.shape(params[name]))
        params[name] = params[name] + moved
    chain = learned_schedule.discretise(recipe, params)
    np.testing.assert_allclose(np.float64(chain.log_snr)[[0, -1]], [6.0, -5.0], rtol=1e-5)
    np.testing.assert_allclose(chain.timestep[jnp.array([0, -1])], [1, 20], rtol=1e-5)
    assert np.abs(np.asarray(chain.log_snr) - np.linspace(6, -5, 20)).max() > 0.5  # not a line


# --- zero SNR -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(repository):
    return load(str(repository / "configs" / "default.py"), [])


INFO = DatasetInfo("digits", (8, 8, 1), 17, 10)


def test_diffusers_3851(config):
    """Zero terminal SNR with a prediction of eps divided by 0 in the first step, without an error.

    eps does not determine x_0 where alpha_bar = 0. Here the combination is an error at the start.
    """
    schedule = schedules.zero_terminal_snr(schedules.cosine(100))
    assert schedule.alpha_bar[-1] == 0
    config = config.copy_and_resolve_references()
    for prediction in PREDICTIONS:
        config.loss.prediction = prediction
        if prediction in ("eps", "score"):
            named = rf"^config\.loss\.prediction = '{prediction}': must be .*zero SNR"
            with pytest.raises(ConfigError, match=named):
                create_objective(config, schedule, INFO)
        else:
            create_objective(config, schedule, INFO)


def test_diffusers_5103():
    """DDIM from zero terminal SNR gave black images, because decoding eps divided by 0.

    Decoding v does not divide: x_0 = -v at T. For Gaussian data the chain is the known linear map.
    """
    betas = np.float64(schedules.zero_terminal_snr(schedules.cosine(100)).beta)
    chain = schedules.respace(schedules.zero_terminal_snr(schedules.cosine(100)), 10, "trailing")

    def predict(x_t, row):
        v = PREDICTIONS["v"].encode(row, DATA(x_t, row), x_t)
        return PREDICTIONS["v"].decode(row, x_t, v)

    x_T = jnp.linspace(-2, 2, 6).reshape(2, 3)
    found = samplers.sample(jax.random.key(0), predict, chain, samplers.ddim(), x_T.shape, x_T=x_T)
    expected = np.float64(x_T)
    for jump in reversed(exact_rows(exact_jumps(betas, chain.timestep).beta)):
        slope, shift, _ = ddim_step(jump, MEAN, VARIANCE, 0.0)
        expected = slope * expected + shift
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def objective_of(kind, weighting, variance="posterior"):
    return Objective(
        parametrisation=PREDICTIONS[kind],
        weighting=WEIGHTINGS[weighting](),
        is_vlb=False,
        variance=VARIANCES[variance],
        vlb_scale=0.001,
        timesteps=TIMESTEP_SAMPLERS["uniform"],
        levels=17,
        num_classes=None,
        label_dropout=0.0,
    )


ERROR = np.array([0.3, -0.2, 0.05])  # the error of the predicted x_0


def losses_of(kind, weighting, schedule):
    """The loss and its gradient at every row, for a network whose x_0 is off by ERROR."""
    x_0, eps = jnp.array([0.5, -1.0, 0.25]), jnp.array([0.3, -1.1, 2.0])
    objective = objective_of(kind, weighting)

    def of_row(row):
        x_t = process.q_sample(row, x_0, eps)
        encode = objective.parametrisation.encode
        target = encode(row, Prediction(x_0, eps), x_t)
        guess = x_0 + jnp.float32(ERROR)
        output = encode(row, Prediction(guess, process.eps_of_x_0(row, x_t, guess)), x_t)
        noised = NoisedExample(x_0, x_t, target)

        def loss(output):
            return losses.example_loss(objective, len(schedule), row, noised, output)

        return jax.value_and_grad(loss)(output)

    return jax.jit(jax.vmap(of_row))(schedules.clip_posterior_variance(schedule))


@pytest.fixture(scope="module")
def zero_inside():
    """A chain whose alpha_bar is 0 from the third row on."""
    return schedules.from_betas([0.1, 0.3, 1.0, 0.2, 0.4])


@pytest.mark.parametrize("kind", ["x_0", "v"])
def test_min_snr_2(kind, zero_inside):
    """The Min-SNR weight divided by an SNR of 0 with rescaled betas.

    Here no weighting of x_0 or v divides by the SNR, wherever in a chain the SNR is 0. The weight
    of Min-SNR is 0 there.
    """
    snr = np.array([0.9 / 0.1, 0.63 / 0.37, 0, 0, 0])
    for weighting in WEIGHTINGS:
        values, gradients = losses_of(kind, weighting, zero_inside)
        assert np.isfinite(values).all(), weighting
        assert np.isfinite(gradients).all(), weighting
    values, gradients = losses_of(kind, "min_snr", zero_inside)
    expected = np.minimum(snr, 5) * np.mean(ERROR**2)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(gradients[2:], np.zeros((3, 3)))


def test_a_bug_like_min_snr_2_for_mu(config, zero_inside):
    """A prediction of mu is an error where the row before has zero SNR: losses were NaN there.

    There mu is a multiple of x_t whatever x_0 is, so mu does not determine x_0. Zero SNR in the
    last row alone is allowed.
    """
    config = config.copy_and_resolve_references()
    config.loss.prediction = "mu"
    with pytest.raises(ConfigError, match=r"^config\.loss\.prediction = 'mu': must be "):
        create_objective(config, zero_inside, INFO)
    create_objective(config, zero_inside[:3], INFO)
    values, gradients = losses_of("mu", "min_snr", zero_inside[:3])
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()


# --- weights --------------------------------------------------------------------------------


def test_diffusers_9451():
    """The Min-SNR weight of v was reported as wrong because it falls to 0 with the SNR.

    min(SNR, 5) / (SNR + 1) for v, min(SNR, 5) / SNR for eps and min(SNR, 5) for x_0 give the same
    loss. At zero SNR that loss is 0, so v is not learned at that timestep, as in the paper.
    """
    betas = cosine_betas(50)
    alpha_bar = columns(betas).alpha_bar
    expected = np.minimum(alpha_bar / (1 - alpha_bar), 5.0) * np.mean(ERROR**2)
    for kind in ("v", "eps", "x_0"):
        values, _ = losses_of(kind, "min_snr", schedules.from_betas(betas))
        # near x_T the error of eps is a small difference in float32
        np.testing.assert_allclose(values[:-3], expected[:-3], rtol=2e-3, err_msg=kind)
    ends_at_zero = schedules.zero_terminal_snr(schedules.from_betas(betas))
    values, gradients = losses_of("v", "min_snr", ends_at_zero)
    assert values[-1] == 0
    assert not np.asarray(gradients[-1]).any()
    assert (values[:-1] > 0).all()


def test_lucidrains_363():
    """Min-SNR clamped the SNR from below, max(SNR, gamma), which favours low noise.

    The weight of eps is 1 up to SNR = gamma and gamma / SNR above; that of x_0 is at most gamma.
    """
    schedule = schedules.linear(1000)
    alpha_bar = columns(linear_betas(1000)).alpha_bar
    snr, gamma = alpha_bar / (1 - alpha_bar), 5.0
    log_variance = VARIANCES["posterior"].log_variance(schedule, None)
    weights = {}
    for kind in ("eps", "x_0"):
        gain = PREDICTIONS[kind].gain(schedule)
        weights[kind] = np.float64(WEIGHTINGS["min_snr"](gamma)(schedule, gain, log_variance))
        weights[kind] /= np.float64(gain) ** 2
    is_low = snr > gamma
    assert 0.1 < is_low.mean() < 0.9
    np.testing.assert_allclose(weights["eps"], np.where(is_low, gamma / snr, 1), rtol=1e-5)
    np.testing.assert_allclose(weights["x_0"], np.where(is_low, gamma, snr), rtol=1e-5)


# --- shapes ---------------------------------------------------------------------------------


def test_lucidrains_183():
    """One size was both height and width, so images of 64 by 128 needed a change of the code.

    Here samplers and networks take the shape of an image as a tuple.
    """
    image = jnp.linspace(-1, 1, 3 * 5).reshape(3, 5, 1)

    def predict(x_t, row):
        x_0 = jnp.broadcast_to(image, x_t.shape)
        return Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))

    key, chain = jax.random.key(0), schedules.respace(schedules.cosine(100), 3)
    found = samplers.sample(key, predict, chain, samplers.ancestral(), (2, 3, 5, 1))
    np.testing.assert_allclose(found, np.stack([image, image]), rtol=1e-5, atol=1e-6)
    fields = {
        "name": "unet",
        "width": 8,
        "channel_multipliers": (1, 2),
        "num_blocks": 1,
        "attention_resolutions": (),
        "head_channels": 8,
        "dropout": 0.0,
        "class_conditional": False,
        "dtype": "float32",
    }
    shape = 8, 12, 1
    model = create_model(fields, shape, None)
    params = jax.eval_shape(model.init, key)
    inputs = jnp.zeros((2, *shape)), jnp.ones(2), None, jax.random.split(key, 2)
    assert jax.eval_shape(model.apply, params, *inputs).shape == (2, *shape)


# --- keys -----------------------------------------------------------------------------------


def data_of(seed, stream=Stream.TRAINING):
    return tuple(jax.random.key_data(stream_key(seed, stream)).tolist())


def test_numpy_4676():
    """Seeds were truncated to 32 bits: 1 and 1 + 2^40 gave the same random numbers."""
    for stream in Stream:
        assert data_of(1, stream) != data_of(1 + 2**40, stream)


def test_jax_4745():
    """The key of a large seed depended on its type and on jax's 64-bit mode.

    Without that mode jax takes a seed modulo 2^32. Here each large seed has its own key, the same
    in both modes, and a small seed has the key that jax gives it.
    """
    seeds = [0, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**33, 2**62]
    found = {seed: data_of(seed) for seed in seeds}
    assert len(set(found.values())) == len(seeds)
    for seed in seeds[:3]:
        key = jax.random.fold_in(jax.random.key(seed), int(Stream.TRAINING))
        assert found[seed] == tuple(jax.random.key_data(key).tolist())
    with jax.enable_x64(True):
        assert {seed: data_of(seed) for seed in seeds} == found


@pytest.mark.parametrize("name", ["rbg", "unsafe_rbg"])
def test_jax_21663(name):
    """With "rbg" as jax's default generator, results depended on how devices share a batch.

    A number of threefry2x32 depends on its key alone. A run uses threefry2x32 keys whatever jax's
    default is.
    """
    expected = data_of(3)
    with jax.default_prng_impl(name):
        key = stream_key(3, Stream.TRAINING)
    assert str(jax.random.key_impl(key)) == "threefry2x32"
    assert tuple(jax.random.key_data(key).tolist()) == expected


def test_jax_34497():
    """Under vmap the generator "rbg" draws all numbers from the first key of the batch.

    Image i must have the same noise alone and in a batch, whatever jax's default generator is.
    """
    with jax.default_prng_impl("rbg"):
        key = stream_key(0, Stream.SAMPLING)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(4))
        together = samplers.normal(keys, jnp.zeros((4, 5)))
        alone = samplers.normal(keys[2:3], jnp.zeros((1, 5)))
    np.testing.assert_array_equal(together[2], alone[0])


# --- the compilation cache ------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    """A new folder as jax's compilation cache; the previous settings are restored afterwards."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    start_cache(str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_jax_12582(cache):
    """An unreadable entry of the compilation cache stopped a program.

    Here it gives a warning, and the program is compiled again.
    """

    def compile_anew():
        return jax.jit(lambda x: jnp.tanh(3 * x) + 1)(jnp.arange(4.0))

    expected = compile_anew()
    entries = [path for path in cache.iterdir() if path.name.endswith("-cache")]
    assert entries
    compile_anew()  # reads its program from the cache
    assert len([path for path in cache.iterdir() if path.name.endswith("-cache")]) == len(entries)
    for path in entries:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        found = compile_anew()
    np.testing.assert_array_equal(found, expected)


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7])
def test_k_diffusion_3_and_datasets_7113(size):
    """A data set smaller than a batch gave no batches: its only, incomplete batch was dropped.

    Here a batch takes examples from as many epochs as it needs.
    """
    images = np.arange(size, dtype=np.uint8)[:, None, None, None]
    batches = read_batches(Split(images, None), 8, seed=0)
    drawn = np.concatenate([next(batches)["image"].ravel() for _ in range(7)])
    whole = drawn[: 56 // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(size), (len(whole), 1)))

"""Weightings against the papers that define them, and the weights of the bound against KLs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import BETAS, columns

from diffusion_jax.diffusion import likelihood, process, schedules, weightings
from diffusion_jax.diffusion.losses import NoisedExample, Objective, example_loss
from diffusion_jax.diffusion.parametrisations import PREDICTIONS, determines_x_0
from diffusion_jax.diffusion.process import Prediction
from diffusion_jax.diffusion.schedules.families import SCHEDULES
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.errors import ConfigError

T = 40
SCHEDULE = schedules.cosine(T)
SNR = np.float64(SCHEDULE.alpha_bar) / np.float64(SCHEDULE.one_minus_alpha_bar)


def of_prediction(weighting, kind, variance="posterior"):
    """The weight of the squared error of a prediction at every row, in float64."""
    gain = PREDICTIONS[kind].gain(SCHEDULE)
    log_variance = VARIANCES[variance].log_variance(SCHEDULE, None)
    return np.float64(weighting(SCHEDULE, gain, log_variance) / gain**2)


def normal_kl(mean_1, variance_1, mean_2, variance_2):
    """KL of two Gaussians in float64."""
    mean_1, variance_1, mean_2, variance_2 = map(
        np.float64, (mean_1, variance_1, mean_2, variance_2)
    )
    ratio = variance_1 / variance_2
    return (ratio - 1 - np.log(ratio) + (mean_1 - mean_2) ** 2 / variance_2) / 2


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", BETAS)
def test_the_exact_weight_times_the_error_is_the_kl(kind, variance, name):
    """For random predictions and t >= 2 the product is the KL of two means with one variance.

    Adding the KL's term of the variances gives the whole L_{t-1}.
    """
    betas = BETAS[name](1000)
    schedule, row = schedules.from_betas(betas), columns(betas)
    draws = np.random.default_rng(0)
    x_0, eps, output, of_variance = draws.standard_normal((4, 1000))
    x_t = np.sqrt(row.alpha_bar) * x_0 + np.sqrt(row.noise) * eps
    encode = {
        "eps": lambda x_0, eps: eps,
        "x_0": lambda x_0, eps: x_0,
        "v": lambda x_0, eps: np.sqrt(row.alpha_bar) * eps - np.sqrt(row.noise) * x_0,
        "mu": lambda x_0, eps: (x_t - row.beta / np.sqrt(row.noise) * eps) / np.sqrt(row.alpha),
        "score": lambda x_0, eps: -eps / np.sqrt(row.noise),
    }[kind]
    # the predicted x_0, and the eps that belongs to it
    guess = 0.3 * output
    guess_eps = (x_t - np.sqrt(row.alpha_bar) * guess) / np.sqrt(row.noise)
    error = encode(x_0, eps) - encode(guess, guess_eps)

    log_variance = np.float64(
        VARIANCES[variance].log_variance(schedule, jnp.asarray(of_variance, jnp.float32))
    )
    gain = PREDICTIONS[kind].gain(schedule)
    weight = np.float64(WEIGHTINGS["vlb"]()(schedule, gain, jnp.float32(log_variance)) / gain**2)

    def mean(x_0):  # of the posterior, DDPM eq. 7
        of_x_0 = np.sqrt(row.alpha_bar_prev) * row.beta / row.noise
        return of_x_0 * x_0 + np.sqrt(row.alpha) * row.noise_prev / row.noise * x_t

    kl = normal_kl(mean(x_0), np.exp(log_variance), mean(guess), np.exp(log_variance))
    np.testing.assert_allclose((weight * error**2)[1:], kl[1:], rtol=1e-5)
    # with the term of the variances it is the whole L_{t-1}, up to rounding of the sum
    with np.errstate(divide="ignore"):
        whole = normal_kl(mean(x_0), row.posterior_variance, mean(guess), np.exp(log_variance))
    clipped = schedules.clip_posterior_variance(schedule)
    term = likelihood.variational_term(
        clipped, *(jnp.float32(a) for a in (x_0, guess, log_variance)), None
    )
    np.testing.assert_allclose(term[1:], whole[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BETAS)
def test_the_x_0_weight_at_the_posterior_variance_is_half_the_drop_of_the_snr(name):
    betas = BETAS[name](1000)
    schedule, row = schedules.from_betas(betas), columns(betas)
    log_variance = VARIANCES["posterior"].log_variance(schedule, None)
    with np.errstate(divide="ignore"):
        snr_prev = row.alpha_bar_prev / row.noise_prev
    half_drop = (snr_prev - row.alpha_bar / row.noise) / 2
    found = weightings.vlb_weight(schedule, log_variance)
    np.testing.assert_allclose(found[1:], half_drop[1:], rtol=2e-5)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_simple_weight_is_one(kind):
    np.testing.assert_array_equal(of_prediction(WEIGHTINGS["simple"](), kind), 1)


# The weights that the papers print, for the prediction that each paper uses.
PAPERS = {
    "Salimans & Ho: SNR on x_0 is eps's simple loss": ("snr", {}, "eps", np.ones(T)),
    "Salimans & Ho: truncated, on x_0": ("truncated_snr", {}, "x_0", np.maximum(SNR, 1)),
    "Salimans & Ho: truncated, on eps": ("truncated_snr", {}, "eps", np.maximum(1, 1 / SNR)),
    "Hang et al.: on x_0": ("min_snr", {"gamma": 5.0}, "x_0", np.minimum(SNR, 5)),
    "Hang et al.: on eps": ("min_snr", {"gamma": 5.0}, "eps", np.minimum(SNR, 5) / SNR),
    "Hang et al.: on v": ("min_snr", {"gamma": 5.0}, "v", np.minimum(SNR, 5) / (SNR + 1)),
    "Choi et al.: on eps": ("p2", {"gamma": 0.5, "k": 2.0}, "eps", (2 + SNR) ** -0.5),
    "Kingma & Gao: on eps": ("sigmoid", {"bias": 1.0}, "eps", 1 / (1 + SNR / np.e)),
    "Karras et al.: on D": ("edm", {"sigma_data": 0.5}, "x_0", (1 / SNR + 0.25) / (0.25 / SNR)),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_weightings_are_those_of_the_papers(paper):
    name, arguments, kind, expected = PAPERS[paper]
    np.testing.assert_allclose(
        of_prediction(WEIGHTINGS[name](**arguments), kind), expected, rtol=1e-5
    )


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "simple"])
def test_the_loss_of_a_guess_of_x_0_does_not_depend_on_the_prediction(name):
    """A guess of x_0 has the same loss whether it is encoded as eps, x_0, v, mu or score."""
    draws = jax.random.normal(jax.random.key(0), (3, T, 5))
    x_0, eps, guess_x_0 = draws
    losses = {}
    for kind, parametrisation in PREDICTIONS.items():

        def loss(row, x_0, eps, guess_x_0, parametrisation=parametrisation):
            x_t = process.q_sample(row, x_0, eps)
            guess = Prediction(guess_x_0, process.eps_of_x_0(row, x_t, guess_x_0))
            truth = Prediction(x_0, eps)
            miss = parametrisation.encode(row, truth, x_t) - parametrisation.encode(row, guess, x_t)
            gain = parametrisation.gain(row)
            log_variance = VARIANCES["posterior"].log_variance(row, None)
            return WEIGHTINGS[name]()(row, gain, log_variance) / gain**2 * jnp.mean(miss**2)

        losses[kind] = jax.vmap(loss)(SCHEDULE, x_0, eps, guess_x_0)
    for kind, found in losses.items():
        np.testing.assert_allclose(found, losses["x_0"], rtol=5e-4, err_msg=kind)


def test_denoising_score_matching_is_the_simple_loss_of_the_score():
    """E |s - grad log q(x_t|x_0)|^2 (Vincent 2011) is 1/(1 - alpha_bar) times the loss of eps."""
    x_0, eps, guess_x_0 = jax.random.normal(jax.random.key(0), (3, T, 5))
    x_t = jax.vmap(process.q_sample)(SCHEDULE, x_0, eps)

    def loss(kind, output):
        chosen = Objective(
            PREDICTIONS[kind],
            WEIGHTINGS["simple"](),
            False,
            VARIANCES["posterior"],
            0.0,
            TIMESTEP_SAMPLERS["uniform"],
            None,
            None,
            0.0,
        )

        def of_example(row, x_0, eps, x_t, output):
            truth = Prediction(x_0, eps)
            noised = NoisedExample(x_0, x_t, PREDICTIONS[kind].encode(row, truth, x_t))
            return example_loss(chosen, T, row, noised, output)

        return np.float64(jax.vmap(of_example)(SCHEDULE, x_0, eps, x_t, output))

    def log_q(x_t, row, x_0):
        return -jnp.sum((x_t - jnp.sqrt(row.alpha_bar) * x_0) ** 2) / (2 * row.one_minus_alpha_bar)

    noise = np.float64(SCHEDULE.one_minus_alpha_bar)
    score = -guess_x_0 / np.sqrt(noise)[:, None]
    truth = jax.vmap(jax.grad(log_q))(x_t, SCHEDULE, x_0)
    expected = np.mean((np.float64(score) - np.float64(truth)) ** 2, axis=1)
    np.testing.assert_allclose(loss("score", jnp.float32(score)), expected, rtol=2e-3)
    np.testing.assert_allclose(
        loss("score", jnp.float32(score)), loss("eps", guess_x_0) / noise, rtol=1e-5
    )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "from_betas"])
def test_gain_is_the_derivative_by_x_0_at_a_given_x_t(kind, name):
    schedule = SCHEDULES[name](T)
    x_t = jnp.float32(0.4)
    for row in (schedule[0], schedule[T // 2], schedule[T - 1]):
        if not determines_x_0(PREDICTIONS[kind], row):
            continue

        def encoded(x_0, row=row):
            truth = Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))
            return PREDICTIONS[kind].encode(row, truth, x_t)

        slope = jax.grad(encoded)(jnp.float32(0.1))
        np.testing.assert_allclose(PREDICTIONS[kind].gain(row), abs(slope), rtol=1e-5)


@pytest.mark.parametrize(
    ("create", "named"),
    [
        (lambda: weightings.min_snr(gamma=0.0), "gamma = 0.0"),
        (lambda: weightings.p2(gamma=-1.0), "gamma = -1.0"),
        (lambda: weightings.p2(k=0.0), "k = 0.0"),
        (lambda: weightings.edm(sigma_data=-0.5), "sigma_data = -0.5"),
    ],
)
def test_impossible_arguments_are_named(create, named):
    with pytest.raises(ConfigError, match=named):
        create()

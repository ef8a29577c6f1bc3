"""VDM's learned schedule is monotone and differentiable, and its loss is the continuous bound."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gaussian import gaussian
from rounding import UNIT
from runs import TOY2D, arguments, run

from diffusion_jax.diffusion import learned_schedule, process, schedules, timesteps
from diffusion_jax.diffusion.learned_schedule import LearnedSchedule
from diffusion_jax.diffusion.losses import Examples, LossInputs, Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS

RECIPE = LearnedSchedule(50, 8.0, -6.0)
MEAN, VARIANCE = 0.3, 0.2


def some_params(seed=0, size=0.5):
    """Random parameters, as after some training."""
    params = learned_schedule.init(RECIPE, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)]
    return jax.tree.unflatten(structure, moved)


def along(params, u):
    return jax.vmap(lambda u: learned_schedule.moment_at(RECIPE, params, u))(u)


@pytest.mark.parametrize("seed", range(3))
def test_log_snr_falls_between_its_two_ends(seed):
    params = some_params(seed)
    found = np.asarray(along(params, jnp.linspace(0, 1, 300)).log_snr)
    assert np.all(np.diff(found) < 0)
    gap = np.log1p(np.exp(params["gap"]))
    np.testing.assert_allclose(found[[0, -1]], [params["start"], params["start"] - gap], rtol=1e-5)


def test_at_initialisation_it_has_the_requested_ends_and_is_nearly_linear():
    params = learned_schedule.init(RECIPE, jax.random.key(0))
    u = jnp.linspace(0, 1, 101)
    found = along(params, u).log_snr
    np.testing.assert_allclose(found, 8 - 14 * u, atol=0.7)
    np.testing.assert_allclose(found[jnp.array([0, -1])], [8, -6], rtol=1e-5)


def test_the_rate_is_the_derivative():
    params, h = some_params(), 1e-3
    for u in (0.05, 0.5, 0.93):
        behind, _, ahead = along(params, jnp.float32([u - h, u, u + h])).log_snr.tolist()
        rate = learned_schedule.moment_at(RECIPE, params, jnp.float32(u)).rate
        np.testing.assert_allclose(rate, (behind - ahead) / (2 * h), rtol=5e-3)


def test_moment_at_is_the_same_in_64_bit_mode():
    """In 64-bit mode arrays without an explicit dtype and a float32 u have different dtypes."""
    params = some_params()
    narrow = learned_schedule.moment_at(RECIPE, params, jnp.float32(0.3))
    with jax.enable_x64(True):
        for u in (jnp.float32(0.3), jnp.float64(0.3)):
            wide = learned_schedule.moment_at(RECIPE, params, u)
            np.testing.assert_allclose(wide.log_snr, narrow.log_snr, rtol=1e-5)
            np.testing.assert_allclose(wide.rate, narrow.rate, rtol=1e-5)


def test_discretised_it_is_a_valid_schedule():
    params = some_params()
    schedule = learned_schedule.discretise(RECIPE, params)
    assert len(schedule) == 50
    np.testing.assert_allclose(schedule.timestep[jnp.array([0, -1])], [1, 50], rtol=1e-5)
    expected = along(params, jnp.linspace(0, 1, 50)).log_snr
    np.testing.assert_allclose(schedule.log_snr, expected, rtol=1e-5, atol=1e-5)
    alpha_bar = np.cumprod(1 - np.float64(schedule.beta))
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=2e-5)
    np.testing.assert_allclose(schedule.beta + schedule.alpha, 1, rtol=1e-6)
    # Continuous time has the same noise levels and gives the network the same timesteps
    for i in (0, 20, 49):
        moment = learned_schedule.moment_at(RECIPE, params, jnp.float32(i / 49))
        row = learned_schedule.row_at(moment)
        np.testing.assert_allclose(row.timestep, schedule.timestep[i], rtol=1e-5)
        np.testing.assert_allclose(row.alpha_bar, schedule.alpha_bar[i], rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_columns_of_a_learned_schedule_are_exact_where_log_snrs_are_close(seed):
    """They agree with the same formulas in float64; neighbours differ by thousandths."""
    params = some_params(seed)
    recipe = RECIPE._replace(num_timesteps=1000)
    found = learned_schedule.discretise(recipe, params)
    exact = {name: np.float64(leaf) for name, leaf in params.items()}
    linear, weight_in, weight_out, gap = (
        np.logaddexp(exact[name], 0) for name in ("linear", "weight_in", "weight_out", "gap")
    )
    u = np.linspace(0, 1, 1000)[:, None]
    m = linear * u[:, 0] + weight_out @ (1 / (1 + np.exp(-(weight_in * u + exact["bias"])))).T
    log_snr = exact["start"] - gap * (m - m[0]) / (m[-1] - m[0])
    expected = schedules.from_log_snr(log_snr, np.arange(1.0, 1001))
    for name in ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar", "posterior_variance"):
        column, reference = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(column, reference, rtol=1e-5, err_msg=name)


def objective(levels=None, kind="eps"):
    return Objective(
        PREDICTIONS[kind],
        WEIGHTINGS["vlb"](),
        True,
        VARIANCES["posterior"],
        0.001,
        TIMESTEP_SAMPLERS["low_discrepancy"],
        levels,
        None,
        0.0,
    )


def batch_losses(params, x_0, apply, seed=0, indices=None, kind="eps", levels=None):
    size = 64
    indices = jnp.arange(size) if indices is None else indices
    schedule = schedules.cosine(RECIPE.num_timesteps)  # not used
    examples = Examples(x_0=x_0, label=None, indices=indices, batch_size=size)
    inputs = LossInputs(schedule, (), jax.random.key(seed), examples)
    losses_of = learned_schedule.continuous_time(objective(levels, kind), apply, RECIPE)
    return losses_of({"schedule": params}, inputs)


def exact(params, kind="eps"):
    """The exact denoiser of Gaussian data as a network, which gets the timestep."""
    predict = gaussian(MEAN, VARIANCE)

    def apply(_, x_t, timestep, label, keys):
        def of_example(x_t, t):
            gap = jax.nn.softplus(params["gap"])
            log_snr = params["start"] - gap * (t - 1) / (RECIPE.num_timesteps - 1)
            row = schedules.from_log_snr(log_snr[None], t[None])[0]
            return PREDICTIONS[kind].encode(row, predict(x_t, row), x_t)

        return jax.vmap(of_example)(x_t, timestep)

    return apply


@pytest.mark.parametrize("kind", ["eps", "x_0", "v", "score"])
def test_the_loss_of_the_exact_denoiser_is_the_bound(kind):
    """The bound is known in closed form: reconstruction, integral of the MMSE, and prior."""
    params = some_params()
    dims, repeats = 400, 40
    totals = []
    step = jax.jit(
        lambda x_0, seed: batch_losses(params, x_0, exact(params, kind), seed, kind=kind).losses
    )
    for seed in range(repeats):
        noise = jax.random.normal(jax.random.key(100 + seed), (64, dims))
        totals.append(np.float64(step(MEAN + np.sqrt(VARIANCE) * noise, seed)).mean())
    gap = np.log1p(np.exp(np.float64(params["gap"])))
    start = np.float64(params["start"])
    high, low = np.exp(start), np.exp(start - gap)
    middle = (np.log1p(VARIANCE * high) - np.log1p(VARIANCE * low)) / 2
    first = (1 + np.log(2 * np.pi) - start) / 2
    alpha_bar = low / (1 + low)
    last = (alpha_bar * (VARIANCE + MEAN**2) - alpha_bar - np.log1p(-alpha_bar)) / 2
    expected = (first + middle + last) / np.log(2)
    error = np.std(totals, ddof=1) / np.sqrt(repeats)
    assert error < 0.02
    assert abs(np.mean(totals) - expected) < 4 * error


def test_reconstruction_is_a_distribution_over_the_levels():
    """The probabilities of the levels sum to 1; with little noise the right level has them all."""
    values = jnp.linspace(-1, 1, 17)
    for log_snr in (10.0, 4.0, 0.0):
        row = schedules.from_log_snr(jnp.array([log_snr]), jnp.array([1.0]))[0]
        z = 0.31  # z_0 / sqrt(alpha_bar); below, eps is chosen so that each level leads to it
        nats = [
            learned_schedule.reconstruction_term(row, x, (z - x) / row.sigma, 17) for x in values
        ]
        np.testing.assert_allclose(np.exp(-np.float64(nats)).sum(), 1, rtol=1e-3)
    sharp = schedules.from_log_snr(jnp.array([10.0]), jnp.array([1.0]))[0]
    assert learned_schedule.reconstruction_term(sharp, values, jnp.zeros(17), 17).max() < 1e-5


def test_losses_do_not_depend_on_how_the_batch_is_split():
    params = some_params()
    x_0 = jax.random.normal(jax.random.key(5), (64, 3))
    found = jax.jit(lambda x_0, indices: batch_losses(params, x_0, exact(params), 0, indices))
    part = jnp.array([60, 3, 17, 0])
    whole, split = found(x_0, jnp.arange(64)), found(x_0[part], part)
    np.testing.assert_allclose(split.losses, whole.losses[part], rtol=2e-5)
    np.testing.assert_array_equal(split.rows, whole.rows[part])


def test_the_ends_are_trained_by_the_bound_and_the_shape_by_its_variance():
    """The shape parameters have the gradient of the mean squared loss, as in VDM."""
    params = some_params()
    x_0 = MEAN + np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(5), (64, 3))
    network = exact(params)

    def found(schedule):
        return jnp.mean(batch_losses(schedule, x_0, network).losses)

    # the same losses without custom gradients, from the same times and the same noise
    common_key, example_key = jax.random.split(jax.random.key(0))
    u = timesteps.spread(common_key, jnp.arange(64), 64)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(example_key, jnp.arange(64))
    noise_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T[0]

    def diffusion(schedule):
        def of_example(u, key, x_0):
            moment = learned_schedule.moment_at(RECIPE, schedule, u)
            row = learned_schedule.row_at(moment)
            eps = jax.random.normal(key, x_0.shape)
            x_t = process.q_sample(row, x_0, eps)
            output = network(None, x_t[None], row.timestep[None], None, None)[0]
            return jnp.mean(moment.rate * (eps - output) ** 2) / 2 / np.log(2)

        return jax.vmap(of_example)(u, noise_keys, x_0)

    gradient = jax.jit(jax.grad(found))(params)
    expected = jax.jit(jax.grad(lambda schedule: jnp.mean(diffusion(schedule) ** 2)))(params)
    # The schedule is nearly linear, so terms like those of the gap nearly cancel in the gradient of
    # "linear". They are about four times those of the gap. Except with probability exp(-8^2 / 2),
    # rounding 64 of them costs at most 8 sqrt(64) units.
    terms = 4 * np.abs(expected["gap"]) * jax.nn.softplus(params["gap"])
    rounded = {"linear": 64 * UNIT * terms}
    for name in set(gradient) - set(learned_schedule.ENDS):
        scale = np.abs(expected[name]).max()
        assert scale > 0, name
        atol = 2e-4 * scale + rounded.get(name, 0)
        np.testing.assert_allclose(gradient[name], expected[name], atol=atol)
    for name in learned_schedule.ENDS:
        assert gradient[name] != 0


@pytest.mark.slow
def test_training_the_shape_lowers_the_variance_of_the_loss():
    """The bound does not depend on the shape between the ends; its variance does."""
    bent = learned_schedule.init(RECIPE, jax.random.key(0))
    bent |= {"weight_out": jnp.full(learned_schedule.HIDDEN, -2.0), "bias": bent["bias"] * 3}
    bent["weight_in"] = bent["weight_in"] * 3
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state, seed):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), seed), (64, 64))
        x_0 = MEAN + np.sqrt(VARIANCE) * noise

        def loss(inner):
            moved = bent | inner
            found = batch_losses(moved, x_0, exact(bent), seed).losses
            return jnp.mean(found), found

        inner = {name: params[name] for name in params if name not in learned_schedule.ENDS}
        gradient, found = jax.grad(loss, has_aux=True)(inner)
        updates, state = optimizer.update(gradient, state)
        return params | optax.apply_updates(inner, updates), state, found

    inner = {name: bent[name] for name in bent if name not in learned_schedule.ENDS}
    params, state = bent, optimizer.init(inner)
    moments = []
    for seed in range(150):
        params, state, found = step(params, state, seed)
        moments.append((float(found.mean()), float(found.var())))
    before, after = np.mean(moments[:10], axis=0), np.mean(moments[-10:], axis=0)
    assert after[1] < 0.7 * before[1]
    assert abs(after[0] - before[0]) < 0.05


@pytest.mark.slow
def test_a_run_learns_its_schedule_and_is_evaluated_and_sampled_with_it(tmp_path):
    fields = TOY2D | {
        "schedule.name": "learned",
        "loss.weighting": "vlb",
        "train.num_steps": 100,
        "checkpoint.every_steps": 50,
        "optimizer.learning_rate": 1e-2,
        "evaluate.num_examples": 64,
    }
    workdir = tmp_path / "run"
    done = run(arguments(workdir, fields), tmp_path / "log")
    assert done.code == 0, done.stderr
    cards = [line for line in done.stdout.splitlines() if line.startswith("SNR")]
    assert len(cards) == 2
    assert cards[0] != cards[1]
    assert (workdir / "samples" / "grid.png").exists()
    done = run(arguments(workdir, fields, mode="evaluate"), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert np.isfinite(json.loads((workdir / "evaluation.json").read_text())["bits_per_dim"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss.weighting", "simple"),
        ("loss.timesteps", "importance"),
        ("loss.variance", "learned"),
        ("loss.prediction", "mu"),
        ("schedule.s", 0.1),
        ("schedule.zero_terminal_snr", "true"),
        ("schedule.log_snr_end", 14.0),
    ],
)
def test_a_field_that_does_not_fit_a_learned_schedule_is_one_line(tmp_path, field, value):
    fields = TOY2D | {"schedule.name": "learned", "loss.weighting": "vlb", field: value}
    done = run(arguments(tmp_path / "run", fields), tmp_path / "log")
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "config.schedule.log_snr" in done.stderr or f"config.{field}" in done.stderr
    assert not (tmp_path / "run").exists()

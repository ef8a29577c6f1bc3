"""The training loss against a plain loop in numpy, its known minimum, and its gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import cosine_betas, gaussian, rows

from diffusion_jax.diffusion import learned_schedule, losses, process, schedules
from diffusion_jax.diffusion.learned_schedule import LearnedSchedule
from diffusion_jax.diffusion.losses import Examples, LossInputs, NoisedExample, Objective
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.models import create_model

T, BATCH, SHAPE = 8, 8, (3, 2)
NUM_CLASSES = 3  # label 3 means "no class"
KEY = jax.random.key(4)
KINDS = sorted(PREDICTIONS)
ALL = [*itertools.product(KINDS, WEIGHTINGS, ["uniform"])]
ALL += [("eps", "simple", name) for name in TIMESTEP_SAMPLERS if name != "uniform"]


def objective(
    kind="eps",
    weighting="simple",
    timesteps="uniform",
    variance="posterior",
    is_vlb=False,
    vlb_scale=0.001,
    levels=None,
    label_dropout=0.0,
):
    """An objective; the weighting "vlb" weights the error unless ``is_vlb`` asks for L_vlb."""
    return Objective(
        PREDICTIONS[kind],
        WEIGHTINGS[weighting](),
        is_vlb,
        VARIANCES[variance],
        vlb_scale,
        TIMESTEP_SAMPLERS[timesteps],
        levels,
        NUM_CLASSES,
        label_dropout,
    )


def weight_of(chosen, kind, row):
    """The weight of the squared error of the prediction, at one row of a schedule."""
    gain = PREDICTIONS[kind].gain(row)
    return float(chosen.weighting(row, gain, jnp.log(row.posterior_variance)) / gain**2)


def chain():
    return schedules.clip_posterior_variance(schedules.from_betas(cosine_betas(T)))


def half(params, x_t, timestep, label, keys):
    """A network that returns x_t times a parameter, which is 1/2 in most tests."""
    return params["scale"] * x_t


def batch_losses(objective, apply=half, seed=0, x_0=None, indices=None, size=BATCH, label=None):
    schedule = schedules.from_betas(cosine_betas(T))
    indices = jnp.arange(size) if indices is None else indices
    x_0 = images(size)[indices] if x_0 is None else x_0
    params, key, state = {"scale": jnp.float32(0.5)}, jax.random.key(seed), objective.timesteps
    examples = Examples(x_0=x_0, label=label, indices=indices, batch_size=size)
    inputs = LossInputs(schedule, state.init(T), key, examples)
    found = losses.discrete_time(objective, apply)(params, inputs)
    return found.losses, found.rows


def images(size=BATCH):
    return jax.random.uniform(jax.random.key(9), (size, *SHAPE), minval=-1.0)


def examples_of(x_0, label=None):
    """A whole batch on one device."""
    return Examples(x_0=x_0, label=label, indices=jnp.arange(len(x_0)), batch_size=len(x_0))


def recorded(calls):
    """The network ``half``, which also appends its inputs to ``calls``."""

    def apply(params, x_t, timestep, label, keys):
        calls.append((x_t, timestep, label, keys))
        return half(params, x_t, timestep, label, keys)

    return apply


def target(kind, row, x_0, eps, x_t):
    """The target of the network in the papers."""
    return {
        "eps": lambda: eps,
        "x_0": lambda: x_0,
        "v": lambda: np.sqrt(row.alpha_bar) * eps - np.sqrt(row.noise) * x_0,
        "mu": lambda: (x_t - row.beta / np.sqrt(row.noise) * eps) / np.sqrt(row.alpha),
        "score": lambda: -eps / np.sqrt(row.noise),
    }[kind]()


@pytest.mark.parametrize(("kind", "weighting", "timesteps"), ALL)
def test_batch_losses_are_a_loop_over_the_examples(kind, weighting, timesteps):
    calls = []
    chosen = objective(kind, weighting, timesteps)
    found, position = batch_losses(chosen, recorded(calls))
    [(x_t, timestep, _, _)] = calls
    np.testing.assert_array_equal(timestep, position + 1)
    for i in range(BATCH):
        row, x_0 = rows(cosine_betas(T))[position[i]], np.asarray(images()[i], np.float64)
        # the noise between x_0 and the x_t that the network got
        eps = (np.asarray(x_t[i], np.float64) - np.sqrt(row.alpha_bar) * x_0) / np.sqrt(row.noise)
        error = target(kind, row, x_0, eps, x_t[i]) - 0.5 * np.asarray(x_t[i], np.float64)
        weight = weight_of(chosen, kind, chain()[position[i]])
        np.testing.assert_allclose(found[i], weight * np.mean(error**2), rtol=2e-5)


def test_the_noise_is_standard_normal_and_each_example_has_its_own():
    calls, size, dimensions = [], 64, 2000
    batch_losses(objective(), recorded(calls), x_0=jnp.zeros((size, dimensions)), size=size)
    [(x_t, timestep, _, _)] = calls
    noise = np.array([row.noise for row in rows(cosine_betas(T))])[np.int32(timestep) - 1]
    eps = np.asarray(x_t, np.float64) / np.sqrt(noise)[:, None]
    assert abs(eps.mean()) < 5 / np.sqrt(eps.size)
    assert abs(eps.var() - 1) < 5 * np.sqrt(2 / eps.size)
    # The correlation of two examples is N(0, 1/dimensions); none of 2,016 pairs is beyond 6 sigma
    correlation = np.corrcoef(eps) - np.eye(size)
    assert np.abs(correlation).max() < 6 / np.sqrt(dimensions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_example_loss_is_a_weighted_mean_square(kind, weighting):
    chosen, schedule = objective(kind, weighting), chain()
    for i in range(T):
        weight = weight_of(chosen, kind, schedule[i])
        assert 0 < weight < np.inf
        assert weighting != "simple" or weight == 1
        target, output = jnp.array([[1.0, 2.0]]), jnp.array([[4.0, -2.0]])
        noised = NoisedExample(jnp.zeros((1, 2)), jnp.zeros((1, 2)), target)
        loss = losses.example_loss(chosen, T, schedule[i], noised, output)
        np.testing.assert_allclose(loss, weight * (3**2 + 4**2) / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_output_has_no_loss(kind):
    # The data are a single image, so x_t determines eps and every other target
    schedule, image = schedules.cosine(T), images()[0]

    def apply(params, x_t, timestep, label, keys):
        def of_example(x_t, t):
            row = schedule[t.astype(int) - 1]
            truth = process.Prediction(image, process.eps_of_x_0(row, x_t, image))
            return PREDICTIONS[kind].encode(row, truth, x_t)

        return jax.vmap(of_example)(x_t, timestep)

    found, _ = batch_losses(objective(kind), apply, x_0=jnp.broadcast_to(image, (BATCH, *SHAPE)))
    np.testing.assert_allclose(found, 0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_the_best_network_is_the_conditional_variance(kind):
    # x_0 ~ N(m, c): var(x_0 | x_t) = c (1 - ab) / (ab c + 1 - ab); every target is linear in x_0
    mean, variance, size = 0.4, 0.3, 64
    schedule, dimensions = schedules.from_betas(cosine_betas(T)), 2000
    x_0 = mean + np.sqrt(variance) * jax.random.normal(jax.random.key(1), (size, dimensions))
    best = gaussian(mean, variance)

    def apply(params, x_t, timestep, label, keys):
        def of_example(x_t, t):
            row = schedule[t.astype(int) - 1]
            return PREDICTIONS[kind].encode(row, best(x_t, row), x_t)

        return jax.vmap(of_example)(x_t, timestep)

    found, position = batch_losses(
        objective(kind, timesteps="low_discrepancy"), apply, x_0=x_0, size=size
    )
    for i, row in enumerate(rows(cosine_betas(T))):
        # d target / d x_0 at fixed x_t
        slope = {
            "eps": np.sqrt(row.alpha_bar / row.noise),
            "x_0": 1,
            "v": 1 / np.sqrt(row.noise),
            "mu": np.sqrt(row.alpha_bar_prev) * row.beta / row.noise,
            "score": np.sqrt(row.alpha_bar) / row.noise,
        }[kind]
        least = slope**2 * variance * row.noise / (row.alpha_bar * variance + row.noise)
        of_row = np.asarray(found)[np.asarray(position) == i]
        num_samples = len(of_row) * dimensions
        assert abs(of_row.mean() / least - 1) < 5 * np.sqrt(2 / num_samples), i


@pytest.mark.parametrize("timesteps", TIMESTEP_SAMPLERS)
def test_losses_do_not_depend_on_how_the_batch_is_split(timesteps):
    whole, position = batch_losses(objective(timesteps=timesteps))
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 0, 4, 2]):
        indices = jnp.array(part)
        loss, where = batch_losses(objective(timesteps=timesteps), indices=indices)
        np.testing.assert_array_equal(where, position[indices])
        np.testing.assert_allclose(loss, whole[indices], rtol=1e-6)


def test_under_jit_with_the_schedule_as_an_argument():
    traces = []

    def loss(schedule, key):
        traces.append(())
        inputs = LossInputs(schedule, (), key, examples_of(images()))
        losses_of = losses.discrete_time(objective("v"), half)
        return losses_of({"scale": jnp.float32(0.5)}, inputs).losses

    compiled = jax.jit(loss)
    inputs = [(0, 0.0), (0, 0.008), (0, 0.1), (1, 0.1)]
    values = [compiled(schedules.cosine(T, s=s), jax.random.key(seed)) for seed, s in inputs]
    assert len(traces) == 1
    np.testing.assert_allclose(values[1], loss(schedules.cosine(T), jax.random.key(0)), rtol=1e-5)
    for first, second in itertools.combinations(values, 2):
        assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(("kind", "weighting", "timesteps"), ALL)
def test_the_gradient_is_that_of_a_loop_over_the_examples(kind, weighting, timesteps):
    # d/dw of weight (target - w x_t)^2 at w = 1/2
    calls = []
    chosen = objective(kind, weighting, timesteps)
    batch_losses(chosen, recorded(calls))
    x_t, position = np.asarray(calls[0][0], np.float64), np.int32(calls[0][1]) - 1
    expected = []
    for i in range(BATCH):
        row, x_0 = rows(cosine_betas(T))[position[i]], np.asarray(images()[i], np.float64)
        eps = (x_t[i] - np.sqrt(row.alpha_bar) * x_0) / np.sqrt(row.noise)
        miss = target(kind, row, x_0, eps, x_t[i]) - 0.5 * x_t[i]
        weight = weight_of(chosen, kind, chain()[position[i]])
        expected.append(weight * np.mean(-2 * x_t[i] * miss))

    def mean_loss(scale):
        def apply(params, x_t, *rest):
            return scale * x_t

        return jnp.mean(batch_losses(chosen, apply)[0])

    gradient = jax.grad(mean_loss)(jnp.float32(0.5))
    scale = np.mean(np.abs(expected))
    np.testing.assert_allclose(gradient, np.mean(expected), rtol=0, atol=2e-5 * scale)


def test_the_network_gets_the_labels_unchanged():
    calls, label = [], jnp.arange(BATCH) % 3
    batch_losses(objective(), recorded(calls), label=label)
    batch_losses(objective(), recorded(calls))
    np.testing.assert_array_equal(calls[0][2], label)
    assert calls[1][2] is None


def labels(size):
    return jnp.arange(size) % NUM_CLASSES


def inputs_and_losses(label_dropout, size, indices=None):
    """The inputs of the network under label dropout, and the losses."""
    calls = []
    chosen = objective(label_dropout=label_dropout)
    indices = jnp.arange(size) if indices is None else jnp.asarray(indices)
    x_0, label = images(size)[indices], labels(size)[indices]
    found, _ = batch_losses(
        chosen, recorded(calls), x_0=x_0, indices=indices, size=size, label=label
    )
    return *calls[0], found


@pytest.mark.parametrize("label_dropout", [0.1, 0.5])
def test_labels_are_dropped_with_the_probability_asked_for(label_dropout):
    size = 3000
    _, _, label, keys, _ = inputs_and_losses(label_dropout, size)
    dropped, true = np.asarray(label) == NUM_CLASSES, np.asarray(labels(size))
    np.testing.assert_array_equal(label[~dropped], true[~dropped])
    deviation = np.sqrt(label_dropout * (1 - label_dropout))
    for k in range(NUM_CLASSES):  # of each class alike
        share, count = dropped[true == k].mean(), size // NUM_CLASSES
        assert abs(share - label_dropout) < 5 * deviation / np.sqrt(count)
    # Label dropout is independent of the bits of the dropout masks
    mask = np.asarray(jax.vmap(jax.random.bernoulli)(keys))
    assert abs(np.mean(mask[dropped]) - 0.5) < 5 * 0.5 / np.sqrt(dropped.sum())


def test_which_labels_are_dropped_does_not_depend_on_how_the_batch_is_split():
    whole = inputs_and_losses(0.5, BATCH)[2]
    assert 0 < np.mean(whole == NUM_CLASSES) < 1
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 0, 4, 2]):
        np.testing.assert_array_equal(inputs_and_losses(0.5, BATCH, part)[2], whole[np.array(part)])


def test_dropping_labels_changes_nothing_else():
    x_t, timestep, label, keys, found = inputs_and_losses(0.0, BATCH)
    others = inputs_and_losses(0.5, BATCH)
    np.testing.assert_array_equal(label, labels(BATCH))
    np.testing.assert_array_equal(x_t, others[0])
    np.testing.assert_array_equal(timestep, others[1])
    np.testing.assert_array_equal(*(jax.random.key_data(k) for k in (keys, others[3])))
    np.testing.assert_array_equal(found, others[4])


def test_a_learned_schedule_drops_the_same_labels():
    calls, recipe = [], LearnedSchedule(T, 8.0, -6.0)
    params = {"scale": 0.5, "schedule": learned_schedule.init(recipe, KEY)}
    examples = examples_of(images(), labels(BATCH))
    inputs = LossInputs(schedules.cosine(T), (), jax.random.key(0), examples)
    for label_dropout in (0.0, 0.5):
        chosen = objective(label_dropout=label_dropout)
        learned_schedule.continuous_time(chosen, recorded(calls), recipe)(params, inputs)
    np.testing.assert_array_equal(calls[0][2], labels(BATCH))
    np.testing.assert_array_equal(calls[1][2], inputs_and_losses(0.5, BATCH)[2])


def test_the_embedding_of_no_class_is_trained_if_and_only_if_labels_are_dropped():
    fields = {"name": "mlp", "width": 4, "num_layers": 1, "class_conditional": True}
    model = create_model(fields, (2,), NUM_CLASSES)
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.float32(noise.standard_normal(leaf.shape)),
        jax.eval_shape(model.init, KEY),
    )
    examples = examples_of(jnp.ones((BATCH, 2)), labels(BATCH))
    inputs = LossInputs(schedules.cosine(T), (), KEY, examples)

    def gradient(label_dropout):
        losses_of = losses.discrete_time(objective(label_dropout=label_dropout), model.apply)

        def mean_loss(params):
            return jnp.mean(losses_of(params, inputs).losses)

        return np.asarray(jax.jit(jax.grad(mean_loss))(params)["embedding"]["label"]["embedding"])

    plain, dropped = gradient(0.0), gradient(0.5)
    assert plain.shape == (NUM_CLASSES + 1, 4 * 4)
    assert plain[:NUM_CLASSES].any(axis=1).all()
    assert not plain[NUM_CLASSES].any()
    assert dropped[NUM_CLASSES].all()


def test_dropout_keys_differ_by_example_and_step_and_not_by_batch():
    calls = []
    for seed in range(3):
        batch_losses(objective(), recorded(calls), seed=seed)
    batch_losses(objective(), recorded(calls), indices=jnp.arange(2, 6))
    keys = [np.asarray(jax.random.key_data(call[3])) for call in calls]
    assert len(np.unique(np.concatenate(keys[:3]), axis=0)) == 3 * BATCH
    np.testing.assert_array_equal(keys[3], keys[0][2:6])
    # The dropout mask and the noise must not use the same bits
    x_0, (x_t, timestep, _, dropout_keys) = images(), calls[0]
    for i in range(BATCH):
        row = rows(cosine_betas(T))[int(timestep[i]) - 1]
        same = jax.random.normal(dropout_keys[i], SHAPE)
        x_t_of_same = np.sqrt(row.alpha_bar) * x_0[i] + np.sqrt(row.noise) * same
        assert np.abs(x_t_of_same - x_t[i]).max() > 1e-3

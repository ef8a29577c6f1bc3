"""Training objectives, those of the registry and a user's own, as a training step calls them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.diffusion import learned_schedule, process, schedules
from diffusion_jax.diffusion.examples import Examples, example_keys
from diffusion_jax.diffusion.learned_schedule import LearnedSchedule
from diffusion_jax.diffusion.losses import BatchLosses, LossInputs, Objective, decode_output
from diffusion_jax.diffusion.objectives import OBJECTIVES
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.experiment.training import TrainingPlan
from diffusion_jax.training.step import ALONE, Constants, StepChoices, TrainState, train_step

T, BATCH, DIMS = 8, 6, 2
SCHEDULE = schedules.cosine(T)
RECIPE = LearnedSchedule(T, 8.0, -6.0)
RATE = 0.05


def objective(prediction="x_0"):
    return Objective(
        parametrisation=PREDICTIONS[prediction],
        weighting=WEIGHTINGS["simple"](),
        is_vlb=False,
        variance=VARIANCES["posterior"],
        vlb_scale=0.0,
        timesteps=TIMESTEP_SAMPLERS["uniform"],
        levels=None,
        num_classes=None,
        label_dropout=0.0,
    )


def linear(params, x_t, timestep, label, keys):
    """A network of one linear layer that ignores the timestep."""
    return x_t @ params["weight"] + params["bias"][None]


def initial():
    weight = jnp.float32(np.random.default_rng(0).standard_normal((DIMS, DIMS)))
    return {"weight": weight, "bias": jnp.zeros(DIMS)}


def regression(objective, apply, row):
    """An objective of a user: the squared error of x_0 at one fixed row of the schedule."""

    def losses_of(params, inputs):
        examples = inputs.examples
        keys = example_keys(inputs.key, examples.indices)
        eps = jax.vmap(lambda key, x_0: jax.random.normal(key, x_0.shape))(keys.first, examples.x_0)
        x_t = process.q_sample(inputs.schedule[row], examples.x_0, eps)
        timestep = jnp.full(len(x_t), inputs.schedule[row].timestep)
        output = apply(params, x_t, timestep, examples.label, keys.dropout)
        predicted = decode_output(objective, inputs.schedule[row], x_t, output).x_0
        losses = jnp.mean(jnp.square(predicted - examples.x_0), axis=1)
        return BatchLosses(losses, jnp.full(len(x_t), row), jnp.ones(len(x_t)))

    return losses_of


def plan():
    return TrainingPlan(
        num_steps=1,
        batch_size=BATCH,
        steps_per_call=None,
        steps_per_call_of_accelerators=1,
        log_every_steps=1,
        sample_every_steps=0,
        checkpoint_every_steps=1,
        keep_last=1,
        keep_best=0,
        keep_step=None,
        optimizer=optax.sgd(RATE),
        ema_decay=0.9,
        ema_warmup=False,
        flip=False,
        precision="default",
    )


def state_of(choices, params):
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=params,
        opt_state=choices.plan.optimizer.init(params),
        timestep_state=choices.timesteps.init(T),
    )


def compiled_step(losses_of):
    """A compiled step on one device, (state, points) -> (state, metrics), and its first state."""
    choices = StepChoices(losses_of, TIMESTEP_SAMPLERS["uniform"], plan(), None, ALONE)
    constants = Constants(SCHEDULE, jax.random.key(3))

    def step(state, x_0):
        batch = {"image": x_0, "label": None}
        return train_step(choices, state, constants, jnp.arange(BATCH), batch)

    return jax.jit(step), functools.partial(state_of, choices)


def points(seed=0):
    return 0.5 + 0.1 * jax.random.normal(jax.random.key(seed), (BATCH, DIMS))


def inputs(x_0):
    examples = Examples(x_0=x_0, label=None, indices=jnp.arange(len(x_0)), batch_size=len(x_0))
    return LossInputs(SCHEDULE, (), jax.random.key(3), examples)


# --- an objective of a user -----------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 3, T - 1])
def test_an_objective_of_a_user_trains_a_network(row):
    step, begin = compiled_step(regression(objective(), linear, row))
    before = initial()
    state, metrics = step(begin(before), points())
    # the same loss and gradient in float64, with the noise drawn from the keys of the step
    alpha_bar = float(SCHEDULE.alpha_bar[row])
    x_0 = np.float64(points())
    key = jax.random.fold_in(jax.random.key(3), 0)
    keys = example_keys(key, jnp.arange(BATCH)).first
    eps = np.float64(jnp.stack([jax.random.normal(key, (DIMS,)) for key in keys]))
    x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
    error = x_t @ np.float64(before["weight"]) - x_0
    gradient = {
        "weight": 2 * x_t.T @ error / error.size,
        "bias": 2 * error.sum(axis=0) / error.size,
    }
    np.testing.assert_allclose(metrics.loss, np.mean(error**2), rtol=1e-5)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-5)
    for name, leaf in gradient.items():
        assert np.abs(leaf).min() > 0
        expected = np.float64(before[name]) - RATE * leaf
        np.testing.assert_allclose(state.params[name], expected, rtol=1e-5, atol=1e-6)
        average = 0.9 * np.float64(before[name]) + 0.1 * expected
        np.testing.assert_allclose(state.ema[name], average, rtol=1e-5, atol=1e-6)
    # All losses count for the quartile that contains the row
    np.testing.assert_array_equal(metrics.quartile_weights, BATCH * (np.arange(4) == row * 4 // T))
    np.testing.assert_allclose(metrics.quartile_losses.sum(), BATCH * metrics.loss, rtol=1e-5)
    assert state.step == 1


def test_an_objective_of_a_user_is_minimised():
    step, begin = compiled_step(regression(objective(), linear, 3))
    state, losses = begin(initial()), []
    for number in range(400):
        state, metrics = step(state, points(number))
        losses.append(float(metrics.loss))
    assert np.isfinite(losses).all()
    # The best linear guess of x_0 ~ N(0.5, 0.01) is nearly its mean
    assert np.mean(losses[-50:]) < 0.05 < np.mean(losses[:3])


# --- the objectives of the registry ---------------------------------------------------------

MODELS = {
    "discrete_time": lambda: (initial(), linear, ()),
    "continuous_time": lambda: (
        {"network": initial(), "schedule": learned_schedule.init(RECIPE, jax.random.key(1))},
        lambda params, *rest: linear(params["network"], *rest),
        (RECIPE,),
    ),
}


def test_every_objective_is_tested():
    assert set(MODELS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("prediction", ["x_0", "eps", "v"])
def test_every_objective_has_a_loss_for_each_example_and_a_gradient(name, prediction):
    params, apply, own = MODELS[name]()
    losses_of = OBJECTIVES[name](objective(prediction), apply, *own)
    output = losses_of(params, inputs(points()))
    assert isinstance(output, BatchLosses)
    assert [leaf.shape for leaf in output] == [(BATCH,)] * 3
    assert ((output.rows >= 0) & (output.rows < T)).all()
    step, begin = compiled_step(losses_of)
    state, metrics = step(begin(params), points())
    assert np.isfinite(metrics.loss)
    changes = jax.tree.map(lambda new, old: np.asarray(new - old), state.params, params)
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        assert np.isfinite(change).all(), path
        assert change.any(), path

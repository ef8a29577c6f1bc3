"""docs/extending.md: every example runs as printed, and an experiment can use what it adds."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import REPOSITORY, TOY2D

from diffusion_jax.config import default
from diffusion_jax.config.config import load
from diffusion_jax.data import sources
from diffusion_jax.data.load import load_dataset
from diffusion_jax.diffusion import objectives, parametrisations, process, samplers, weightings
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.losses import LossInputs
from diffusion_jax.diffusion.schedules import families
from diffusion_jax.experiment.dataset import create_dataset_choice
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.models import MODELS

TEXT = (REPOSITORY / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
REGISTRIES = (
    default.FIELDS,
    families.SCHEDULES,
    samplers.SAMPLERS,
    weightings.WEIGHTINGS,
    parametrisations.PREDICTIONS,
    objectives.OBJECTIVES,
    MODELS,
    sources.DATASETS,
)


@pytest.fixture
def run(monkeypatch):
    """A function that runs the example of a section; the registries are restored afterwards."""
    before = [dict(registry) for registry in REGISTRIES]

    def run(section):
        names = {"__name__": "example"}
        exec(compile(EXAMPLES[section], section, "exec"), names)
        return names

    yield run
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


def create(**fields):
    fields = TOY2D | {name.replace("__", "."): value for name, value in fields.items()}
    overrides = [(name, str(value)) for name, value in fields.items() if value is not None]
    return load(str(pathlib.Path(REPOSITORY, "configs", "toy2d.py")), overrides)


def losses_of(experiment):
    x_0 = jnp.ones((4, 2)) / 2
    params = experiment.model.init(jax.random.key(0))
    examples = Examples(x_0=x_0, label=None, indices=jnp.arange(4), batch_size=4)
    inputs = LossInputs(experiment.schedule, (), jax.random.key(1), examples)
    return experiment.losses_of(params, inputs).losses


def test_there_is_a_short_example_of_each_extension():
    kinds = "schedule", "sampler", "weighting", "prediction", "objective", "network", "data set"
    assert [section.split(" ", 1)[1] for section in EXAMPLES] == list(kinds)
    for section, example in EXAMPLES.items():
        assert sum(bool(line.strip()) for line in example.splitlines()) < 25, section


def test_a_schedule(run):
    run("A schedule")
    config = create(schedule__name="geometric", schedule__first=0.001)
    beta = create_experiment(config).schedule.beta
    np.testing.assert_allclose(beta, 0.001 * 20 ** (np.arange(10) / 9), rtol=1e-6)
    traced = jax.jit(lambda first: families.SCHEDULES["geometric"](10, first))(0.001)
    np.testing.assert_allclose(traced.beta, beta, rtol=1e-5)


def test_a_sampler(run, capsys):
    names = run("A sampler")
    assert "0.5" in capsys.readouterr().out
    config = create(sampling__sampler="renoise", sampling__noise=0.5)
    assert create_experiment(config).sampling.sampler == names["Renoise"](0.5)


def test_a_weighting(run):
    run("A weighting")
    config = create(loss__weighting="soft_min_snr", loss__gamma=2.0)
    assert np.isfinite(losses_of(create_experiment(config))).all()


@pytest.mark.parametrize("timestep", [1, 10])
def test_a_prediction(run, timestep):
    run("A prediction")
    experiment = create_experiment(create(loss__prediction="velocity"))
    prediction, row = experiment.objective.parametrisation, experiment.schedule[timestep - 1]
    x_0, eps = jnp.float32([0.3, -1]), jnp.float32([2, 0.1])
    x_t = process.q_sample(row, x_0, eps)
    target = prediction.encode(row, process.Prediction(x_0, eps), x_t)
    for value, expected in zip(prediction.decode(row, x_t, target), (x_0, eps)):
        np.testing.assert_allclose(value, expected, atol=1e-4)

    def target_of(x_0):
        truth = process.Prediction(x_0, process.eps_of_x_0(row, x_t, x_0))
        return prediction.encode(row, truth, x_t)

    change = abs(jax.jacobian(target_of)(x_0)[0, 0])
    np.testing.assert_allclose(change, prediction.gain(row), rtol=1e-5)


def test_an_objective(run):
    run("An objective")
    experiment = create_experiment(create())
    ours = objectives.OBJECTIVES["huber"](experiment.objective, experiment.model.apply)
    losses = losses_of(experiment._replace(losses_of=ours))
    assert losses.shape == (4,)
    assert (losses > 0).all()


def test_a_network(run):
    run("A network")
    config = create()
    with config.unlocked():
        config.model = {"name": "shallow", "width": 8, "class_conditional": False}
    assert np.isfinite(losses_of(create_experiment(config.lock()))).all()


def test_a_data_set(run):
    run("A data set")
    dataset = load_dataset(create_dataset_choice(create(dataset__name="spiral")))
    assert len(dataset.train.images) == 2000
    assert dataset.test.labels.max() == 1

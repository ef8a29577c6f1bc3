"""The precision of products that the config says is that of the lowered program of each mode."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from runs import DIGITS, REPOSITORY, TOY2D, arguments, run

from diffusion_jax.config.config import load
from diffusion_jax.data.dataset import Split
from diffusion_jax.diffusion.bound import stratify
from diffusion_jax.evaluation import classifier
from diffusion_jax.evaluation.evaluate import Evaluator
from diffusion_jax.experiment.evaluation import fit
from diffusion_jax.experiment.experiment import create_experiment
from diffusion_jax.models.classifier import create_classifier
from diffusion_jax.runtime.numerics import PRECISIONS
from diffusion_jax.sampling.generator import Generator
from diffusion_jax.training.step import (
    ALONE,
    Constants,
    init_state,
    step_choices,
    train_step,
)

IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
BATCH = {"image": IMAGES, "label": None, "index": np.arange(4)}


def load_digits(**fields):
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    overrides = [(name, str(value)) for name, value in (DIGITS | changes).items()]
    return load(str(REPOSITORY / "configs" / "digits.py"), overrides)


def precisions_of(lowered, least=4):
    """The precisions of all matrix products and convolutions of a program, in lower case."""
    text = lowered.as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert len(products) > least
    return [
        frozenset(word.lower() for word in re.findall(r"DEFAULT|HIGHEST|HIGH", line)) or {"default"}
        for line in products
    ]


def lower_step(experiment):
    state = init_state(experiment, seed=0, num_timesteps=len(experiment.schedule))
    step = functools.partial(train_step, step_choices(experiment, ALONE))
    constants = Constants(experiment.schedule, jax.random.key(0))
    batch = {name: BATCH[name] for name in ("image", "label")}
    return jax.jit(step).lower(state, constants, np.arange(4), batch)


def lower_chain(experiment):
    generator = Generator(experiment, None, jax.devices()[:1])
    params = experiment.model.template
    inputs = generator._inputs((zeros(params), None), experiment.sampling.chain)
    return generator._trajectory.__wrapped__.lower(inputs, np.arange(4)[None], None, 0)


def lower_inversion(experiment):
    generator = Generator(experiment, None, jax.devices()[:1])
    inputs = generator._inputs((zeros(experiment.model.template), None), experiment.sampling.chain)
    return generator._inverse.__wrapped__.lower(inputs, np.zeros((1, 2, 8, 8, 1), np.float32))


def evaluate_inputs(experiment):
    plan = fit(experiment.evaluation, Split(IMAGES, None))
    evaluator = Evaluator(experiment.network, plan, jax.devices()[:1])
    batch = jax.tree.map(lambda leaf: leaf[None], BATCH)
    shared = zeros(experiment.model.template), experiment.schedule, jax.random.key(0)
    return evaluator, shared, batch


def lower_bound(experiment):
    evaluator, shared, batch = evaluate_inputs(experiment)
    return evaluator._bound.__wrapped__.lower(*shared, batch, stratify(10, 2))


def lower_flow(experiment):
    evaluator, shared, batch = evaluate_inputs(experiment)
    return evaluator._flow.__wrapped__.lower(*shared, batch)


def zeros(template):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)


@pytest.mark.parametrize(
    ("lower", "fields", "expected"),
    [
        (lower_step, {}, "default"),
        (lower_step, {"precision": "high"}, "high"),
        (lower_step, {"precision": "highest", "sampling__precision": "high"}, "highest"),
        (lower_chain, {}, "default"),
        (lower_chain, {"precision": "high"}, "high"),
        (lower_chain, {"precision": "high", "sampling__precision": "highest"}, "highest"),
        (lower_inversion, {"sampling__precision": "high"}, "high"),
        (lower_bound, {}, "highest"),
        (lower_bound, {"precision": "high", "evaluate__precision": "default"}, "default"),
        (lower_flow, {"precision": "high"}, "highest"),
        (lower_flow, {"evaluate__precision": "high"}, "high"),
    ],
)
def test_products_have_the_precision_of_the_config(lower, fields, expected):
    fields = {"evaluate.flow_examples": 4, "evaluate.flow_steps": 2, **fields}
    precisions = precisions_of(lower(create_experiment(load_digits(**fields))))
    if lower is lower_step:  # the sums of the losses by quartile are always exact
        *precisions, first, second = sorted(precisions, key=lambda found: found == {"highest"})
        assert first == second == {"highest"}
    assert set(precisions) == {frozenset([expected])}


def test_the_classifier_has_the_highest_precision():
    """Scores of samples must not depend on the platform's short products."""
    network = create_classifier((8, 8, 1), 10)
    params = zeros(jax.eval_shape(network.init, jax.random.key(0)))
    program = classifier._compile(network).__wrapped__
    precisions = precisions_of(program.lower(params, np.zeros((2, 8, 8, 1), np.float32)), 2)
    assert set(precisions) == {frozenset(["highest"])}


@pytest.mark.parametrize("field", ["precision", "sampling.precision", "evaluate.precision"])
def test_a_misspelt_precision_is_refused(tmp_path, field):
    done = run(arguments(tmp_path / "run", TOY2D | {field: "hihgest"}), tmp_path / "log")
    assert done.code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"config.{field} = 'hihgest': unknown precision")
    assert all(name in line for name in PRECISIONS)
    assert not (tmp_path / "run").exists()


def test_precisions_are_recorded_and_said_to_change_nothing_on_a_cpu(tmp_path):
    """Another mode may have another precision than the training that it follows."""
    workdir, fields = tmp_path / "run", TOY2D | {"train.num_steps": 2, "sampling.num_images": 4}
    done = run(arguments(workdir, fields | {"precision": "high"}), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "config.precision = high: on a CPU it changes nothing" in done.stderr
    assert json.loads((workdir / "config.json").read_text())["precision"] == "high"
    done = run(arguments(workdir, fields, mode="evaluate"), tmp_path / "log")
    assert done.code == 0, done.stderr
    assert json.loads((workdir / "evaluation.json").read_text())["precision"] == "highest"
    fields |= {"evaluate.precision": "default"}
    done = run(arguments(workdir, fields, mode="evaluate"), tmp_path / "log")
    assert "is of another evaluation" in done.stderr
    assert json.loads((workdir / "evaluation.json").read_text())["precision"] == "default"

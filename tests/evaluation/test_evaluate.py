"""Evaluation: as a process that may be killed, and of data whose bits/dim are known exactly."""

import csv
import functools
import itertools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import gaussian
from PIL import Image
from runs import DIGITS, TOY2D, Run, arguments, assert_same, checkpoint, run

from diffusion_jax.data.dataset import Split
from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.bound import Strata, Terms, bound_terms, stratify
from diffusion_jax.diffusion.losses import Examples, Objective
from diffusion_jax.diffusion.network import Model, Network
from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS
from diffusion_jax.errors import NonFiniteLossError
from diffusion_jax.evaluation.evaluate import Evaluator, Trained
from diffusion_jax.evaluation.sums import NAMES, Sums
from diffusion_jax.experiment.evaluation import EvaluationPlan, FlowPlan

SMALL = {
    "evaluate.num_examples": 24,
    "evaluate.batch_size": 8,
    "evaluate.timesteps_per_call": 3,
}


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """The fields and the folder of a model of the digits with a learned variance."""
    folder = tmp_path_factory.mktemp("evaluated")
    fields = DIGITS | {
        "dataset.data_dir": data_dir,
        "loss.variance": "learned_range",
        "num_devices": 1,
    }
    done = run(arguments(folder / "run", fields, "digits"), folder / "log")
    assert done.code == 0, done.stderr
    return fields, folder / "run"


def start(trained, workdir, log, **changes):
    """Start an evaluation of a trained model, in a folder that links to its checkpoints."""
    fields, source = trained
    if not workdir.exists():
        workdir.mkdir()
        for name in ("checkpoints", "config.json"):
            (workdir / name).symlink_to(source / name)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return Run(arguments(workdir, fields | SMALL | changes, "digits", "evaluate"), log)


def report(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The folder and the result of an evaluation that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(trained, folder / "run", folder / "log").wait()
    assert done.code == 0, done.stderr
    return folder / "run", done


def test_an_evaluation_leaves_its_files(evaluated):
    workdir, done = evaluated
    found = report(workdir)
    terms = found["terms"]
    assert set(terms) == {"L_T", "L_1 to L_{T-1}", "L_0"}
    total = sum(term["bits_per_dim"] for term in terms.values())
    np.testing.assert_allclose(found["bits_per_dim"], total, rtol=1e-9)
    assert found["clip_x_0"] is True
    assert found["levels"] == 17
    assert found["step"] == 40
    assert found["num_timesteps"] == found["num_timesteps_per_example"] == 10
    assert found["standard_error"] > 0
    assert found["variance"] == "learned_range"
    assert found["schedule"].startswith("cosine(num_timesteps=10")
    with (workdir / "evaluation.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["t"]) for line in lines] == list(range(1, 11))
    assert {int(line["images"]) for line in lines} == {24}
    of_terms = sum(float(line["bits_per_dim"]) for line in lines)
    np.testing.assert_allclose(of_terms + terms["L_T"]["bits_per_dim"], total, rtol=1e-6)
    with Image.open(workdir / "evaluation.png") as image:
        image.load()
    assert f"{found['bits_per_dim']:.4f} +- {found['standard_error']:.4f}" in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluate__timesteps_per_call": 10},
        {"num_devices": 2, "evaluate__batch_size": 7},
    ],
    ids=str,
)
def test_neither_batches_nor_devices_change_the_bits(trained, evaluated, tmp_path, changes):
    done = start(trained, tmp_path / "run", tmp_path / "log", **changes).wait()
    assert done.code == 0, done.stderr
    expected, found = report(evaluated[0]), report(tmp_path / "run")
    for name in ("bits_per_dim", "standard_error", "mse_x_0", "mse_eps"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_a_killed_evaluation_resumes_and_ends_with_the_same_numbers(trained, evaluated, tmp_path):
    """After kill -9 the same command continues; another evaluation begins again."""
    workdir = tmp_path / "run"
    first = start(trained, workdir, tmp_path / "log")
    first.wait_for(workdir / "evaluation.npz")
    first.kill()
    first.wait()
    assert not (workdir / "evaluation.json").exists()
    done = start(trained, workdir, tmp_path / "log").wait()
    assert done.code == 0, done.stderr
    assert "going on after" in done.stderr
    assert report(workdir) == report(evaluated[0])
    other = start(trained, workdir, tmp_path / "log", evaluate__clip_x_0="false").wait()
    assert "of another evaluation" in other.stderr
    assert report(workdir)["clip_x_0"] is False
    assert report(workdir)["bits_per_dim"] != report(evaluated[0])["bits_per_dim"]


def test_a_stratified_budget_estimates_the_whole_bound(trained, evaluated, tmp_path):
    done = start(trained, tmp_path / "run", tmp_path / "log", evaluate__num_timesteps=4).wait()
    assert done.code == 0, done.stderr
    found, whole = report(tmp_path / "run"), report(evaluated[0])
    assert found["num_timesteps_per_example"] == 4
    assert "4 of 10 timesteps for each image: the terms are skewed" in done.stdout
    assert "skewed" not in evaluated[1].stdout
    assert found["terms"]["L_0"] == whole["terms"]["L_0"]  # t = 1 is always its own stratum
    gap = abs(found["bits_per_dim"] - whole["bits_per_dim"])
    assert 0 < gap < 5 * np.hypot(found["standard_error"], whole["standard_error"])
    for name in ("mse_x_0", "mse_eps"):  # each stratum is weighted by its number of timesteps
        np.testing.assert_allclose(found[name], whole[name], rtol=0.2)


def test_bad_evaluations_are_one_line(trained, tmp_path):
    cases = {
        "config.evaluate.num_examples": {"evaluate__num_examples": 361},
        "config.evaluate.flow_examples": {"evaluate__flow_examples": 361},
        "config.evaluate.num_timesteps": {"evaluate__num_timesteps": 11},
        "config.evaluate.batch_size": {"evaluate__batch_size": 0},
        "config.evaluate.flow_solver": {
            "evaluate__flow_examples": 1,
            "evaluate__flow_solver": "euler",
        },
    }
    waiting = {
        field: start(trained, tmp_path / f"run{i}", tmp_path / f"log{i}", **changes)
        for i, (field, changes) in enumerate(cases.items())
    }
    for field, started in waiting.items():
        done = started.wait()
        assert done.code == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert field in done.stderr
    assert not list(tmp_path.glob("run*/evaluation*"))


def test_points_are_never_clipped_and_ctrl_c_is_one_line(tmp_path):
    """x_0 of toy2d, which reaches beyond [-1, 1], is not clipped.

    Ctrl-C ends an evaluation with one line, and a damaged evaluation.npz is replaced.
    """
    workdir = tmp_path / "run"
    assert run(arguments(workdir, TOY2D), tmp_path / "log").code == 0
    fields = TOY2D | {
        "evaluate.batch_size": 16,
        "evaluate.timesteps_per_call": 1,
        "evaluate.flow_examples": 64,
        "evaluate.flow_divergence": "exact",
    }
    words = arguments(workdir, fields, mode="evaluate")
    first = Run(words, tmp_path / "log")
    first.wait_for(workdir / "evaluation.npz")
    first.kill(signal.SIGINT)
    done = first.wait()
    assert done.code == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted"
    (workdir / "evaluation.npz").write_bytes(b"")
    done = run(words, tmp_path / "log")
    assert done.code == 0, done.stderr
    assert "is damaged" in done.stderr
    assert report(workdir)["clip_x_0"] is False
    flow = report(workdir)["probability_flow"]
    assert flow["num_examples"] == 64
    assert np.isfinite([flow["bits_per_dim"], flow["bound_of_the_same_images"]]).all()


def test_a_term_that_is_not_finite_is_named(tmp_path):
    """The error names the image and the timestep, and no file is written.

    The network predicts a wrong x_0 with a tiny variance.
    """
    plan = _plan(num_examples=8, num_timesteps=10, batch_size=8)
    schedule = schedules.cosine(10)

    def certain(params, x_t, timestep, label, keys):
        return jnp.concatenate([x_t, jnp.full_like(x_t, -1000.0)], axis=-1)

    model = Model(lambda key: {"none": jnp.zeros(1)}, certain)
    split = Split(np.ones((8, 2), np.float32), None)
    evaluator = Evaluator(Network(model, _objective()), plan, jax.devices()[:1])
    trained = Trained(params={"none": jnp.zeros(1)}, step=1, schedule=schedule, seed=0)
    with pytest.raises(NonFiniteLossError, match=r"image \d+ at t = \d+"):
        evaluator.evaluate(trained, split, about={}, folder=tmp_path)
    far = Split(np.full((8, 2), 1e30, np.float32), None)  # its square is no float32
    with pytest.raises(NonFiniteLossError, match=r"^image 0: L_T is inf bits$"):
        evaluator.evaluate(trained, far, about={}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["prior", "flow", *Terms._fields])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_number_that_is_not_finite_never_gets_into_the_sums(tmp_path, name, value):
    """Every quantity is checked; the error is one line that names the quantity and the image."""
    flow = FlowPlan(num_examples=6, num_steps=1, solver="rk4", divergence="exact")
    sums = Sums(_plan(num_examples=6, num_timesteps=4, batch_size=3, flow=flow), 4)
    before = {field: array.copy() for field, array in sums.arrays.items()}
    images, wrong = slice(3, 6), np.array([1.0, value, 1.0])
    add = functools.partial(sums.set, name, images, wrong)
    if name in Terms._fields:
        terms = Terms(*np.ones((3, 2, 3)))._replace(**{name: np.stack([wrong, wrong])})
        # The second stratum of the call is padding of size 0, so its values do not matter
        add = functools.partial(sums.add, images, np.eye(2, 3, 1, int), terms, np.array([3, 0]))
    with pytest.raises(NonFiniteLossError, match=rf"^image 4.*{NAMES[name]}.* {value}") as error:
        add()
    assert len(str(error.value).splitlines()) == 1
    for field, array in sums.arrays.items():
        np.testing.assert_array_equal(array, before[field])
    # A file of an earlier version, which did not check, may contain such a number
    sums.arrays["prior"][4] = value
    sums.save(tmp_path / "evaluation.npz", "the same")
    sums.arrays = before
    sums.restore(tmp_path / "evaluation.npz", "the same")
    assert sums.arrays["prior"][4] == 0


@pytest.mark.slow
def test_importance_sampling_and_the_bound_train(tmp_path):
    """A run of L_vlb with importance sampling gives the same state if it is stopped and resumed."""
    fields = TOY2D | {
        "loss.weighting": "vlb",
        "loss.variance": "learned",
        "loss.timesteps": "importance",
        "num_devices": 2,
    }
    half = fields | {"train.num_steps": 20}
    whole = run(arguments(tmp_path / "whole", fields), tmp_path / "log")
    assert whole.code == 0, whole.stderr
    for part in (half, fields):
        done = run(arguments(tmp_path / "parts", part), tmp_path / "log")
        assert done.code == 0, done.stderr
    arrays = checkpoint(tmp_path / "whole")
    assert arrays["timestep_state/counts"].sum() == 40 * 16
    assert arrays["timestep_state/losses"].any()
    assert_same(arrays, checkpoint(tmp_path / "parts"))
    # One device draws the same timesteps and stores the same losses
    done = run(arguments(tmp_path / "alone", fields | {"num_devices": 1}), tmp_path / "log")
    assert done.code == 0, done.stderr
    alone = checkpoint(tmp_path / "alone")
    np.testing.assert_array_equal(alone["timestep_state/counts"], arrays["timestep_state/counts"])
    found, expected = (a["timestep_state/losses"] for a in (alone, arrays))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


# --- data whose bits/dim are known ----------------------------------------------------------

MEAN, VARIANCE = 0.3, 0.2


def of_gaussian(schedule):
    """A network that gives the exact reverse chain of Gaussian data, with a learned variance."""
    predict = gaussian(MEAN, VARIANCE)

    def of_point(x_t, t):
        row = schedules.clip_posterior_variance(schedule)[t.astype(int) - 1]
        total = row.alpha_bar * VARIANCE + row.one_minus_alpha_bar
        of_x_0 = VARIANCE * row.one_minus_alpha_bar / total
        gain = PREDICTIONS["mu"].gain(row)
        is_first = row.one_minus_alpha_bar_prev == 0
        variance = jnp.where(is_first, of_x_0, row.posterior_variance + gain**2 * of_x_0)
        eps = predict(x_t, row).eps
        return jnp.concatenate([eps, jnp.full_like(eps, jnp.log(variance))])

    return Model(
        lambda key: {"none": jnp.zeros(1)},
        lambda params, x_t, timestep, label, keys: jax.vmap(of_point)(x_t, timestep),
    )


@pytest.mark.parametrize("num_timesteps", [10, 100])
def test_the_bound_of_the_exact_chain_is_the_entropy(tmp_path, num_timesteps):
    """The bound and the flow of points from N(0.3, 0.2) are the entropy, as main.py evaluates."""
    schedule = schedules.cosine(num_timesteps)
    points = MEAN + np.sqrt(VARIANCE) * np.random.default_rng(0).standard_normal((512, 8))
    points = points.astype(np.float32)
    flow = FlowPlan(num_examples=64, num_steps=50, solver="rk4", divergence="exact")
    plan = _plan(num_examples=512, num_timesteps=num_timesteps, batch_size=256, flow=flow)
    model = of_gaussian(schedule)
    params = model.init(jax.random.key(0))
    evaluator = Evaluator(Network(model, _objective()), plan, jax.devices()[:2])
    trained = Trained(params=params, step=1, schedule=schedule, seed=0)
    found = evaluator.evaluate(trained, Split(points, None), about={}, folder=tmp_path)
    entropy = np.log2(2 * np.pi * np.e * VARIANCE) / 2
    assert found["standard_error"] < 0.06
    assert abs(found["bits_per_dim"] - entropy) < 4 * found["standard_error"]
    flow = found["probability_flow"]
    assert abs(flow["bits_per_dim"] - entropy) < 4 * flow["standard_error"]


def test_strata_cover_every_timestep_once_and_t_1_alone():
    for num_timesteps, budget in itertools.product((2, 3, 10, 1000), (2, 3, 7, 10, 50, 1000)):
        if budget > num_timesteps:
            continue
        strata = stratify(num_timesteps, budget)
        covered = [range(first, first + size) for _, first, size in zip(*strata)]
        assert list(itertools.chain(*covered)) == list(range(num_timesteps))
        assert strata.size[0] == 1
        assert strata.size[1:].max() - strata.size[1:].min() <= 1
    assert stratify(1, 1).size == [1]


def test_draws_are_uniform_in_each_stratum():
    schedule, size = schedules.cosine(10), 3000
    strata = stratify(10, 3)  # row 0, then two strata that share the other nine rows
    network = Network(of_gaussian(schedule), _objective())
    examples = Examples(
        x_0=jnp.zeros((size, 1)), label=None, indices=jnp.arange(size), batch_size=size
    )
    inputs = network, {}, schedule, jax.random.key(0), examples
    on_device = Strata(*map(jnp.asarray, strata))
    positions, _ = bound_terms(*inputs, strata=on_device, clip_x_0=False)
    for drawn, first, count in zip(np.asarray(positions), strata.first, strata.size):
        counts = np.bincount(drawn - first, minlength=count)
        assert len(counts) == count
        expected = size / count
        assert np.sum((counts - expected) ** 2 / expected) <= count - 1 + 6 * np.sqrt(2 * count)


def _plan(**fields):
    others = {"timesteps_per_call": 5, "clip_x_0": False, "precision": "highest", "flow": None}
    return EvaluationPlan(**(others | fields))


def _objective():
    return Objective(
        parametrisation=PREDICTIONS["eps"],
        weighting=WEIGHTINGS["simple"](),
        is_vlb=False,
        variance=VARIANCES["learned"],
        vlb_scale=0.001,
        timesteps=TIMESTEP_SAMPLERS["uniform"],
        levels=None,
        num_classes=None,
        label_dropout=0.0,
    )

"""Grids of an ablation: the arms of a grid, refused grids, hashes, and shared compilations."""

import json

import pytest
from PIL import Image
from runs import DIGITS, REPOSITORY, TOY2D

from diffusion_jax.ablation import grid
from diffusion_jax.config import config as configuration
from diffusion_jax.errors import ConfigError
from diffusion_jax.experiment import experiment

S = {"ablate.grid": "schedule.s=0,0.008,0.05"}


@pytest.fixture(autouse=True, scope="module")
def models_made_once():
    """Create each model once: tracing it takes 0.2 s, and most jobs have the same model."""
    models, create_model = {}, experiment.create_model

    def remembered(config, *others, **choices):
        key = json.dumps([dict(config), others, choices])
        if key not in models:
            models[key] = create_model(config, *others, **choices)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "create_model", remembered)
        yield


def create(fields, dataset="digits"):
    """The ablation with some fields, by default of one seed."""
    base = {"digits": DIGITS, "toy2d": TOY2D}[dataset] | {"ablate.seeds": (0,)}
    overrides = [(name, str(value)) for name, value in (base | fields).items()]
    config = configuration.load(str(REPOSITORY / "configs" / f"{dataset}.py"), overrides)
    num_jobs = grid.count_jobs(config)
    ablation = grid.create_ablation(config)
    assert len(ablation.mine) == num_jobs
    return ablation


def names(text):
    return [job.arm.name for job in create({"ablate.grid": text}).jobs]


MEANINGS = {
    "one value": ("schedule.s=0.02", ["schedule.s=0.02"]),
    "a list": ("schedule.s=0,0.02", ["schedule.s=0", "schedule.s=0.02"]),
    "a product": (
        "loss.prediction=eps,v; schedule.s=0,0.02",
        [
            "loss.prediction=eps,schedule.s=0",
            "loss.prediction=eps,schedule.s=0.02",
            "loss.prediction=v,schedule.s=0",
            "loss.prediction=v,schedule.s=0.02",
        ],
    ),
    "a union": (
        "schedule.s=0,0.02 | schedule.name=linear | ema.decay=0.9; ema.warmup=false",
        [
            "schedule.s=0",
            "schedule.s=0.02",
            "schedule.name=linear",
            "ema.decay=0.9,ema.warmup=False",
        ],
    ),
    "tuples": (
        "model.channel_multipliers=(1,), (1, 2)",
        ["model.channel_multipliers=(1,)", "model.channel_multipliers=(1,2)"],
    ),
    "an empty tuple": (
        "model.attention_resolutions=(),(8,)",
        ["model.attention_resolutions=()", "model.attention_resolutions=(8,)"],
    ),
    "spaces": ("  schedule.s = 0 ,\t0.02 ", ["schedule.s=0", "schedule.s=0.02"]),
    "the default, unset": ("schedule.s=none,0.02", ["schedule.s=None", "schedule.s=0.02"]),
    "every digit": (
        "schedule.s=0.1234567891,1e-7",
        ["schedule.s=0.1234567891", "schedule.s=1e-07"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), MEANINGS.values(), ids=MEANINGS)
def test_a_grid_means_these_arms(text, expected):
    assert names(text) == expected


@pytest.mark.parametrize("text", ["0", "0.0", "0.00", "0e3", " 0 "])
def test_an_arm_has_one_name_for_all_spellings_of_a_value(text):
    job = create({"ablate.grid": f"schedule.s={text}"}).jobs[0]
    assert job.arm.name == "schedule.s=0"
    assert job.arm.fields == {"schedule.s": 0.0}


def test_an_arm_is_the_config_with_its_fields():
    fields = {"ablate.grid": "schedule.s=0.02; loss.prediction=v", "seed": 7, "ablate.seeds": (5,)}
    [job] = create(fields).jobs
    assert job.arm.fields == {"schedule.s": 0.02, "loss.prediction": "v"}
    assert (job.seed, job.config.seed, job.experiment.seed) == (5, 5, 5)
    plain = create({"ablate.grid": "schedule.s=none"}).jobs[0].config
    changed = configuration.differences(job.config, configuration.to_record(plain))
    assert {name for name in changed if not name.startswith("config.ablate.")} == {
        "config.schedule.s",
        "config.loss.prediction",
        "config.seed",
    }


def test_all_arms_of_the_first_seed_come_first():
    jobs = create(S | {"ablate.seeds": (3, 1)}).jobs
    arms = ["schedule.s=0", "schedule.s=0.008", "schedule.s=0.05"]
    assert [(job.seed, job.arm.name) for job in jobs] == [(s, arm) for s in (3, 1) for arm in arms]


def test_the_reference_is_the_first_arm_or_the_one_that_is_named():
    assert create(S).reference == "schedule.s=0"
    for text in ("schedule.s=0.05", " schedule.s = 0.05"):
        assert create(S | {"ablate.reference": text}).reference == "schedule.s=0.05"


@pytest.mark.parametrize("text", ["schedule.s=0.050", "schedule.s=5e-2"])
def test_the_reference_may_be_spelt_as_in_the_grid(text):
    fields = {"ablate.grid": f"schedule.s=0; loss.prediction=eps | {text}"}
    assert create(fields | {"ablate.reference": text}).reference == "schedule.s=0.05"


def test_the_shards_together_have_every_job_once():
    fields = S | {"ablate.seeds": (0, 1)}
    whole = create(fields)
    assert not whole.is_shard
    assert whole.mine == whole.jobs
    shares = [create(fields | {"ablate.shard": f"{i}/4"}) for i in (1, 2, 3, 4)]
    assert all(share.is_shard for share in shares)
    shared = [(job.seed, job.arm.name) for share in shares for job in share.mine]
    assert sorted(shared) == sorted((job.seed, job.arm.name) for job in whole.jobs)
    assert {len(share.mine) for share in shares} == {1, 2}
    assert all(len(share.jobs) == 6 for share in shares)


GRID = "config.ablate.grid"
# The fields of config.ablate, and a part of the message.
MISTAKES = {
    "unset": ({}, f"{GRID} = None: must be set to ablate"),
    "empty": ({"grid": ""}, f"{GRID}: '' lacks a value"),
    "no list": ({"grid": "schedule.s"}, f"{GRID}: 'schedule.s' lacks a value"),
    "empty list": ({"grid": "schedule.s="}, f"{GRID}: 'schedule.s=' lacks a value"),
    "no field": ({"grid": "=0,1"}, f"{GRID}: '=0,1' lacks a value"),
    "trailing comma": ({"grid": "schedule.s=0,"}, f"{GRID}: 'schedule.s=0,' lacks a value"),
    "trailing semicolon": ({"grid": "schedule.s=0;"}, f"{GRID}: '' lacks a value"),
    "trailing bar": ({"grid": "schedule.s=0 |"}, f"{GRID}: '' lacks a value"),
    "unknown field": ({"grid": "schedule.taus=1"}, "config.schedule.taus: no such field; did you"),
    "unknown section": ({"grid": "schedul.s=1"}, f"{GRID}: 'schedul.s' cannot be ablated"),
    "a whole section": ({"grid": "schedule=1"}, f"{GRID}: 'schedule' cannot be ablated"),
    "steps": ({"grid": "train.num_steps=1,2"}, f"{GRID}: 'train.num_steps' cannot be ablated"),
    "data": ({"grid": "dataset.name=mnist"}, f"{GRID}: 'dataset.name' cannot be ablated"),
    "the seed": (
        {"grid": "seed=1"},
        f"{GRID}: 'seed' cannot be ablated: must be in precision, schedule., ",
    ),
    "float": ({"grid": "schedule.s=0,small"}, "config.schedule.s = 'small': must be a finite"),
    "nan": ({"grid": "schedule.s=0,nan"}, "config.schedule.s = nan: must be a finite"),
    "int": ({"grid": "schedule.num_timesteps=9.5"}, "= '9.5': must be an integer"),
    "bool": ({"grid": "ema.warmup=1"}, "config.ema.warmup = '1': must be true or false"),
    "tuple": ({"grid": "model.channel_multipliers=1"}, "= 1: must be a tuple"),
    "open bracket": ({"grid": "model.channel_multipliers=(1,2"}, "= '(1': must be a tuple"),
    "s": ({"grid": "schedule.s=0,-1"}, "schedule.s=-1: config.schedule.s = -1.0: must be"),
    "name": ({"grid": "schedule.name=cosin"}, "did you mean 'cosine'"),
    "rate": ({"grid": "optimizer.learning_rate=0"}, "config.optimizer.learning_rate = 0.0: must"),
    "not its argument": (
        {"grid": "schedule.name=linear; schedule.s=0.1"},
        f"{GRID}, schedule.name=linear, schedule.s=0.1: config.schedule.s = 0.1: must be unset",
    ),
    "a field twice": ({"grid": "schedule.s=0; schedule.s=1"}, f"{GRID}: schedule.s is twice in"),
    "a value twice": ({"grid": "schedule.s=0,0"}, "the same as the arm schedule.s=0"),
    "two spellings": ({"grid": "schedule.s=0,0.0"}, "schedule.s=0.0: the same as the arm"),
    "two routes": (
        {"grid": "schedule.s=0.008 | schedule.max_beta=0.999"},
        f"{GRID}, schedule.max_beta=0.999: the same as the arm schedule.s=0.008",
    ),
    "the default": ({"grid": "schedule.s=none,0.008"}, "the same as the arm schedule.s=None"),
    "two products": (
        {"grid": "schedule.s=0,0.1 | schedule.s=0.2,0.1"},
        f"{GRID}, schedule.s=0.1: the same as the arm schedule.s=0.1",
    ),
    "another order": (
        {"grid": "loss.prediction=v; schedule.s=0 | schedule.s=0; loss.prediction=v"},
        "the same as the arm loss.prediction=v,schedule.s=0",
    ),
    "no seeds": ({"seeds": ()}, "config.ablate.seeds = (): must be one seed at least"),
    "seeds": ({"seeds": (0, 1, 0)}, "config.ablate.seeds = (0, 1, 0): must be without repet"),
    "a negative seed": ({"seeds": (0, -1)}, "seeds = (0, -1): must be in [0, 2^63)"),
    "one seed": ({"seeds": 0}, "config.ablate.seeds = 0: must be a tuple"),
    "reference": (
        {"reference": "schedule.s=0.009"},
        "config.ablate.reference = 'schedule.s=0.009': unknown arm; did you mean 'schedule.s=0.008",
    ),
    "half a reference": ({"reference": "s=0.008"}, "did you mean 'schedule.s=0.008'"),
    "parallel": ({"parallel": "devices"}, "unknown way to run jobs; did you mean 'device'"),
    "arms on one device": (
        {"parallel": "device", "arms_per_device": 2},
        "config.ablate.arms_per_device = 2: must be unset",
    ),
    "arms in sequence": (
        {"parallel": "sequence", "arms_per_device": 1},
        "config.ablate.arms_per_device = 1: must be unset",
    ),
    "no arms": (
        {"parallel": "vmap", "arms_per_device": 0},
        "config.ablate.arms_per_device = 0: must be at least 1",
    ),
    "shard 0": ({"shard": "0/3"}, "config.ablate.shard = '0/3': must be i/n, with i in 1..n"),
    "shard 4": ({"shard": "4/3"}, "config.ablate.shard = '4/3': must be i/n"),
    "shard": ({"shard": "x"}, "config.ablate.shard = 'x': must be i/n"),
    "a shard without jobs": ({"shard": "1/99"}, "n at most the 3 jobs"),
    "distance": ({"distance": "fid"}, "config.ablate.distance = 'fid': unknown distance"),
}


@pytest.mark.parametrize(("fields", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(fields, said):
    of_ablate = {f"ablate.{name}": value for name, value in fields.items()}
    of_grid = S if fields and "grid" not in fields else {}
    with pytest.raises(ConfigError) as raised:
        create(of_grid | of_ablate)
    line = str(raised.value)
    assert said in line
    assert "\n" not in line
    assert line.startswith("config.ablate.")
    assert len(line) < 400


def test_the_message_about_a_negative_seed_names_config_ablate_seeds():
    with pytest.raises(ConfigError, match=r"^config\.ablate\.seeds = \(0, -1\)"):
        create(S | {"ablate.seeds": (0, -1)})


def test_a_set_without_images_is_refused():
    with pytest.raises(ConfigError, match=r"^config\.dataset\.name = 'toy2d': must be a set of "):
        create(S, "toy2d")


def test_an_ablation_edits_no_images_and_is_guided_by_no_other_run(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    task = {"editing.task": "image_to_image", "editing.images": tmp_path / "image.png"}
    task |= {"editing.timestep": 5}
    for fields, message in (
        (task, "config.editing.task = 'image_to_image': must be unset in an ablation"),
        ({"distributed": "true"}, "config.distributed = True: must be "),
        (
            {"guidance.weak_step": 3, "guidance.weight": 2, "model.class_conditional": "true"},
            "config.guidance.weak_step = 3: must be unset in an ablation",
        ),
    ):
        with pytest.raises(ConfigError) as raised:
            create(S | fields)
        assert str(raised.value).startswith(message)


ONE = {"ablate.grid": "schedule.s=0.02"}


@pytest.mark.parametrize(
    "changes",
    [
        {"ablate.seeds": (1,)},
        {"ablate.grid": "schedule.s=0.03"},
        {"schedule.num_timesteps": 11},
        {"schedule.max_beta": 0.9},
        {"loss.prediction": "v"},
        {"optimizer.learning_rate": 1e-3},
        {"model.width": 16},
        {"ema.decay": 0.9},
        {"train.num_steps": 41},
        {"sampling.num_images": 5},
        {"evaluate.num_examples": 3},
        {"dataset.flip": "true"},
    ],
    ids=str,
)
def test_the_hash_changes_with_every_field_that_scores_depend_on(changes):
    one, other = (create(ONE | fields).jobs[0].config_hash for fields in ({}, changes))
    assert one != other
    assert len(one) == len(other) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"num_devices": 2},
        {"compilation_cache": "off"},
        {"dataset.data_dir": "/elsewhere"},
        {"dataset.archives": REPOSITORY},
        {"seed": 3},  # a job has a seed of ablate.seeds
        {"ablate.grid": "schedule.s=0.020 | schedule.s=0.1"},
        {"ablate.seeds": (0, 1)},
        {"ablate.reference": "schedule.s=0.02"},
        {"ablate.parallel": "vmap", "ablate.arms_per_device": 3},
        {"ablate.shard": "1/1"},
        {"ablate.distance": "kernel"},
    ],
    ids=str,
)
def test_the_hash_does_not_depend_on_devices_folders_or_other_jobs(changes):
    one, other = (create(ONE | fields).jobs[0].config_hash for fields in ({}, changes))
    assert one == other


def num_compilations(text, **fields):
    ablation = create({"ablate.grid": text} | {k.replace("__", "."): v for k, v in fields.items()})
    return len({job.static_choices for job in ablation.jobs})


@pytest.mark.parametrize(
    "text",
    [
        "schedule.s=0,0.1,0.2",
        "schedule.num_timesteps=7,9",
        "schedule.name=linear,cosine,sigmoid",
        "schedule.max_beta=0.9 | schedule.name=linear; schedule.beta_end=0.5",
    ],
)
def test_schedules_and_seeds_share_a_compiled_step(text):
    assert num_compilations(text, ablate__seeds=(0, 1)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "loss.prediction=eps,v",
        "loss.weighting=simple,snr",
        "loss.variance=posterior,beta",
        "loss.timesteps=uniform,low_discrepancy",
        "model.width=8,16",
        "optimizer.learning_rate=0.1,0.2",
        "ema.decay=0.9,0.99",
    ],
)
def test_other_choices_compile_a_step_each(text):
    assert num_compilations(text, ablate__seeds=(0, 1)) == 2
    assert num_compilations(f"{text}; schedule.s=0,0.1") == 2


def test_with_importance_sampling_each_number_of_timesteps_compiles_a_step():
    # The state then has a history of losses for each timestep
    importance = {"loss__timesteps": "importance"}
    assert num_compilations("schedule.s=0,0.1", **importance) == 1
    assert num_compilations("schedule.num_timesteps=7,9", **importance) == 2

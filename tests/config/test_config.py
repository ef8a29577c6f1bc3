"""Configs and command lines: how they are read, overridden, compared and refused."""

import inspect
import itertools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import TOY2D

from diffusion_jax.__main__ import parse_arguments
from diffusion_jax.ablation.jobs import Job
from diffusion_jax.config.config import (
    OF_THE_MODEL,
    OF_THE_TRAINING,
    differences,
    load,
    relevant_fields,
    require_same,
    to_record,
    value_of,
)
from diffusion_jax.config.default import FIELDS, Effect, effect_of
from diffusion_jax.diffusion import samplers, schedules, weightings
from diffusion_jax.diffusion.losses import Examples, LossInputs
from diffusion_jax.errors import ConfigError, at_least, at_most, bounds, choose, require
from diffusion_jax.experiment.experiment import create_experiment

PATHS = ["--config=configs/default.py", "--workdir=runs/x"]

ONE_FILE = """
    from ml_collections import ConfigDict
    from configs import default
    def get_config():
        config = default.get_config()
        {}
        return config
"""


@pytest.fixture(scope="module")
def default_path(repository):
    return str(repository / "configs" / "default.py")


@pytest.fixture(scope="module")
def default(default_path):
    return load(default_path, [])


@pytest.fixture
def write(tmp_path, default):  # ``default`` puts the repository on the module path
    """A function that writes a config file and returns its path."""

    def write(source):
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


def message_of(error):
    """The message of an error, which must be one line."""
    message = str(error.value)
    assert message.splitlines() == [message]
    return message


def leaves(config, prefix=""):
    """The dotted name and the value of every field of a config."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


BAD_ARGUMENTS = [
    (["--config=a.py"], "--workdir"),
    (["--workdir=runs/x"], "--config"),
    ([], "--config"),
    (["--config", "--workdir", "runs/x"], "--config"),
    (["--config=", "--workdir=x"], "--config"),
    (["--config=a.py", "--workdir"], "--workdir"),
    ([*PATHS, "--mode"], "--mode"),
    ([*PATHS, "--mode="], "--mode"),
    ([*PATHS, "--mode=trian"], "did you mean 'train'? (ablate, evaluate, sample, train)"),
    ([*PATHS, "--mode=export"], "--mode = 'export'"),
    ([*PATHS, "--wordkir=y"], "did you mean '--workdir'?"),
    ([*PATHS, "--conifg=y"], "did you mean '--config'?"),
    ([*PATHS, "-mode=train"], "did you mean '--mode'?"),
    ([*PATHS, "--num_steps=3"], "--num_steps"),
    ([*PATHS, "--seed", "3"], "--seed"),
    ([*PATHS, "train"], "train"),
    ([*PATHS, "config.seed=3"], "config.seed"),
    ([*PATHS, "--config=b.py"], "--config: given twice"),
    ([*PATHS, "--workdir=b"], "--workdir: given twice"),
    ([*PATHS, "--config.seed=1", "--config.seed=2"], "--config.seed: given twice"),
    ([*PATHS, "--config.seed"], "--config.seed"),
    ([*PATHS, "--config.seed="], "--config.seed"),
    ([*PATHS, "--config.seed", "--config.ema.decay=0.9"], "--config.seed: needs a value"),
]

BAD_OVERRIDES = [
    ("schedule.nme", "cosine", "config.schedule.nme: no such field; did you mean 'name'? ("),
    ("shedule.name", "cosine", "config.shedule: no such field; did you mean 'schedule'? ("),
    ("num_timesteps", "3", "config.num_timesteps"),
    ("", "3", "config."),
    (".seed", "3", "config."),
    ("schedule.", "3", "config.schedule."),
    ("seed.value", "3", "config.seed.value"),
    ("schedule", "cosine", "config.schedule: a section"),
    ("model", "(1, 2)", "config.model: a section"),
    ("model.channel_multipliers[0]", "3", "config.model.channel_multipliers[0]"),
    ("model.__class__", "3", "config.model.__class__"),
    ("train.num_steps", "abc", "config.train.num_steps = 'abc': must be an integer"),
    ("train.num_steps", "1.5", "config.train.num_steps"),
    ("train.num_steps", "1e3", "config.train.num_steps"),
    ("train.num_steps", "none", "config.train.num_steps"),
    ("train.num_steps", "true", "config.train.num_steps"),
    ("train.num_steps", "1 2", "config.train.num_steps"),
    ("train.num_steps", "9" * 5000, "config.train.num_steps"),
    ("ema.decay", "high", "config.ema.decay = 'high': must be a finite number"),
    ("ema.decay", "nan", "config.ema.decay"),
    ("ema.decay", "-inf", "config.ema.decay"),
    ("ema.decay", "1e999", "config.ema.decay"),
    ("ema.decay", "0,5", "config.ema.decay"),
    ("ema.decay", "1/2", "config.ema.decay"),
    ("ema.warmup", "1", "config.ema.warmup = '1': must be true or false"),
    ("ema.warmup", "yes", "config.ema.warmup"),
    ("ema.warmup", "none", "config.ema.warmup"),
    ("model.channel_multipliers", "3", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "(1, 2.5)", "config.model.channel_multipliers = (1, 2.5): must"),
    ("model.channel_multipliers", "(1, 'a')", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "(1, (2, 3))", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "(1, True)", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "(1, 2", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "'12'", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "{[]: 1}", "config.model.channel_multipliers"),
    ("model.channel_multipliers", "range(3)", "config.model.channel_multipliers"),
    ("schedule.s", "small", "config.schedule.s = 'small': must be a finite number or none"),
    ("schedule.s", "nan", "config.schedule.s"),
    ("schedule.s", "0.1\n0.2", "config.schedule.s"),
    ("schedule.rescale", "0", "config.schedule.rescale"),
    ("num_devices", "2.0", "config.num_devices = '2.0': must be an integer or none"),
]

BAD_LINES = [
    ("config.schedule.nme = 'cosine'", "config.schedule.nme: no such field; did you mean 'name'?"),
    ("config.speed = 3", "config.speed: no such field; did you mean 'seed'?"),
    ("config.extra = ConfigDict({'a': 1})", "config.extra"),
    ("config.shedule.name = 'cosine'", "shedule"),
    ("config.train.num_steps = 'many'", "num_steps"),
    ("config.train.num_steps = 1.5", "num_steps"),
    ("config.train.num_steps = True", "config.train.num_steps = True: must be an integer"),
    ("config.train.num_steps = None", "config.train.num_steps = None: must be an integer"),
    ("config.ema.decay = float('nan')", "config.ema.decay = nan: must be a finite number"),
    ("config.ema.warmup = 1", "warmup"),
    ("config.schedule.s = 'small'", "small"),
    ("config.schedule.name = 3", "name"),
    ("config.model.channel_multipliers = (1, 'a')", "config.model.channel_multipliers"),
    ("config.model.channel_multipliers = 3", "channel_multipliers"),
    ("config.model = ConfigDict({'name': 'mlp', 'width': 'wide'})", "config.model.width = 'wide'"),
    ("config.model = ConfigDict({'name': 'mlp', 'act': {1, 2}})", "config.model.act"),
    ("config.model = ConfigDict({'name': 'mlp', 'act': ((1, 2),)})", "config.model.act"),
    ("config.model = ConfigDict({'width': 3})", "config.model.name: missing"),
    ("config.train = ConfigDict({'num_steps': 3})", "config.train.batch_size: missing"),
    ("config = ConfigDict({'seed': 3})", "missing"),
    ("config = ConfigDict({'schedule': 3})", "config.schedule: a section"),
    ("del config.seed", "config.seed: missing"),
]

BAD_FILES = [
    ("", "must have a get_config()"),
    ("get_config = 3", "TypeError"),
    ("def get_config(): pass", "returns a ConfigDict"),
    ("def get_config(): return {'seed': 3}", "returns a ConfigDict"),
    ("def get_config(size): return size", "TypeError"),
    ("def get_config(:\n  pass", "SyntaxError"),
    ("\n\nimport no_such_module", "line 3: ModuleNotFoundError"),
    ("def get_config():\n    raise ValueError('two\\nlines')", "line 2: ValueError: two lines"),
]


@pytest.mark.parametrize(("argv", "expected"), BAD_ARGUMENTS)
def test_a_mistake_on_the_command_line_is_one_line(argv, expected):
    with pytest.raises(ConfigError) as error:
        parse_arguments(argv)
    assert expected in message_of(error)


@pytest.mark.parametrize(("name", "text", "expected"), BAD_OVERRIDES)
def test_a_mistake_in_a_field_is_one_line(default_path, name, text, expected):
    with pytest.raises(ConfigError) as error:
        load(default_path, [(name, text)])
    assert expected in message_of(error)


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_mistake_in_a_config_is_one_line(write, line, expected):
    with pytest.raises(ConfigError) as error:
        load(write(ONE_FILE.format(line)), [])
    assert expected in message_of(error)


@pytest.mark.parametrize(("source", "expected"), BAD_FILES)
def test_a_file_that_is_no_config_is_one_line(write, source, expected):
    path = write(source)
    with pytest.raises(ConfigError) as error:
        load(path, [])
    message = message_of(error)
    assert message.startswith(f"--config={path}: ")
    assert expected in message


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, write):
    path = write("")
    cases = [
        (str(tmp_path / "mime.py"), f"mime.py: no such file; did you mean {path!r}?"),
        (str(tmp_path / "none" / "mine.py"), "mine.py: no such file"),
        (str(tmp_path), "directory"),
    ]
    (tmp_path / "bytes.py").write_bytes(b"\x00\xff\xfe")
    cases.append((str(tmp_path / "bytes.py"), "SyntaxError"))
    for bad, expected in cases:
        with pytest.raises(ConfigError) as error:
            load(bad, [])
        message = message_of(error)
        assert message.startswith(f"--config={bad}: ")
        assert expected in message


def test_a_bad_config_writes_nothing(tmp_path, write):
    path = write(ONE_FILE.format("config.speed = 3"))
    with pytest.raises(ConfigError):
        load(path, [])
    assert [str(file) for file in tmp_path.iterdir()] == [path]


def test_arguments_may_be_one_word_or_two():
    one = ["--config=a.py", "--workdir=runs/x", "--mode=sample", "--config.schedule.s=0.02"]
    two = [part for word in one for part in word.split("=", 1)]
    expected = ("a.py", "runs/x", "sample", (("schedule.s", "0.02"),))
    assert parse_arguments(one) == parse_arguments(two) == expected


def test_arguments_keep_what_follows_the_first_equals_sign():
    argv = ["--config=a=b.py", "--workdir", "x", "--config.dataset.archives=a=b"]
    assert parse_arguments(argv) == ("a=b.py", "x", "train", (("dataset.archives", "a=b"),))
    argv = ["--config=a", "--workdir=x", "--config.schedule.start", "-3"]
    assert parse_arguments(argv).overrides == (("schedule.start", "-3"),)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "-3", -3),
        ("train.num_steps", "1_000", 1000),
        ("ema.decay", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("dataset.flip", "TRUE", True),
        ("ema.warmup", "false", False),
        ("schedule.name", "none", "none"),
        ("schedule.name", "12", "12"),
        ("model.channel_multipliers", "1,2,2", (1, 2, 2)),
        ("model.channel_multipliers", "(1, 2)", (1, 2)),
        ("model.channel_multipliers", "3,", (3,)),
        ("model.attention_resolutions", "()", ()),
        ("num_devices", "2", 2),
        ("num_devices", "none", None),
        ("dataset.archives", "../shared data", "../shared data"),
        ("dataset.archives", "None", None),
        ("schedule.s", "0.02", 0.02),
        ("schedule.s", "0", 0.0),
        ("schedule.rescale", "true", True),
        ("schedule.betas", "betas.npy", "betas.npy"),
    ],
)
def test_a_field_is_set_with_its_own_type(default_path, default, name, text, value):
    config = load(default_path, [(name, text)])
    expected = dict(leaves(default)) | {name: value}
    assert dict(leaves(config)) == expected
    assert type(dict(leaves(config))[name]) is type(value)


def test_the_command_line_overrides_and_unsets_what_a_config_sets(write):
    path = write(
        ONE_FILE.format("config.schedule.s, config.model.attention_resolutions = 0.02, ()")
    )
    assert load(path, []).schedule.s == 0.02
    assert load(path, [("schedule.s", "0.1")]).schedule.s == 0.1
    assert load(path, [("schedule.s", "none")]).schedule.s is None
    assert load(path, [("model.attention_resolutions", "7,")]).model.attention_resolutions == (7,)


def test_the_fields_of_another_model_take_its_types(write):
    path = write(
        ONE_FILE.format("config.model = ConfigDict({'name': 'x', 'layers': 3, 'dropout': 0})")
    )
    config = load(path, [("model.layers", "4"), ("model.dropout", "0.5")])
    assert config.model.to_dict() == {"name": "x", "layers": 4, "dropout": 0.5}
    with pytest.raises(ConfigError, match=r"config\.model\.layers"):
        load(path, [("model.layers", "4.0")])


def test_code_cannot_add_a_field_to_a_config_by_a_typo(default):
    with pytest.raises(AttributeError):
        default.schedule.nme = "cosine"


def test_every_default_set_to_its_own_text_changes_nothing(default_path, default):
    texts = [(name, str(value)) for name, value in leaves(default)]
    assert to_record(load(default_path, texts)) == to_record(default)
    for name, text in texts:
        assert to_record(load(default_path, [(name, text)])) == to_record(default)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(-(2**31) + 1, 2**31 - 1)).map(tuple),
)
def test_a_value_survives_the_command_line_and_the_record(default_path, integer, number, integers):
    values = {"seed": integer, "schedule.s": number, "model.channel_multipliers": integers}
    config = load(default_path, [(name, str(value)) for name, value in values.items()])
    assert values.items() <= dict(leaves(config)).items()
    assert differences(config, to_record(config)) == {}


def test_every_field_has_a_comment(repository):
    lines = (repository / "diffusion_jax/config/default.py").read_text().splitlines()
    bare = []
    for above, line in itertools.pairwise(lines):
        declared = re.match(r'    "([\w.]+)": Field\(', line)
        if declared and "#" not in line and not above.strip().startswith("#"):
            bare.append(declared[1].rpartition(".")[2])
    comments = " ".join(line.partition("#")[2] for line in lines)
    # a comment that names several fields is the comment of each of them
    assert [name for name in bare if not re.search(rf"\b{name}\b", comments)] == []


def other_than(default):
    """The command line text of a value that is not the default."""
    kind = default if isinstance(default, type) else type(default)
    if kind is bool:
        return str(default is not True)
    return str((*default, 3)) if kind is tuple else "3"


def test_the_effect_of_a_field_decides_what_depends_on_it(default_path, default):
    """Its effect says whether a run resumes, is read, and keeps its scores with another value."""
    same = Job(arm=None, seed=0, config=default, experiment=None).relevant_fields()
    for name, field in FIELDS.items():
        config = load(default_path, [(name, other_than(field.default))])
        other = Job(arm=None, seed=0, config=config, experiment=None).relevant_fields()
        assert (other == same) == (field.effect is Effect.NOTHING), name
        for fixed in (OF_THE_MODEL, OF_THE_TRAINING):
            if field.effect in fixed:
                with pytest.raises(ConfigError, match=rf"^config\.{re.escape(name)} = "):
                    require_same(default, to_record(config), fixed, "there")
            else:
                require_same(default, to_record(config), fixed, "there")


def test_a_newer_field_counts_only_if_it_has_another_value_than_its_default(default_path, default):
    """So a job that was finished before the field existed stays finished."""
    newer = [name for name, field in FIELDS.items() if field.is_newer]
    assert newer
    same = relevant_fields(default)
    for name in newer:
        section, _, leaf = name.rpartition(".")
        assert leaf not in (same[section] if section else same)
        fields = relevant_fields(load(default_path, [(name, "high")]))
        assert (fields[section] if section else fields)[leaf] == "high"


def test_fields_match_whole_names():
    """A field does not get the effect of another field whose name is the start of its own name."""
    assert effect_of("loss.variance") is Effect.MODEL
    assert effect_of("train.batch_size") is Effect.BATCHES
    assert effect_of("train.batch_size_of_another_version") is Effect.NOTHING
    assert (
        effect_of("model.num_layers") is Effect.MODEL
    )  # a field of the mlp, not of the default network
    assert effect_of("evaluate.anything") is Effect.NOTHING


REGISTRIES = {
    "schedule": schedules.SCHEDULES,
    "loss": weightings.WEIGHTINGS,
    "sampling": samplers.SAMPLERS,
}


@pytest.mark.parametrize(
    ("section", "function"),
    [(section, name) for section, registry in REGISTRIES.items() for name in registry],
)
def test_every_argument_of_a_registered_function_is_a_field(default, section, function):
    """The field is unset by default and has the type that the function declares."""
    fields = default[section]
    types = {bool: bool, int: int, str: str, float: float}
    for name, parameter in inspect.signature(REGISTRIES[section][function]).parameters.items():
        if name == "num_timesteps":
            continue
        assert name in fields, name
        assert fields[name] is None
        reference = fields.get_ref(name)
        array = "betas"  # a config has the path of its file
        expected = str if name == array else types.get(parameter.annotation, float)
        assert reference.get_type() is expected, name


def test_the_record_of_a_config_is_json_with_null_for_unset(default):
    record = to_record(default)
    assert record["schedule"]["s"] is None
    assert record["model"]["channel_multipliers"] == list(default.model.channel_multipliers)
    assert to_record(default) == to_record(default.copy_and_resolve_references())


def test_differences_name_the_fields_that_changed(default_path, default):
    recorded = to_record(default)
    assert differences(default, recorded) == {}
    config = load(
        default_path,
        [("schedule.s", "0.02"), ("seed", "7"), ("model.channel_multipliers", "(1, 2)")],
    )
    assert differences(config, recorded) == {
        "config.model.channel_multipliers": ([*default.model.channel_multipliers], [1, 2]),
        "config.schedule.s": (None, 0.02),
        "config.seed": (default.seed, 7),
    }


def test_a_field_that_a_record_lacks_counts_as_the_default(default_path, default):
    """So a run that was recorded before the field existed can resume with its default."""
    recorded = to_record(default)
    del recorded["schedule"]["s"], recorded["loss"]["label_dropout"]
    recorded["old"] = {"field": 1}
    assert differences(default, recorded) == {"config.old.field": (1, None)}
    changed = load(default_path, [("loss.label_dropout", "0.1")])
    assert differences(changed, recorded)["config.loss.label_dropout"] == (0.0, 0.1)


def test_choose_returns_the_entry_of_a_registry_or_the_name_in_a_list():
    assert choose("config.schedule.name", "b", {"a": 1, "b": 2}, "schedule") == 2
    assert choose("config.loss.prediction", "b", ("a", "b"), "prediction") == "b"


@pytest.mark.parametrize("options", [{"linear": 1, "cosine": 2}, ("linear", "cosine")])
def test_choose_names_the_field_the_value_and_the_choices(options):
    with pytest.raises(ConfigError) as error:
        choose("config.schedule.name", "cosin", options, "schedule")
    assert message_of(error) == (
        "config.schedule.name = 'cosin': unknown schedule; did you mean 'cosine'? (cosine, linear)"
    )
    with pytest.raises(ConfigError) as error:
        choose("config.schedule.name", "zzz", options, "schedule")
    assert message_of(error) == ("config.schedule.name = 'zzz': unknown schedule (cosine, linear)")


def test_require_names_the_field_the_value_and_what_is_allowed():
    require(True, "config.train.batch_size", 1, "at least 1")
    with pytest.raises(ConfigError) as error:
        require(False, "config.train.batch_size", 0, "at least 1")
    assert message_of(error) == "config.train.batch_size = 0: must be at least 1"


# --- values that have the right type and that no run can use ---------------------------------


def leaves_of_integers(default):
    return [name for name, value in leaves(default) if type(value) in (int, tuple)]


def test_an_integer_beyond_int32_is_refused_unless_it_is_a_seed(default_path, default):
    """jax counts in int32."""
    counts = leaves_of_integers(default)
    assert {"optimizer.warmup_steps", "train.num_steps", "sampling.num_images"} <= {*counts}
    for name in counts:
        is_tuple = isinstance(value_of(default, name), tuple)
        for count in (2**31, -(2**31) - 1):
            text = f"({count},)" if is_tuple else str(count)
            if name in ("seed", "ablate.seeds"):
                load(default_path, [(name, text)])
                continue
            with pytest.raises(ConfigError) as error:
                load(default_path, [(name, text)])
            assert message_of(error).startswith(f"config.{name} = ")
            assert "of at most 2147483647 in size" in message_of(error)
    for name in ("editing.timestep", "sampling.num_steps", "evaluate.num_examples"):  # unset
        with pytest.raises(ConfigError, match=f"^config.{name} = 2147483648: must be an integer"):
            load(default_path, [(name, str(2**31))])


def create(repository, fields):
    overrides = [(name, str(value)) for name, value in (TOY2D | fields).items()]
    return create_experiment(load(str(repository / "configs/toy2d.py"), overrides))


ZERO_INSIDE = {"schedule.name": "from_betas", "schedule.num_timesteps": 3}
OFF_GRID = {"sampling.sampler": "heun", "sampling.spacing": "karras"}
REFUSED = {
    "edm's empty interval": (
        {"sampling.sampler": "edm", "sampling.churn_min": 2.0, "sampling.churn_max": 1.0},
        "config.sampling.churn_min = 2.0: must be at most churn_max = 1.0",
    ),
    "one step that is none, leading": (
        {"sampling.sampler": "ddim", "sampling.num_steps": 1, "sampling.spacing": "leading"},
        "config.sampling.spacing = 'leading': must be trailing for a single step: ",
    ),
    "one step that is none, compared": (
        {
            "sampling.sampler": "ddim",
            "sampling.compared_steps": (1, 5),
            "sampling.spacing": "quadratic",
        },
        "config.sampling.spacing = 'quadratic': must be trailing for a single step: ",
    ),
    "several steps of one noise level": (
        OFF_GRID | {"schedule.num_timesteps": 1, "sampling.num_steps": 5},
        "config.sampling.num_steps = 5: must be 1: the schedule has a single noise level",
    ),
    "several steps of one noise level, compared": (
        OFF_GRID
        | {
            "schedule.num_timesteps": 1,
            "sampling.num_steps": 1,
            "sampling.compared_steps": (1, 2),
        },
        "config.sampling.compared_steps = 2: must be 1: the schedule has a single noise level",
    ),
    "an offset that leaves no cosine": (
        {"schedule.s": 1e163},
        "config.schedule.s = 1e+163: must be in [0, 1e100]",
    ),
    "a rho that leaves no sigma": (
        OFF_GRID | {"sampling.rho": 1e-3},
        "config.sampling.rho = 0.001: must be in [0.0",
    ),
    "another number of betas": (
        ZERO_INSIDE | {"schedule.num_timesteps": 1000},
        "config.schedule.num_timesteps = 1000: must be 3, the number of betas in ",
    ),
    "mu after zero SNR": (
        ZERO_INSIDE | {"loss.prediction": "mu"},
        "config.loss.prediction = 'mu': must be x_0 or v: the schedule reaches zero SNR before",
    ),
    "zero terminal SNR after zero SNR": (
        ZERO_INSIDE | {"loss.prediction": "v", "schedule.zero_terminal_snr": True},
        "config.schedule.zero_terminal_snr = True: must be False: the SNR is zero before",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_contradict_each_other_are_refused_by_the_true_cause(
    repository, tmp_path, name
):
    fields, expected = REFUSED[name]
    np.save(tmp_path / "betas.npy", [0.1, 1.0, 0.1])
    if fields.get("schedule.name") == "from_betas":
        fields = {**fields, "schedule.betas": tmp_path / "betas.npy"}
    with pytest.raises(ConfigError) as error:
        create(repository, fields)
    assert message_of(error).startswith(expected)


@pytest.mark.parametrize("prediction", ["x_0", "v"])
def test_zero_snr_inside_the_chain_is_allowed_for_x_0_and_v(repository, tmp_path, prediction):
    """The loss and its gradient are finite for a network that predicts x_0 or v."""
    np.save(tmp_path / "betas.npy", [0.1, 1.0, 0.1])
    fields = ZERO_INSIDE | {
        "schedule.betas": tmp_path / "betas.npy",
        "loss.prediction": prediction,
        "loss.weighting": "min_snr",
        "loss.gamma": 5.0,
    }
    experiment = create(repository, fields)
    examples = Examples(x_0=jnp.ones((6, 2)), label=None, indices=jnp.arange(6), batch_size=6)
    inputs = LossInputs(experiment.schedule, (), jax.random.key(0), examples)
    params = experiment.model.init(jax.random.key(1))

    def loss(params):
        return experiment.losses_of(params, inputs).losses.mean()

    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)):
        assert np.isfinite(leaf).all()


# --- bounds that error messages print --------------------------------------------------------


@given(low=st.floats(-1e9, 1e9), high=st.floats(-1e9, 1e9))
@example(low=1 / 3, high=1 / 3)
@example(low=2 / 3, high=2 / 3 + 1e-12)
@example(low=0.0, high=0.0)
def test_a_printed_bound_is_itself_allowed(low, high):
    low, high = sorted((low, high))
    printed = [float(end) for end in bounds(low, high).strip("[]").split(", ")]
    assert low <= printed[0] <= printed[1] <= high
    for end, text in zip(printed, (at_least(low), at_most(high))):
        assert low <= float(text) <= high or printed == [low, high]
        assert end == pytest.approx(float(text), rel=1e-5)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid", "quadratic"])
def test_the_printed_bounds_of_sigma_and_log_snr_are_allowed(spacing, name):
    for num_timesteps in (1, 7, 10, 352, 1000):
        full = schedules.SCHEDULES[name](num_timesteps)
        with pytest.raises(ConfigError) as error:
            schedules.respace(full, 1, spacing, sigma_max=1e30)
        least, most = message_of(error).rpartition("[")[2].rstrip("]").split(", ")
        for sigma_min, sigma_max in ((least, most), (least, None), (None, most)):
            ends = {
                field: None if text is None else float(text)
                for field, text in (("sigma_min", sigma_min), ("sigma_max", sigma_max))
            }
            schedules.respace(full, 1 if num_timesteps == 1 else 3, spacing, **ends)
        columns = np.float64([full.one_minus_alpha_bar[-1], full.alpha_bar[-1]])
        noisiest = float(np.exp(np.subtract(*np.log(columns)) / 2))
        if num_timesteps > 1:
            with pytest.raises(ConfigError, match=r"^sigma_min = .*: must be below sigma_max = "):
                schedules.respace(full, 2, spacing, sigma_min=noisiest)
        with pytest.raises(ConfigError) as error:
            schedules.at_log_snr(full, np.array([50.0]))
        for text in message_of(error).rpartition("[")[2].rstrip("]").split(", "):
            schedules.at_log_snr(full, np.array([float(text)]))


@pytest.mark.parametrize("tau", [0.007, 0.0123456789, 1 / 30, 0.05])
def test_the_printed_bound_of_a_sigmoid_is_allowed(tau):
    for field, ends in (("start", (-50.0, 3.0)), ("end", (-0.1, 50.0))):
        with pytest.raises(ConfigError) as error:
            schedules.sigmoid(4, **dict(zip(("start", "end"), ends)), tau=tau)
        assert message_of(error).startswith(f"{field} = ")
        most = float(re.findall(r"[\d.]+", message_of(error))[-1])
        assert most == pytest.approx(50 * tau, rel=1e-5)
        schedules.sigmoid(4, start=-most, end=most, tau=tau)

"""The config of a run: read from a file, overridden by flags, compared with an earlier run's.

Every mistake is a ``ConfigError``, raised before anything is compiled or written. default.py sets
the types of the fields. The code that uses a field checks its value.
"""

import ast
import copy
import functools
import json
import math
import operator
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from diffusion_jax.config import default
from diffusion_jax.config.default import Effect, effect_of
from diffusion_jax.config.paths import expand
from diffusion_jax.errors import ConfigError, nearest, require

# Fields with these effects must not change when a checkpoint is read, and when training resumes.
OF_THE_MODEL = {Effect.DATA, Effect.MODEL}
OF_THE_TRAINING = OF_THE_MODEL | {Effect.BATCHES, Effect.TRAINING}

# jax uses int32 for counts. Only seeds may be larger.
LARGEST_COUNT = 2**31 - 1
SEEDS = ("config.seed", "config.ablate.seeds")

# The types that a field may have, as error messages call them.
KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def load(path: str, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    """Read a config file and apply the overrides of the command line; the result is locked.

    A config file starts from ``default.get_config()`` of ``diffusion_jax.config``. The parent of
    the file's folder is added to sys.path, so that ``from configs import mnist`` works in a file of
    the folder configs.

    Raises:
        ConfigError: the file holds no config, or a field is unknown, missing or of a wrong type.
    """
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    config = _execute(path)

    defaults = default.get_config()
    expected, written = _fields(defaults), _fields(config)
    for name, field in written.items():
        if not _is_of_model(name):
            _find(defaults, name)
        _check(name, field.value, expected.get(name, field))
    for name in expected:
        if name not in written and not _is_of_model(name):
            raise ConfigError(f"{name}: missing in {path}; start from default.get_config()")
    return override(config, overrides)


def override(config: ConfigDict, fields: Iterable[tuple[str, str]]) -> ConfigDict:
    """A locked copy of a config with other values of fields, such as ("schedule.s", "0.02").

    Raises:
        ConfigError: a field is unknown, or a value has the wrong type.
    """
    config = copy.deepcopy(config)
    expected, present = _fields(default.get_config()), _fields(config)
    for name, text in fields:
        field = f"config.{name}"
        section, leaf = _find(config, field)
        like = expected.get(field, present[field])
        with section.ignore_type():  # _check is stricter than ml_collections
            section[leaf] = _check(field, _parse(text, like), like)
    return config.lock()


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a field by its name, such as "schedule.s"."""
    return functools.reduce(operator.getitem, name.split("."), config)


def to_record(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON data for config.json; an unset field is None (null in the file)."""
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))


def relevant_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields that the scores of a job depend on: what a finished job is recognised by."""
    fields: dict[str, Any] = config.to_dict()
    for name, field in default.FIELDS.items():
        section, _, leaf = name.rpartition(".")
        holder = fields[section] if section else fields
        if leaf not in holder:  # a field of another model
            continue
        if field.effect is Effect.NOTHING or (field.is_newer and field.is_default(holder[leaf])):
            del holder[leaf]
    return {name: value for name, value in fields.items() if value != {}}


def differences(config: ConfigDict, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which a config differs from a run's config.json, as (recorded, now).

    An older record lacks newer fields: a missing field has its default of default.py, or is unset
    if default.py does not have it either.

    Raises:
        ConfigError: the record is damaged.
    """
    for name, field in to_record(default.get_config()).items():
        if name in recorded:
            is_damaged = isinstance(recorded[name], dict) != isinstance(field, dict)
        else:
            is_damaged = name in ("model", "loss", "train")  # every record has these
        if is_damaged:
            raise ConfigError(f"config.{name}: damaged in the config.json of the run")
    defaults, before, now = (
        {name: field.value for name, field in _fields(ConfigDict(record)).items()}
        for record in (to_record(default.get_config()), recorded, to_record(config))
    )
    before = {name: defaults[name] for name in defaults if not _is_of_model(name)} | before
    if before["config.schedule.name"] == "from_betas":  # older versions ignored num_timesteps here
        before["config.schedule.num_timesteps"] = now["config.schedule.num_timesteps"]
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before | now)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def require_same(
    config: ConfigDict, recorded: Mapping[str, Any], fixed: Collection[Effect], where: object
) -> None:
    """Refuse a config that differs from the record of the folder ``where`` in a fixed field.

    A field is fixed if its effect is in ``fixed``; other fields may differ.

    Raises:
        ConfigError: a fixed field differs; the message names it and both values.
    """
    for name, (before, now) in differences(config, recorded).items():
        if effect_of(name.removeprefix("config.")) in fixed:
            raise ConfigError(
                f"{name} = {now!r}: the run in {where} has {before!r}; "
                "use that value or another --workdir"
            )


class _Field(NamedTuple):
    kind: type
    value: Any
    optional: bool  # a placeholder, which may be unset


def _fields(config: ConfigDict, prefix: str = "config") -> dict[str, _Field]:
    fields: dict[str, _Field] = {}
    for name, value in config.items(preserve_field_references=True):
        field = f"{prefix}.{name}"
        if isinstance(value, ConfigDict):
            fields |= _fields(value, field)
        elif isinstance(value, FieldReference):
            fields[field] = _Field(value.get_type(), value.get(), True)
        else:
            fields[field] = _Field(type(value), value, False)
    return fields


def _is_of_model(field: str) -> bool:
    # These fields are the arguments of config.model.name, so models.create_model checks them.
    return field.startswith("config.model.") and field != "config.model.name"


def _find(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    node, path = config, "config"
    for name in field.split(".")[1:]:
        section, path = node, f"{path}.{name}"
        names = section.keys() if isinstance(section, ConfigDict) else ()
        if name not in names:
            raise ConfigError(f"{path}: no such field{nearest(name, names)}")
        node = section[name]
    if isinstance(node, ConfigDict):
        raise ConfigError(f"{path}: a section; set one of its fields ({', '.join(node.keys())})")
    return section, name


def _parse(text: str, like: _Field) -> Any:
    """Parse the text of a flag; text that has no such type stays text, and _check refuses it."""
    if like.optional and text.lower() == "none":
        return None
    try:
        if like.kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return ast.literal_eval(text) if like.kind is tuple else like.kind(text)
    except (KeyError, SyntaxError, TypeError, ValueError):
        return text


def _check(field: str, value: Any, like: _Field) -> Any:
    if value is None and like.optional:
        return None
    declared = default.FIELDS.get(field.removeprefix("config."))
    if declared is not None and declared.default is Path and isinstance(value, str):
        value = expand(field, value)
    kind = like.kind
    if kind is tuple:
        kind = type(like.value[0]) if like.value else int
    require(kind in KINDS, field, value, f"{', '.join(KINDS.values())}, or a tuple of these")
    if like.kind is tuple:
        fits = isinstance(value, tuple) and all(_fits(element, kind) for element in value)
        require(fits, field, value, f"a tuple, each element {KINDS[kind]}")
    else:
        require(_fits(value, kind), field, value, KINDS[kind] + " or none" * like.optional)
    elements = value if like.kind is tuple else (value,)
    if kind is int and field not in SEEDS:
        fits = all(abs(element) <= LARGEST_COUNT for element in elements)
        require(fits, field, value, f"an integer of at most {LARGEST_COUNT} in size")
    return tuple(map(kind, value)) if like.kind is tuple else kind(value)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) != (kind is bool):  # in Python, True is an int
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _execute(path: str) -> ConfigDict:
    flag, file = f"--config={path}", Path(path)
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        others = [str(other) for other in file.parent.glob("*.py")]
        raise ConfigError(f"{flag}: no such file{nearest(str(file), others)}") from None
    except OSError as error:
        raise ConfigError(f"{flag}: {error.strerror}") from error
    module: dict[str, Any] = {"__name__": file.stem, "__file__": path}
    try:
        exec(compile(source, path, "exec"), module)
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f" line {lines[-1]}:" if lines else ""
        raise ConfigError(f"{flag}:{where} {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{flag}: must have a get_config() that returns a ConfigDict")
    return config

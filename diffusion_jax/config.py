"""What a user may write: the command line, the config file, and the fields in it.

Every mistake is a ``ConfigError``, raised before anything is compiled or written. The types of the
fields are those of configs/default.py; what their values may be is said where they are used.
"""

import ast
import copy
import difflib
import functools
import inspect
import json
import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

FLAGS = ("--config", "--workdir", "--mode")

# The types that a field may have, in the words of an error message.
KINDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


class ConfigError(ValueError):
    """A mistake of the user's, in one line: the field, its value, what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Arguments(NamedTuple):
    """The command line; overrides are pairs such as ("schedule.s", "0.02")."""

    config_path: str
    workdir: str
    mode: str
    overrides: tuple[tuple[str, str], ...]


class RunError(Exception):
    """A run that was right cannot go on; one line, exit status 1."""


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Refuse a value: ``config.train.batch_size = 0: must be at least 1``.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(f"{field} = {value!r}: must be {allowed}")


def choose(field: str, value: str, options: Mapping[str, Any] | Sequence[str], noun: str) -> Any:
    """The entry of a registry that a field names, or of a list of names the name itself.

    Raises:
        ConfigError: there is none; the message has the nearest spelling and all the names.
    """
    if value not in options:
        raise ConfigError(f"{field} = {value!r}: unknown {noun}{_nearest(value, options)}")
    return options[value] if isinstance(options, Mapping) else value


def function_arguments(
    section: str,
    fields: ConfigDict,
    names: Iterable[str],
    function: Callable[..., Any],
    name: str,
) -> dict[str, Any]:
    """The fields among ``names`` that are set, all of them arguments of the function."""
    parameters = inspect.signature(function).parameters
    given = {field: fields[field] for field in names if fields[field] is not None}
    for field, value in given.items():
        allowed = f"unset, {name} has no such argument ({', '.join(parameters) or 'it has none'})"
        require(field in parameters, f"config.{section}.{field}", value, allowed)
    return given


def parse_arguments(argv: Sequence[str], modes: Iterable[str]) -> Arguments:
    """The words of the command line, after the program's name and without --help.

    Raises:
        ConfigError: an unknown, repeated or missing flag, one without a value, an unknown mode.
    """
    values: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS and not flag.startswith("--config."):
            raise ConfigError(f"{flag}: unknown flag{_nearest(flag, [*FLAGS, '--config.FIELD'])}")
        if flag in values:
            raise ConfigError(f"{flag}: given twice")
        values[flag] = value if equals else next(words, "")
        if not values[flag] or (not equals and values[flag].startswith("--")):
            raise ConfigError(f"{flag}: needs a value")
    for flag in ("--config", "--workdir"):
        if flag not in values:
            raise ConfigError(f"{flag}: missing")
    mode = choose("--mode", values.get("--mode", "train"), tuple(modes), "mode")
    fields = [(flag.removeprefix("--config."), values[flag]) for flag in values if "." in flag]
    return Arguments(values["--config"], values["--workdir"], mode, tuple(fields))


def load(path: str, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    """The config of a file, with the fields that the command line sets; locked.

    The folder above the file's is put on the module path: a config starts from
    ``from configs import default``.

    Raises:
        ConfigError: the file is no config, or a field is unknown, missing or of the wrong type.
    """
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    config = _execute(path)

    from configs import default as default_file

    default = default_file.get_config()
    expected, given = _fields(default), _fields(config)
    for field, found in given.items():
        if not _is_of_model(field):
            _find(default, field)
        _check(field, found.value, expected.get(field, found))
    for field in expected:
        if field not in given and not _is_of_model(field):
            raise ConfigError(f"{field}: missing in {path}; start from configs/default.py")
    return override(config, overrides)


def override(config: ConfigDict, fields: Iterable[tuple[str, str]]) -> ConfigDict:
    """A locked copy of a config in which fields, as ("schedule.s", "0.02"), have other values.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type.
    """
    from configs import default as default_file

    config = copy.deepcopy(config)
    expected, given = _fields(default_file.get_config()), _fields(config)
    for name, text in fields:
        field = f"config.{name}"
        section, leaf = _find(config, field)
        like = expected.get(field, given[field])
        with section.ignore_type():  # _check is stricter than ml_collections
            section[leaf] = _check(field, _parse(text, like), like)
    return config.lock()


def value(config: ConfigDict, name: str) -> Any:
    """The value of a field that is named as "schedule.s"."""
    return functools.reduce(operator.getitem, name.split("."), config)


def to_json(config: ConfigDict) -> str:
    """The text of a run's config.json; a field that is unset is null."""
    return json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"


def differences(config: ConfigDict, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which a config is not the one in a run's config.json: (recorded, now).

    A field that the record does not have, being older, counts as what configs/default.py has; one
    that is nowhere as unset.
    """
    from configs import default as default_file

    default, before, now = (
        {field: found.value for field, found in _fields(ConfigDict(record)).items()}
        for record in (
            json.loads(to_json(default_file.get_config())),
            recorded,
            json.loads(to_json(config)),
        )
    )
    before = {field: default[field] for field in default if not _is_of_model(field)} | before
    pairs = {field: (before.get(field), now.get(field)) for field in sorted(before | now)}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


class _Field(NamedTuple):
    kind: type
    value: Any
    optional: bool  # a placeholder, which may be unset


def _fields(config: ConfigDict, prefix: str = "config") -> dict[str, _Field]:
    fields = {}
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
    # These are the arguments of the model that is named, so models.create_model checks them.
    return field.startswith("config.model.") and field != "config.model.name"


def _find(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    node, path = config, "config"
    for name in field.split(".")[1:]:
        section, path = node, f"{path}.{name}"
        names = section.keys() if isinstance(section, ConfigDict) else ()
        if name not in names:
            raise ConfigError(f"{path}: no such field{_nearest(name, names)}")
        node = section[name]
    if isinstance(node, ConfigDict):
        raise ConfigError(f"{path}: a section; set one of its fields ({', '.join(node.keys())})")
    return section, name


def _parse(text: str, like: _Field) -> Any:
    """The value that a text stands for, or the text itself, which _check then refuses."""
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
    kind = like.kind
    if kind is tuple:
        kind = type(like.value[0]) if like.value else int
    require(kind in KINDS, field, value, f"{', '.join(KINDS.values())}, or a tuple of such")
    if like.kind is tuple:
        fits = isinstance(value, tuple) and all(_fits(element, kind) for element in value)
        require(fits, field, value, f"a tuple, each element {KINDS[kind]}")
        return tuple(map(kind, value))
    require(_fits(value, kind), field, value, KINDS[kind] + " or none" * like.optional)
    return kind(value)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) != (kind is bool):  # to Python, True is an integer
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
        raise ConfigError(f"{flag}: no such file{_nearest(str(file), others)}") from None
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


def _nearest(word: str, options: Iterable[str]) -> str:
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} ({', '.join(names)})" if names else hint

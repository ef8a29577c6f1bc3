"""The errors that the program reports to its user, and the functions that raise them.

A ``ConfigError`` is a mistake of the user: nothing has been written, and the exit status is 2. A
``RunError`` stops a run whose config was valid: the exit status is 1.
"""

import contextlib
import decimal
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, SupportsFloat, overload


class ConfigError(ValueError):
    """A mistake of the user, in one line: the field, its value, and the allowed values."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class WorkdirError(ConfigError):
    """The folder of a run cannot be used: ``workdir=PATH: REASON``.

    The command line prints the message with two dashes in front, as its flag --workdir.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"workdir={path}: {reason}")


class RunError(Exception):
    """A run with a valid config cannot continue; one line, exit status 1."""


class NonFiniteSampleError(RunError):
    """A sample is not finite: the network or the sampler has diverged."""


class NonFiniteLossError(RunError):
    """A loss, the gradient norm of a step or a term of the bound is not finite."""


@contextlib.contextmanager
def after_writing(state: str) -> Iterator[None]:
    """Turn a ConfigError into a RunError, for code that runs after the first file was written.

    Raises:
        RunError: the ``state`` that the run has reached, and the message of the ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        raise RunError(f"{state}: {error}") from error


@overload
def require(condition: Literal[False], field: str, value: Any, allowed: str) -> NoReturn: ...
@overload
def require(condition: Any, field: str, value: Any, allowed: str) -> None: ...
def require(condition: Any, field: str, value: Any, allowed: str) -> None:
    """Refuse a value unless ``condition`` holds.

    Raises:
        ConfigError: ``config.train.batch_size = 0: must be at least 1``, for example.
    """
    if not condition:
        raise ConfigError(f"{field} = {_show(value)}: must be {allowed}")


def _show(value: Any) -> str:
    """The value as text: the shape of an array, the Python literal of anything else."""
    if getattr(value, "ndim", 0):
        return f"array of shape {value.shape}"
    return repr(value.item() if hasattr(value, "item") else value)


def bounds(low: SupportsFloat, high: SupportsFloat) -> str:
    """The text [low, high] in six digits, rounded inwards: both printed bounds are allowed."""
    texts = at_least(low), at_most(high)
    if float(texts[0]) > float(texts[1]):  # no number of six digits lies between them
        texts = repr(float(low)), repr(float(high))
    return f"[{', '.join(texts)}]"


def at_least(bound: SupportsFloat) -> str:
    """The text of a lower bound in six digits, rounded up."""
    return _rounded(bound, decimal.ROUND_CEILING)


def at_most(bound: SupportsFloat) -> str:
    """The text of an upper bound in six digits, rounded down."""
    return _rounded(bound, decimal.ROUND_FLOOR)


def _rounded(bound: SupportsFloat, rounding: str) -> str:
    context = decimal.Context(prec=6, rounding=rounding)
    return f"{context.create_decimal(float(bound)):g}"


def choose(field: str, value: str, options: Mapping[str, Any] | Sequence[str], noun: str) -> Any:
    """Look up ``value`` in a registry, or check that it is in a list of names and return it.

    Raises:
        ConfigError: an unknown name; the message has the nearest spelling and all the names.
    """
    if value not in options:
        raise ConfigError(f"{field} = {value!r}: unknown {noun}{nearest(value, options)}")
    return options[value] if isinstance(options, Mapping) else value


def nearest(word: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest option, then all options."""
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} ({', '.join(names)})" if names else hint


@contextlib.contextmanager
def in_section(section: str) -> Iterator[None]:
    """Put the section of the config before the argument's name in the errors of library functions.

    Raises:
        ConfigError: ``config.sampling.eta = 2.0: must be in [0, 1]`` for ``eta = 2.0: ...``.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from error

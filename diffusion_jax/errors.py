"""What can go wrong, in words for the person who runs the program.

A ``ConfigError`` is a mistake in what was asked for: nothing has been written, and the exit status
is 2. A ``RunError`` stops a run that was right: the exit status is 1.
"""

import contextlib
import decimal
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, SupportsFloat, overload


class ConfigError(ValueError):
    """A mistake of the user's, in one line: the field, its value, what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class WorkdirError(ConfigError):
    """A mistake about the folder of a run: ``workdir=PATH: REASON``.

    The command line puts the dashes of its flag before it.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"workdir={path}: {reason}")


class RunError(Exception):
    """A run that was right cannot go on; one line, exit status 1."""


class NonFiniteSampleError(RunError):
    """A sample that is not a number: the network or the sampler has diverged."""


class NonFiniteLossError(RunError):
    """A loss, the gradient of a step or a term of the bound is not a number."""


@contextlib.contextmanager
def after_writing(state: str) -> Iterator[None]:
    """A mistake of the user's that nobody could see before something was written.

    Raises:
        RunError: the ``state`` that was reached, and the mistake.
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
    """Refuse a value: ``config.train.batch_size = 0: must be at least 1``.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(f"{field} = {_show(value)}: must be {allowed}")


def _show(value: Any) -> str:
    """An array by its shape, all else as one would write it."""
    if getattr(value, "ndim", 0):
        return f"array of shape {value.shape}"
    return repr(value.item() if hasattr(value, "item") else value)


def bounds(low: SupportsFloat, high: SupportsFloat) -> str:
    """Computed bounds, [low, high] in six digits: rounded inwards, so that both are allowed."""
    texts = at_least(low), at_most(high)
    if float(texts[0]) > float(texts[1]):  # nothing of six digits is between them
        texts = repr(float(low)), repr(float(high))
    return f"[{', '.join(texts)}]"


def at_least(bound: SupportsFloat) -> str:
    """A computed lower bound in six digits, rounded up."""
    return _rounded(bound, decimal.ROUND_CEILING)


def at_most(bound: SupportsFloat) -> str:
    """A computed upper bound in six digits, rounded down."""
    return _rounded(bound, decimal.ROUND_FLOOR)


def _rounded(bound: SupportsFloat, rounding: str) -> str:
    context = decimal.Context(prec=6, rounding=rounding)
    return f"{context.create_decimal(float(bound)):g}"


def choose(field: str, value: str, options: Mapping[str, Any] | Sequence[str], noun: str) -> Any:
    """The entry of a registry that a field names, or of a list of names the name itself.

    Raises:
        ConfigError: there is none; the message has the nearest spelling and all the names.
    """
    if value not in options:
        raise ConfigError(f"{field} = {value!r}: unknown {noun}{nearest(value, options)}")
    return options[value] if isinstance(options, Mapping) else value


def nearest(word: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest option, and all of them."""
    names = sorted(options)
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} ({', '.join(names)})" if names else hint


@contextlib.contextmanager
def in_section(section: str) -> Iterator[None]:
    """Name the section of the config in the errors of a function that knows its arguments only.

    Raises:
        ConfigError: ``config.sampling.eta = 2.0: must be in [0, 1]`` for ``eta = 2.0: ...``.
    """
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from error

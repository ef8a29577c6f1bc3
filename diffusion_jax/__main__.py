"""Train, sample and score denoising diffusion models.

    python main.py --config=configs/digits.py --workdir=DIR                 train, then sample
    python main.py --config=configs/digits.py --workdir=DIR --mode=sample   sample again
    python main.py --config=configs/digits.py --workdir=DIR --mode=evaluate bits/dim of the test set
    python main.py --config=configs/digits_offset.py --workdir=DIR --mode=ablate  a grid of runs

The same command in the same folder continues a run that was stopped or killed, in every mode.
Every field of a config is a flag, for example --config.schedule.s=0.02.
diffusion_jax/config/default.py lists the fields.

Exit status: 0 success; 1 a failure while running; 2 a mistake in the command line or the config,
with nothing written; 143 stopped by SIGTERM after saving (130 by Ctrl-C).
"""

import logging
import pathlib
import shlex
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_jax.config.paths import expand
from diffusion_jax.errors import ConfigError, choose, nearest

FLAGS = ("--config", "--workdir", "--mode")
MODES = ("train", "sample", "evaluate", "ablate")


class Arguments(NamedTuple):
    """The parsed command line; overrides are pairs such as ("schedule.s", "0.02")."""

    config_path: str
    workdir: str
    mode: str
    overrides: tuple[tuple[str, str], ...]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse the arguments of the command line, without the program's name and --help.

    Raises:
        ConfigError: a flag is unknown, repeated, missing or has no value, or the mode is unknown.
    """
    values: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS and not flag.startswith("--config."):
            raise ConfigError(f"{flag}: unknown flag{nearest(flag, [*FLAGS, '--config.FIELD'])}")
        if flag in values:
            raise ConfigError(f"{flag}: given twice")
        values[flag] = value if equals else next(words, "")
        if not values[flag] or (not equals and values[flag].startswith("--")):
            raise ConfigError(f"{flag}: needs a value")
    for flag in ("--config", "--workdir"):
        if flag not in values:
            raise ConfigError(f"{flag}: missing")
    mode = choose("--mode", values.get("--mode", "train"), MODES, "mode")
    fields = [(flag.removeprefix("--config."), values[flag]) for flag in values if "." in flag]
    return Arguments(
        config_path=expand("--config", values["--config"]),
        workdir=expand("--workdir", values["--workdir"]),
        mode=mode,
        overrides=tuple(fields),
    )


def main(argv: Sequence[str]) -> int:
    """Run one mode; returns the exit status."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        arguments = parse_arguments(argv)
        # imported here so that --help and a mistyped flag need not wait for jax
        from diffusion_jax.config.config import load

        config = load(arguments.config_path, arguments.overrides)
        _start_log()
        from diffusion_jax import commands

        command = shlex.join(["python", "main.py", *argv])
        return commands.run(arguments.mode, config, pathlib.Path(arguments.workdir), command)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # training handles SIGINT itself: runtime/stop.py
        print("interrupted", file=sys.stderr)
        return 130


def _start_log() -> None:
    """Send the project's log to standard error, with a time on each line.

    Uncaught exceptions of background threads, such as TensorBoard's, become one line of this log.
    """
    from absl import flags
    from absl import logging as absl_logging

    flags.FLAGS.mark_as_parsed()  # absl's logging requires it; parse_arguments reads our flags
    log = logging.getLogger("diffusion_jax")
    log.addHandler(absl_logging.get_absl_handler())
    log.setLevel(logging.INFO)
    log.propagate = False

    def log_failure(failure: threading.ExceptHookArgs) -> None:
        name = "a thread" if failure.thread is None else failure.thread.name
        log.error("%s: %s: %s", name, failure.exc_type.__name__, failure.exc_value)

    threading.excepthook = log_failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The original archives: download, look-up, decompression and checksums.

The error messages name the file and the problem; prepared.py adds the config field before them.
"""

import gzip
import hashlib
import http.client
import queue
import shutil
import sys
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from diffusion_jax.errors import ConfigError

ANSWER_SECONDS = 5.0  # time limit for the first answer of a server
READ_SECONDS = 30.0  # time limit for each later read
T = TypeVar("T")


def download(urls: Iterable[str], folder: Path) -> None:
    """Download archives into a folder, with one attempt each.

    Raises:
        ConfigError: the server does not answer within ``ANSWER_SECONDS``, or the transfer fails.
    """
    for url in urls:
        print(f"downloading {url}", file=sys.stderr, flush=True)
        try:
            with _open(url) as answer, open(folder / url.rsplit("/", 1)[1], "wb") as file:
                shutil.copyfileobj(answer, file)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(f"{url} cannot be fetched ({reason})") from error


def locate(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The path of each archive: ``name.gz``, or ``name`` if the user has decompressed it.

    Raises:
        ConfigError: the folder lacks an archive under both names.
    """
    paths, missing = {}, []
    for name in names:
        choices = [folder / name, folder / name.removesuffix(".gz")]
        present = [path for path in choices if path.is_file()]
        if present:
            paths[name] = present[0]
        else:
            missing.append(name)
    if missing:
        raise ConfigError(f"no {', '.join(missing)} in that folder")
    return paths


def contents(path: Path) -> bytes:
    """The contents of a file, decompressed if its name ends in .gz.

    Raises:
        ConfigError: the compressed file is truncated or damaged.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    return intact(path, lambda: gzip.decompress(path.read_bytes()))


def intact(path: Path, read: Callable[[], T]) -> T:
    """Return the result of ``read``, with its errors about a broken archive as ConfigError.

    Raises:
        ConfigError: the file is truncated or damaged.
    """
    try:
        return read()
    except EOFError as error:
        raise ConfigError(f"{path.name} is truncated ({error})") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path.name} is damaged ({error})") from error


def check(
    name: str,
    content: bytes,
    expected: str,
    algorithm: str = "sha256",
    others: Mapping[str, str] | None = None,
) -> None:
    """Compare the checksum of a file's contents with the expected one.

    ``others`` maps the checksums of similar files to their descriptions, for the message.

    Raises:
        ConfigError: the checksums differ.
    """
    actual = hashlib.new(algorithm, content).hexdigest()
    if actual != expected:
        problem = f"it is {others[actual]}" if others and actual in others else "wrong content"
        sums = f"{algorithm} {actual[:12]}..., not {expected[:12]}..."
        raise ConfigError(f"{name}: {problem} ({len(content)} bytes, {sums})")


def _open(url: str) -> http.client.HTTPResponse:
    # In a thread, because without a network the look-up of a host name can take much longer than
    # the timeout of the socket.
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def connect() -> None:
        try:
            outcome.put(urllib.request.urlopen(url, timeout=READ_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            outcome.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = outcome.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer

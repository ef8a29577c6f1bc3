"""The measurements as a JSON file, and the Markdown table that is written from it."""

import json
import os
import pathlib
import platform
import subprocess
import time
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

# The Markdown file has other text around the table.
BEGIN, END = "<!-- written by benchmarks.run -->", "<!-- end of what benchmarks.run writes -->"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "denoising-diffusion-pytorch")


class Figures(NamedTuple):
    """A contender's measurements in a case, or why there are none."""

    seconds: list[float]  # of every round
    peak_mib: float | None = None  # peak of the process's resident memory, or of the GPU's
    num_parameters: int | None = None
    left_out: str | None = None
    ready_seconds: float | None = None  # until it was compiled, see benchmarks.worker


def _git(*words: str) -> str:
    """The output of git.

    Raises:
        OSError: there is no git.
        CalledProcessError: this is no checkout.
    """
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _commit() -> str:
    try:
        # without docs/, where the table changes after each case
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def environment(gpu: str | None) -> dict[str, Any]:
    """The machine, the versions of packages, and the commit."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def summarise(found: dict[str, Figures]) -> dict[str, Any]:
    """The best peer, and the ratios of our time to its time, round by round, and of the memory.

    The times of one round are measured one after another, so a slow spell of the machine cancels.
    """
    peers = {name: f for name, f in found.items() if name != "ours" and f.seconds}
    if not peers:
        return {"best_peer": None}
    best = min(peers, key=lambda name: np.median(peers[name].seconds))
    if not found["ours"].seconds:
        return {"best_peer": best}
    ratios = np.divide(found["ours"].seconds, peers[best].seconds)
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    memory = found["ours"].peak_mib, peers[best].peak_mib
    summary = {"best_peer": best, "ratio": median, "ratio_low": low, "ratio_high": high}
    return summary | {"memory_ratio": None if None in memory else memory[0] / memory[1]}


def add(
    into: pathlib.Path,
    name: str,
    row: dict[str, Any],
    found: dict[str, Figures],
    gpu: str | None,
) -> dict[str, Any]:
    """Replace a case's row in the JSON file, write the Markdown file anew, and return the row."""
    path = into.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else {}
    figures = {contender: f._asdict() for contender, f in found.items()}
    rows[name] = row | summarise(found) | {"contenders": figures, "environment": environment(gpu)}
    path.write_text(json.dumps(rows, indent=1) + "\n")
    write_between(into.with_suffix(".md"), (BEGIN, END), markdown(rows))
    return rows[name]


def write_between(page: pathlib.Path, marks: tuple[str, str], lines: str) -> None:
    """Write lines between two marks of a Markdown file, which gets them at its end without any."""
    begin, end = marks
    text = page.read_text() if page.exists() else ""
    if begin not in text:
        text += f"{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    page.write_text(f"{before}{begin}\n\n{lines}\n{end}{rest.partition(end)[2]}")


def speed(row: dict[str, Any], figures: dict[str, Any]) -> str:
    """The median [quartiles] of a contender's speed, in the row's unit, or why it was left out."""
    if figures["left_out"]:
        return f"left out: {figures['left_out']}"
    low, median, high = np.quantile(figures["seconds"], (0.25, 0.5, 0.75))
    if row["per_second"]:
        low, median, high = (row["amount"] / s for s in (high, median, low))
    elif row["unit"] != "s":
        low, median, high = (1e3 * s / row["amount"] for s in (low, median, high))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def unit_of(row: dict[str, Any]) -> str:
    """The unit of ``speed``, such as "ms per step"."""
    if row["per_second"]:
        return f"{row['unit']}/s"
    return "s" if row["unit"] == "s" else f"ms per {row['unit']}"


def _verdict(row: dict[str, Any]) -> str:
    target, limit = row.get("target"), row.get("limit")
    seconds = row["contenders"]["ours"]["seconds"]
    if not seconds:
        wanted = target if limit is None else f"{limit:g} s"
        return "" if wanted is None else f"at most {wanted}: not measured"
    if limit is not None:
        median = np.median(seconds)
        return f"at most {limit:g} s: {'met' if median <= limit else 'not met'}"
    if target is None or row["best_peer"] is None:
        return ""
    return f"at most {target:g}: {'met' if row['ratio'] <= target else 'not met'}"


def markdown(rows: dict[str, Any]) -> str:
    """The Markdown tables: a row for each case, then one for each contender of each case."""
    lines = [
        "| case | unit | ours | best peer | time, ours / peer | memory, ours / peer | target "
        "| rounds, commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        cells = [row["title"], unit_of(row), speed(row, row["contenders"]["ours"])]
        best = row["best_peer"]
        cells.append("" if best is None else f"{speed(row, row['contenders'][best])}, {best}")
        if "ratio" not in row:
            cells += ["", ""]
        else:
            cells.append(f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]")
            memory = row["memory_ratio"]
            cells.append("" if memory is None else f"{memory:.2f}")
        rounds = max(len(figures["seconds"]) for figures in row["contenders"].values())
        cells += [_verdict(row), f"{rounds}, {row['environment']['commit']}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Every contender, with the seconds until it was compiled and had run once (a GPU: twice),",
        "without imports, and the peak memory of its process (of the GPU, where it is on one):",
        "",
        "| case | contender | speed | compiled in, s | memory, MiB | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        for contender, figures in row["contenders"].items():
            ready, memory = figures.get("ready_seconds"), figures["peak_mib"]
            count = figures["num_parameters"]
            cells = [speed(row, figures), "" if ready is None else f"{ready:.1f}"]
            cells += ["" if memory is None else f"{memory:,.0f}", f"{count:,}" if count else ""]
            lines.append(f"| {' | '.join([row['title'], contender, *cells])} |")
    return "\n".join([*lines, *describe_machines(rows)]) + "\n"


def describe_machines(rows: dict[str, Any]) -> list[str]:
    """The Markdown lines about the machines of some rows, with their versions and commits."""
    machines = {json.dumps(row["environment"], sort_keys=True): None for row in rows.values()}
    lines = ["", "Measured on:", ""]
    for machine in map(json.loads, machines):
        versions = [f"{name} {version}" for name, version in machine["versions"].items()]
        gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
        lines.append(
            f"- {gpu}{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}, "
            f"{', '.join(versions)}; commit {machine['commit']}, {machine['date']}"
        )
    return lines

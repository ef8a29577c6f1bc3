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


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


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
    # without docs/, where the table changes after each case
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
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
) -> None:
    """Replace a case's older measurement in the JSON file, and write the Markdown file anew."""
    path = into.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else {}
    figures = {contender: f._asdict() for contender, f in found.items()}
    rows[name] = row | summarise(found) | {"contenders": figures, "environment": environment(gpu)}
    path.write_text(json.dumps(rows, indent=1) + "\n")
    write_page(into, rows)


def write_page(into: pathlib.Path, rows: dict[str, Any]) -> None:
    """Write the table into its place in the Markdown file."""
    page = into.with_suffix(".md")
    text = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(rows)}\n{END}{rest.partition(END)[2]}")


def _speed(row: dict[str, Any], seconds: list[float]) -> str:
    """The median [quartiles] of the speed, in the row's unit."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    if row["per_second"]:
        low, median, high = (row["amount"] / s for s in (high, median, low))
    elif row["unit"] != "s":
        low, median, high = (1e3 * s / row["amount"] for s in (low, median, high))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def _verdict(row: dict[str, Any]) -> str:
    target, limit = row.get("target"), row.get("limit")
    if limit is not None:
        median = np.median(row["contenders"]["ours"]["seconds"])
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
        unit = f"{row['unit']}/s" if row["per_second"] else row["unit"]
        unit = f"ms per {unit}" if unit not in ("s", f"{row['unit']}/s") else unit
        cells = [row["title"], unit, _speed(row, row["contenders"]["ours"]["seconds"])]
        best = row["best_peer"]
        if best is None:
            cells += ["", "", ""]
        else:
            cells.append(f"{_speed(row, row['contenders'][best]['seconds'])}, {best}")
            cells.append(f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]")
            memory = row["memory_ratio"]
            cells.append("" if memory is None else f"{memory:.2f}")
        rounds = len(row["contenders"]["ours"]["seconds"])
        cells += [_verdict(row), f"{rounds}, {row['environment']['commit']}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Every contender, with the peak memory of its process (of the GPU, where it is on one):",
        "",
    ]
    lines += ["| case | contender | speed | memory, MiB | parameters |", "|---|---|---|---|---|"]
    for row in rows.values():
        for contender, figures in row["contenders"].items():
            if figures["left_out"]:
                cells = [f"left out: {figures['left_out']}", "", ""]
            else:
                memory, count = figures["peak_mib"], figures["num_parameters"]
                cells = [_speed(row, figures["seconds"])]
                cells += ["" if memory is None else f"{memory:,.0f}", f"{count:,}" if count else ""]
            lines.append(f"| {' | '.join([row['title'], contender, *cells])} |")
    machines = {json.dumps(row["environment"], sort_keys=True): None for row in rows.values()}
    lines += ["", "Measured on:", ""]
    for machine in map(json.loads, machines):
        versions = [f"{name} {version}" for name, version in machine["versions"].items()]
        gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
        lines.append(
            f"- {gpu}{machine['cores']} cores of {machine['cpu']}, Python {machine['python']}, "
            f"{', '.join(versions)}; commit {machine['commit']}, {machine['date']}"
        )
    return "\n".join(lines) + "\n"

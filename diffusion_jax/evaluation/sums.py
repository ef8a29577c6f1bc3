"""The sums of an evaluation: saved in a file after each batch, and summarised at the end."""

import csv
import logging
import pathlib
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Int

from diffusion_jax.diffusion.bound import Terms
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.drawing.plots import BoundCurve
from diffusion_jax.errors import NonFiniteLossError
from diffusion_jax.experiment.evaluation import EvaluationPlan
from diffusion_jax.runtime import files

LOG = logging.getLogger("diffusion_jax")

# The names of the summed numbers in messages.
NAMES = {
    "prior": "L_T",
    "flow": "the probability flow",
    "bits": "the term of the bound",
    "mse_x_0": "the squared error of x_0",
    "mse_eps": "the squared error of eps",
}


def spread_evenly(count: int, size: int) -> Int[np.ndarray, " count"]:
    """``count`` evenly spaced numbers of 0..size-1: a set may be sorted, or easier at its start."""
    return np.arange(count) * size // count


class Sums:
    """The sums of an evaluation so far; a killed evaluation is resumed from their file."""

    def __init__(self, plan: EvaluationPlan, num_timesteps: int) -> None:
        num_flow = plan.flow.num_examples if plan.flow else 0
        self.arrays = {
            "done": np.zeros((), int),  # images of the bound
            "flow_done": np.zeros((), int),
            "prior": np.zeros(plan.num_images),
            "middle": np.zeros(plan.num_images),
            "decoder": np.zeros(plan.num_images),
            "x_0_error": np.zeros(plan.num_images),
            "eps_error": np.zeros(plan.num_images),
            "flow": np.zeros(num_flow),
            # per timestep, over all images that were evaluated there
            "count": np.zeros(num_timesteps, int),
            "bits": np.zeros(num_timesteps),
            "bits_squared": np.zeros(num_timesteps),
            "mse_x_0": np.zeros(num_timesteps),
            "mse_eps": np.zeros(num_timesteps),
        }

    def set(self, name: str, images: slice, bits: np.ndarray) -> None:
        """Store one number of each image, in bits/dim: L_T ("prior"), or the flow's ("flow").

        Raises:
            NonFiniteLossError: a number is not finite.
        """
        wrong = np.flatnonzero(~np.isfinite(bits))
        if wrong.size:
            image, value = images.start + wrong[0], bits[wrong[0]]
            raise NonFiniteLossError(f"image {image}: {NAMES[name]} is {value} bits")
        self.arrays[name][images] = bits

    def add(self, images: slice, positions: np.ndarray, terms: Terms, size: np.ndarray) -> None:
        """Add terms [stratum, image] at rows ``positions``; strata of size 0 only fill up a call.

        Raises:
            NonFiniteLossError: a number is not finite.
        """
        real = size > 0
        positions, size = positions[real], size[real]
        terms = Terms(*(np.asarray(leaf, np.float64)[real] for leaf in terms))
        for name, values in terms._asdict().items():
            wrong = np.argwhere(~np.isfinite(values))
            if wrong.size:
                stratum, index = wrong[0]
                where = f"image {images.start + index} at t = {positions[stratum, index] + 1}"
                raise NonFiniteLossError(f"{where}: {NAMES[name]} is {values[stratum, index]}")
        weighted = terms.bits * size[:, None]
        is_decoder = positions == 0
        self.arrays["decoder"][images] += np.sum(weighted * is_decoder, axis=0)
        self.arrays["middle"][images] += np.sum(weighted * ~is_decoder, axis=0)
        share = size / len(self.arrays["count"])  # a mean over all timesteps
        self.arrays["x_0_error"][images] += share @ terms.mse_x_0
        self.arrays["eps_error"][images] += share @ terms.mse_eps
        np.add.at(self.arrays["count"], positions, 1)
        np.add.at(self.arrays["bits_squared"], positions, terms.bits**2)
        for name, values in terms._asdict().items():
            np.add.at(self.arrays[name], positions, values)

    def save(self, path: pathlib.Path, signature: str) -> None:
        """Write the sums into a file; ``signature`` is that of the evaluation."""
        arrays: dict[str, Any] = {"signature": signature, **self.arrays}
        with files.replace(path) as file:
            np.savez(file, **arrays)

    def restore(self, path: pathlib.Path, signature: str) -> None:
        """Load the sums from a file of the same evaluation; log it if the file is another's."""
        if not path.exists():
            return
        try:
            with np.load(path, allow_pickle=False) as arrays:
                saved = dict(arrays)
            before = str(saved.pop("signature"))
            if not all(np.isfinite(array).all() for array in saved.values()):
                raise ValueError("a number is not finite")
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            LOG.warning("%s is damaged (%r): evaluating anew", path, error)
            return
        if before != signature:
            LOG.info("%s is of another evaluation: evaluating anew", path)
            return
        self.arrays = saved
        LOG.info("going on after %d images", self.arrays["done"])


def summarise(sums: Sums, plan: EvaluationPlan, levels: int | None) -> dict[str, Any]:
    """The report of an evaluation: bits/dim with their standard error over the images, and MSEs."""
    arrays = sums.arrays
    terms = {name: arrays[name] for name in ("prior", "middle", "decoder")}
    bound = terms["prior"] + terms["middle"] + terms["decoder"]
    total, error = _mean(bound)
    report: dict[str, Any] = {
        "bits_per_dim": total,
        "standard_error": error,
        "terms": {
            name: dict(zip(("bits_per_dim", "standard_error"), _mean(values)))
            for name, values in {
                "L_T": terms["prior"],
                "L_1 to L_{T-1}": terms["middle"],
                "L_0": terms["decoder"],
            }.items()
        },
        "clip_x_0": plan.clip_x_0,
        "precision": plan.precision,
        "levels": levels,
        "num_examples": plan.num_examples,
        "num_timesteps": len(arrays["count"]),
        "num_timesteps_per_example": plan.num_timesteps,
        "mse_x_0": float(np.mean(arrays["x_0_error"])),
        "mse_eps": float(np.mean(arrays["eps_error"])),
    }
    if plan.flow is not None:
        flow = dict(zip(("bits_per_dim", "standard_error"), _mean(arrays["flow"])))
        same = spread_evenly(plan.flow.num_examples, plan.num_images)
        flow["bound_of_the_same_images"], _ = _mean(bound[same])
        report["probability_flow"] = flow | plan.flow._asdict()
    return report


def describe_evaluation(report: dict[str, Any]) -> str:
    """The lines about an evaluation that a run prints, in bits/dim."""
    named = {"bits/dim": report, **report["terms"]}
    if "probability_flow" in report:
        named["flow"] = report["probability_flow"]
    lines = [
        f"{name:14}  {numbers['bits_per_dim']:.4f}"
        + ("" if numbers["standard_error"] is None else f" +- {numbers['standard_error']:.4f}")
        for name, numbers in named.items()
    ]
    drawn, whole = report["num_timesteps_per_example"], report["num_timesteps"]
    if drawn < whole:
        lines.append(
            f"{drawn} of {whole} timesteps for each image: the terms are skewed, so 1.96 standard "
            "errors cover less than 95 % if the images are few (docs/guide.md, Score)"
        )
    return "\n".join(lines)


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """A mean and its standard error; None for the error of a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def bound_curve(sums: Sums, schedule: Schedule) -> BoundCurve:
    """The mean term of the bound at each evaluated timestep, with its standard error."""
    count = sums.arrays["count"]
    seen = count > 0
    count = count[seen]
    bits = sums.arrays["bits"][seen] / count
    variance = np.maximum(sums.arrays["bits_squared"][seen] / count - bits**2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(count > 1, np.sqrt(variance / (count - 1)), np.nan)  # not for one value
    return BoundCurve(
        timestep=np.flatnonzero(seen) + 1,
        log_snr=np.asarray(schedule.log_snr)[seen],
        bits=bits,
        error=error,
    )


def write_terms(sums: Sums, schedule: Schedule, path: pathlib.Path) -> None:
    """Write a CSV file with a row for each timestep that was evaluated."""
    timestep, log_snr, bits, error = bound_curve(sums, schedule)
    count = sums.arrays["count"][timestep - 1]
    errors = (sums.arrays[name][timestep - 1] / count for name in ("mse_x_0", "mse_eps"))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["t", "log_snr", "images", "bits_per_dim", "standard_error", "mse_x_0", "mse_eps"]
        )
        known = ["" if np.isnan(value) else value for value in error]
        writer.writerows(zip(timestep, log_snr, count, bits, known, *errors))

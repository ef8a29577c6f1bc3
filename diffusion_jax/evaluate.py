"""The variational bound and the probability flow over a test split, on every device, resumable.

Image i has the same noise at timestep t whatever the batches and devices, so an evaluation that
was killed goes on with the batch it had begun and ends with the same numbers.
"""

import csv
import functools
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree
from tqdm import tqdm

from diffusion_jax import checkpoint, data, devices, generate, likelihood, losses, plots, process
from diffusion_jax.config import ConfigError, require
from diffusion_jax.journal import NonFiniteLossError
from diffusion_jax.losses import Objective
from diffusion_jax.models import Model
from diffusion_jax.process import Example
from diffusion_jax.schedules import Schedule, clip_posterior_variance

LOG = logging.getLogger("diffusion_jax")

TIMESTEPS_PER_CALL = 8  # of an accelerator
MAX_IN_FLIGHT = 16  # calls of a device that nobody has read yet


class FlowPlan(NamedTuple):
    """How the probability flow's likelihood is computed, and of how many images."""

    num_examples: int
    num_steps: int
    solver: str
    divergence: str


class EvaluationPlan(NamedTuple):
    """Which images and timesteps, and how many at once."""

    num_examples: int | None  # spread evenly over the split; None: all
    num_timesteps: int  # of T, one drawn in each of as many strata
    batch_size: int  # images of all devices together
    timesteps_per_call: int | None  # of each image at once; None: what is fastest
    clip_x_0: bool
    flow: FlowPlan | None


def fit(plan: EvaluationPlan, split: data.Split | None) -> EvaluationPlan:
    """The plan with the number of images settled.

    Raises:
        ConfigError: there is no test split, or it has fewer images than are asked for.
    """
    if split is None:
        raise ConfigError("config.dataset.name: a set without a test split cannot be evaluated")
    size = len(split.images)
    asked = {"num_examples": plan.num_examples}
    if plan.flow is not None:
        asked["flow_examples"] = plan.flow.num_examples
    most = {"num_examples": size, "flow_examples": plan.num_examples or size}
    for name, value in asked.items():
        allowed = f"at most {most[name]}, of a test split of {size}"
        require(value is None or value <= most[name], f"config.evaluate.{name}", value, allowed)
    return plan._replace(num_examples=plan.num_examples or size)


def spread(count: int, size: int) -> Int[np.ndarray, " count"]:
    """``count`` of the numbers 0..size-1, evenly: archives may be sorted, or easier at first."""
    return np.arange(count) * size // count


class Terms(NamedTuple):
    """Means over the dimensions of one example at one timestep."""

    bits: Float[Array, "..."]  # L_{t-1}, or L_0 at t = 1
    mse_x_0: Float[Array, "..."]
    mse_eps: Float[Array, "..."]


class Strata(NamedTuple):
    """Consecutive rows of a schedule, of which an image is evaluated at one, drawn uniformly."""

    number: Int[np.ndarray, " strata"]
    first: Int[np.ndarray, " strata"]
    size: Int[np.ndarray, " strata"]


def stratify(num_timesteps: int, budget: int) -> Strata:
    """``budget`` strata over the rows 0..T-1: t = 1 alone, whose L_0 is unlike the others."""
    ends = np.round(np.linspace(1, num_timesteps, budget)).astype(int)
    first = np.concatenate([[0], ends[:-1]]) if budget > 1 else np.zeros(1, int)
    return Strata(np.arange(budget), first, np.concatenate([first[1:], [num_timesteps]]) - first)


def example_terms(
    objective: Objective,
    clip_x_0: bool,
    row: Schedule,
    x_0: Example,
    eps: Example,
    output: Example,
) -> Terms:
    """The term of the bound of one example at one timestep, and the errors of its prediction."""
    x_t = process.q_sample(row, x_0, eps)
    prediction = losses.decode_output(objective, row, x_t, output)
    if clip_x_0:
        prediction = process.clip_x_0(row, x_t, prediction)
    term = likelihood.variational_term(
        row, x_0, prediction.x_0, prediction.log_variance, objective.levels
    )
    return Terms(
        likelihood.bits(jnp.mean(term)),
        jnp.mean(jnp.square(x_0 - prediction.x_0)),
        jnp.mean(jnp.square(eps - prediction.eps)),
    )


def bound_terms(
    model: Model,
    objective: Objective,
    clip_x_0: bool,
    params: PyTree,
    schedule: Schedule,
    key: Key[Array, ""],
    x_0: Float[Array, "batch ..."],
    label: Int[Array, " batch"] | None,
    indices: Int[Array, " batch"],
    strata: Strata,
) -> tuple[Int[Array, "strata batch"], Terms]:
    """The rows drawn for each image, one per stratum, and the terms there.

    The network runs on the batch between two vmapped functions, all of it vmapped over strata.
    """
    row_key, noise_key = jax.random.split(key)
    schedule = clip_posterior_variance(schedule)

    def of_stratum(
        number: Int[Array, ""], first: Int[Array, ""], size: Int[Array, ""]
    ) -> tuple[Int[Array, " batch"], Terms]:
        def draw(index: Int[Array, ""]) -> tuple[Int[Array, ""], Float[Array, "..."]]:
            u = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(row_key, index), number))
            position = first + jnp.minimum((u * size).astype(jnp.int32), jnp.maximum(size - 1, 0))
            of_row = jax.random.fold_in(jax.random.fold_in(noise_key, index), position)
            return position, jax.random.normal(of_row, x_0.shape[1:])

        positions, eps = jax.vmap(draw)(indices)
        rows = schedule[positions]
        x_t = jax.vmap(process.q_sample)(rows, x_0, eps)
        output = model.apply(params, x_t, rows.timestep, label, None)
        terms = jax.vmap(functools.partial(example_terms, objective, clip_x_0))
        return positions, terms(rows, x_0, eps, output)

    return jax.vmap(of_stratum)(*strata)


class Sums:
    """What an evaluation has so far; kept in a file, so that the next start goes on from there."""

    def __init__(self, plan: EvaluationPlan, num_timesteps: int) -> None:
        num_flow = plan.flow.num_examples if plan.flow else 0
        self.arrays = {
            "done": np.zeros((), int),  # images of the bound
            "flow_done": np.zeros((), int),
            "prior": np.zeros(plan.num_examples),
            "middle": np.zeros(plan.num_examples),
            "decoder": np.zeros(plan.num_examples),
            "x_0_error": np.zeros(plan.num_examples),
            "eps_error": np.zeros(plan.num_examples),
            "flow": np.zeros(num_flow),
            # per timestep, over all images that were evaluated there
            "count": np.zeros(num_timesteps, int),
            "bits": np.zeros(num_timesteps),
            "bits_squared": np.zeros(num_timesteps),
            "mse_x_0": np.zeros(num_timesteps),
            "mse_eps": np.zeros(num_timesteps),
        }

    def add(self, images: slice, positions: np.ndarray, terms: Terms, size: np.ndarray) -> None:
        """Add terms [stratum, image]; a stratum of size 0 is only there to fill up a call."""
        real = size > 0
        positions, size = positions[real], size[real]
        terms = Terms(*(np.asarray(leaf, np.float64)[real] for leaf in terms))
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
        """Write the file, whole or not at all."""
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, signature=signature, **self.arrays)
        os.replace(temporary, path)

    def restore(self, path: pathlib.Path, signature: str) -> None:
        """Go on from a file that belongs to the same evaluation; say so if it does not."""
        if not path.exists():
            return
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
            before = str(found.pop("signature"))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            LOG.warning("%s is damaged (%r): evaluating anew", path, error)
            return
        if before != signature:
            LOG.info("%s is of another evaluation: evaluating anew", path)
            return
        self.arrays = found
        LOG.info("going on after %d images", self.arrays["done"])


class Evaluator:
    """The evaluation of a model with any parameters and schedule, compiled once for each T."""

    def __init__(
        self, model: Model, objective: Objective, plan: EvaluationPlan, used: list[jax.Device]
    ) -> None:
        self._model = model
        self._objective = objective
        self._plan = plan
        self._devices = [d for d in used if d.process_index == jax.process_index()]
        axes = (None, None, None, 0, None)
        self._bound = jax.pmap(
            self._bound_of_batch, "device", in_axes=axes, out_axes=1, devices=self._devices
        )
        self._flow = jax.pmap(
            self._flow_of_batch, "device", in_axes=axes[:4], devices=self._devices
        )

    def evaluate(
        self,
        schedule: Schedule,
        seed: int,
        params: PyTree,
        step: int,
        split: data.Split,
        about: dict[str, Any],
        folder: pathlib.Path,
    ) -> dict[str, Any]:
        """Evaluate, and write evaluation.json, evaluation.csv and evaluation.png into ``folder``.

        Returns what evaluation.json has; it begins with what ``about`` says of the model.
        """
        plan = self._plan
        sums = Sums(plan, len(schedule))
        progress = folder / "evaluation.npz"
        signature = json.dumps([plan, seed, step, _digest(params), _digest(schedule)])
        sums.restore(progress, signature)

        # no noise of training or sampling
        bound_key, flow_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3))
        shared = devices.replicate((params, schedule, bound_key), self._devices)
        for _ in self._add_bound(sums, shared, split):
            sums.save(progress, signature)
        if plan.flow is not None:
            shared = devices.replicate((params, schedule, flow_key), self._devices)
            for _ in self._add_flow(sums, shared, split):
                sums.save(progress, signature)

        report = about | {"seed": seed, "step": step}
        report |= summarise(sums, plan, self._objective.levels)
        write_csv(sums, schedule, folder / "evaluation.csv")
        plots.bound_terms(*_curve(sums, schedule), folder / "evaluation.png")
        temporary = folder / "evaluation.json.tmp"
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        os.replace(temporary, folder / "evaluation.json")
        return report

    def _bound_of_batch(
        self, params: PyTree, schedule: Schedule, key: Key[Array, ""], batch: dict, strata: Strata
    ) -> tuple[Array, Terms]:
        x_0 = data.to_x_0(batch["image"], self._objective.levels)
        inputs = x_0, batch["label"], batch["index"], strata
        clip = self._plan.clip_x_0
        return bound_terms(self._model, self._objective, clip, params, schedule, key, *inputs)

    def _add_bound(self, sums: Sums, shared: tuple, split: data.Split) -> Iterator[None]:
        """Add the bound of a batch of images, and stop after it for what is there to be saved."""
        plan, levels, schedule = self._plan, self._objective.levels, shared[1]
        # on a CPU the layers of one batch fill a core's caches already
        fastest = 1 if self._devices[0].platform == "cpu" else TIMESTEPS_PER_CALL
        at_once = min(plan.timesteps_per_call or fastest, plan.num_timesteps)
        calls = list(_calls(stratify(len(schedule), plan.num_timesteps), at_once))
        last_row = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), schedule)
        chosen, start = spread(plan.num_examples, len(split.images)), int(sums.arrays["done"])
        with _bar("bound", plan.num_examples, start) as bar:
            for images, batch in _batches(
                split, chosen, plan.batch_size, start, len(self._devices)
            ):
                count = images.stop - images.start
                image = batch["image"].reshape(-1, *batch["image"].shape[2:])[:count]
                x_0 = data.to_x_0(image, levels)
                prior = jax.vmap(likelihood.prior_term, (None, 0))(last_row, x_0)
                prior = likelihood.bits(prior.reshape(len(x_0), -1).mean(axis=1))
                sums.arrays["prior"][images] = prior
                under_way = []
                for strata in calls:
                    under_way.append((strata, self._bound(*shared, batch, strata)))
                    if len(under_way) > MAX_IN_FLIGHT:
                        _read(sums, images, *under_way.pop(0))
                    bar.update(len(x_0) / len(calls))
                for one in under_way:
                    _read(sums, images, *one)
                sums.arrays["done"] = np.asarray(images.stop)
                yield
                _tell("bound", bar, images.stop)

    def _flow_of_batch(
        self, params: PyTree, schedule: Schedule, key: Key[Array, ""], batch: dict
    ) -> Float[Array, " batch"]:
        flow, levels = self._plan.flow, self._objective.levels
        network = generate.Network(self._model, self._objective)
        predict = generate.create_predict(network, params, batch["label"])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        bin_keys, probe_keys = jax.vmap(jax.random.split)(keys).T
        x_0 = data.to_x_0(batch["image"], levels)
        if levels is not None:
            x_0 = jax.vmap(functools.partial(likelihood.dequantise, levels=levels))(bin_keys, x_0)
        log_likelihood = likelihood.flow_log_likelihood(
            predict, schedule, flow.num_steps, flow.solver, flow.divergence, probe_keys, x_0
        )
        return likelihood.bits_per_dim(log_likelihood, x_0[0].size, levels)

    def _add_flow(self, sums: Sums, shared: tuple, split: data.Split) -> Iterator[None]:
        """Add the flow's likelihood of a batch of images, as ``_add_bound`` does."""
        plan, flow = self._plan, self._plan.flow
        chosen = spread(plan.num_examples, len(split.images))
        chosen = chosen[spread(flow.num_examples, plan.num_examples)]  # the bound is known of them
        start = int(sums.arrays["flow_done"])
        with _bar("flow", flow.num_examples, start) as bar:
            for images, batch in _batches(
                split, chosen, plan.batch_size, start, len(self._devices)
            ):
                found = np.asarray(self._flow(*shared, batch)).reshape(-1)
                found = found[: images.stop - images.start]
                if not np.isfinite(found).all():
                    raise NonFiniteLossError(f"images {images}: the flow gives {found} bits/dim")
                sums.arrays["flow"][images] = found
                sums.arrays["flow_done"] = np.asarray(images.stop)
                yield
                bar.update(images.stop - images.start)
                _tell("flow", bar, images.stop)


def _read(sums: Sums, images: slice, strata: Strata, found: tuple[Array, Terms]) -> None:
    """Wait for a call and add what it found."""
    positions, terms = found
    count = images.stop - images.start  # the rest fills the batch up
    positions, *terms = (
        np.asarray(leaf).reshape(len(leaf), -1)[:, :count] for leaf in (positions, *terms)
    )
    finite = np.isfinite(terms[0]) | (strata.size == 0)[:, None]
    if not finite.all():
        stratum, image = np.argwhere(~finite)[0]
        raise NonFiniteLossError(
            f"image {images.start + image} at t = {positions[stratum, image] + 1}: "
            f"a term of {terms[0][stratum, image]} bits"
        )
    sums.add(images, positions, Terms(*terms), strata.size)


def _bar(name: str, total: int, start: int) -> tqdm:
    """A bar on a terminal; elsewhere ``_tell`` writes lines."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
    return tqdm(total=total, initial=start, desc=name, disable=None, bar_format=form)


def _tell(name: str, bar: tqdm, done: int) -> None:
    if bar.disable:
        LOG.info("%s of %d/%d images", name, done, bar.total)


def _batches(
    split: data.Split,
    chosen: Int[np.ndarray, " images"],
    batch_size: int,
    start: int,
    num_devices: int,
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Slices of the chosen images, and those spread over the devices, filled up with the first."""
    size = -(-batch_size // num_devices) * num_devices
    for first in range(start, len(chosen), batch_size):
        images = slice(first, min(first + batch_size, len(chosen)))
        indices = np.full(size, chosen[0])
        indices[: images.stop - first] = chosen[images]
        labels = None if split.labels is None else split.labels[indices]
        batch = {"image": split.images[indices], "label": labels, "index": indices}
        yield images, jax.tree.map(lambda a: a.reshape(num_devices, -1, *a.shape[1:]), batch)


def _calls(strata: Strata, size: int) -> Iterator[Strata]:
    """The strata of each call, the last one's filled up with empty ones."""
    for first in range(0, len(strata.number), size):
        part = Strata(*(np.zeros(size, int) for _ in strata))
        for target, source in zip(part, strata):
            target[: len(source[first : first + size])] = source[first : first + size]
        yield part


def summarise(sums: Sums, plan: EvaluationPlan, levels: int | None) -> dict[str, Any]:
    """The numbers of an evaluation, each with its standard error over the images."""
    arrays = sums.arrays
    terms = {name: arrays[name] for name in ("prior", "middle", "decoder")}
    total, error = _mean(sum(terms.values()))
    report = {
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
        "levels": levels,
        "num_examples": plan.num_examples,
        "num_timesteps": len(arrays["count"]),
        "num_timesteps_per_example": plan.num_timesteps,
        "mse_x_0": float(np.mean(arrays["x_0_error"])),
        "mse_eps": float(np.mean(arrays["eps_error"])),
    }
    if plan.flow is not None:
        flow = dict(zip(("bits_per_dim", "standard_error"), _mean(arrays["flow"])))
        same = spread(plan.flow.num_examples, plan.num_examples)
        bound, _ = _mean(sum(terms.values())[same])
        flow["bound_of_the_same_images"] = bound
        report["probability_flow"] = flow | plan.flow._asdict()
    return report


def describe(report: dict[str, Any]) -> str:
    """The lines that a run prints of an evaluation."""
    named = {"bits/dim": report, **report["terms"]}
    if "probability_flow" in report:
        named["flow"] = report["probability_flow"]
    return "\n".join(
        f"{name:14}  {numbers['bits_per_dim']:.4f}"
        + ("" if numbers["standard_error"] is None else f" +- {numbers['standard_error']:.4f}")
        for name, numbers in named.items()
    )


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """A mean and its standard error, which one value alone does not have."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _curve(sums: Sums, schedule: Schedule) -> tuple[np.ndarray, ...]:
    """Timestep, log SNR, and the mean bits and standard error of those that were evaluated."""
    count = sums.arrays["count"]
    seen = count > 0
    count = count[seen]
    bits = sums.arrays["bits"][seen] / count
    variance = np.maximum(sums.arrays["bits_squared"][seen] / count - bits**2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(count > 1, np.sqrt(variance / (count - 1)), np.nan)  # one tells nothing
    return np.flatnonzero(seen) + 1, np.asarray(schedule.log_snr)[seen], bits, error


def write_csv(sums: Sums, schedule: Schedule, path: pathlib.Path) -> None:
    """A line per timestep that was evaluated."""
    timestep, log_snr, bits, error = _curve(sums, schedule)
    count = sums.arrays["count"][timestep - 1]
    errors = (sums.arrays[name][timestep - 1] / count for name in ("mse_x_0", "mse_eps"))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["t", "log_snr", "images", "bits_per_dim", "standard_error", "mse_x_0", "mse_eps"]
        )
        error = ["" if np.isnan(value) else value for value in error]
        writer.writerows(zip(timestep, log_snr, count, bits, error, *errors))


def _digest(tree: PyTree) -> str:
    return checkpoint.digest(checkpoint.flatten(tree))

"""The variational bound and the probability flow over a test split, on every device, resumable.

Image i has the same noise at timestep t whatever the batches and devices are. A killed evaluation
is resumed at the batch that it was computing, and its numbers do not change.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree
from tqdm import tqdm

from diffusion_jax.data.dataset import Split
from diffusion_jax.data.pixels import to_x_0
from diffusion_jax.diffusion import likelihood
from diffusion_jax.diffusion.bound import Strata, Terms, bound_terms, stratify
from diffusion_jax.diffusion.examples import Examples
from diffusion_jax.diffusion.network import Network, create_predict
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.streams import Stream, stream_key
from diffusion_jax.drawing import plots
from diffusion_jax.evaluation.sums import Sums, bound_curve, spread_evenly, summarise, write_terms
from diffusion_jax.experiment.evaluation import EvaluationPlan
from diffusion_jax.runtime import checkpoint, devices, files
from diffusion_jax.runtime.compilation import named
from diffusion_jax.runtime.numerics import HIGHEST, in_precision

LOG = logging.getLogger("diffusion_jax")

TIMESTEPS_PER_CALL = 8  # on an accelerator
MAX_IN_FLIGHT = 16  # calls of a device whose results are not read yet


class Trained(NamedTuple):
    """A trained model: its averaged parameters, their step, its schedule and its seed."""

    params: PyTree
    step: int
    schedule: Schedule
    seed: int


class Evaluator:
    """Evaluates a network with any parameters and schedule; it is compiled once for each T."""

    def __init__(
        self, network: Network, plan: EvaluationPlan, used_devices: list[jax.Device]
    ) -> None:
        self._network = network
        self._levels = network.objective.levels
        self._plan = plan
        self._devices = [d for d in used_devices if d.process_index == jax.process_index()]
        axes, own = (None, None, None, 0, None), self._devices
        bound, flow = (
            in_precision(plan.precision, function)
            for function in (self._bound_of_batch, self._flow_of_batch)
        )
        bound = jax.pmap(bound, "device", in_axes=axes, out_axes=1, devices=own)
        flow = jax.pmap(flow, "device", in_axes=axes[:4], devices=own)
        self._bound = named("the bound", bound)
        self._flow = named("the probability flow", flow)

    def evaluate(
        self, trained: Trained, split: Split, *, about: dict[str, Any], folder: pathlib.Path
    ) -> dict[str, Any]:
        """Evaluate, and write evaluation.json, evaluation.csv and evaluation.png into ``folder``.

        Returns the contents of evaluation.json, which begin with ``about``, a description of the
        model.

        Raises:
            NonFiniteLossError: a term of the bound, a likelihood or an error is not finite.
        """
        plan = self._plan
        params, step, schedule, seed = trained
        sums = Sums(plan, len(schedule))
        progress = folder / "evaluation.npz"
        fields = plan._asdict()
        if plan.precision == HIGHEST and self._devices[0].platform == "cpu":
            del fields["precision"]  # so that an evaluation that is older than the field resumes
        digests = _digest(params), _digest(schedule)
        signature = json.dumps([list(fields.values()), seed, step, *digests])
        sums.restore(progress, signature)

        # independent of the noise of training and of sampling
        bound_key, flow_key = jax.random.split(stream_key(seed, Stream.EVALUATION))
        shared = devices.replicate((params, schedule, bound_key), self._devices)
        for _ in self._add_bound(sums, shared, split):
            sums.save(progress, signature)
        if plan.flow is not None:
            shared = devices.replicate((params, schedule, flow_key), self._devices)
            for _ in self._add_flow(sums, shared, split):
                sums.save(progress, signature)

        report = about | {"seed": seed, "step": step}
        report |= summarise(sums, plan, self._levels)
        write_terms(sums, schedule, folder / "evaluation.csv")
        plots.bound_terms(bound_curve(sums, schedule), folder / "evaluation.png")
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        files.replace_text(folder / "evaluation.json", text)
        return report

    def _bound_of_batch(
        self, params: PyTree, schedule: Schedule, key: Key[Array, ""], batch: dict, strata: Strata
    ) -> tuple[Array, Terms]:
        examples = Examples(
            x_0=to_x_0(batch["image"], self._levels),
            label=batch["label"],
            indices=batch["index"],
            batch_size=self._plan.batch_size,
        )
        return bound_terms(
            self._network,
            params,
            schedule,
            key,
            examples,
            strata=strata,
            clip_x_0=self._plan.clip_x_0,
        )

    def _add_bound(self, sums: Sums, shared: tuple[Any, ...], split: Split) -> Iterator[None]:
        """Generator: adds the bound of one batch, then yields so that the caller can save."""
        plan, levels, schedule = self._plan, self._levels, shared[1]
        # on a CPU the activations of one timestep's batch already fill the caches of a core
        fastest = 1 if self._devices[0].platform == "cpu" else TIMESTEPS_PER_CALL
        at_once = min(plan.timesteps_per_call or fastest, plan.num_timesteps)
        calls = list(_calls(stratify(len(schedule), plan.num_timesteps), at_once))
        last_row = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), schedule)
        chosen = spread_evenly(plan.num_images, len(split.images))
        start = int(sums.arrays["done"])
        with _bar("bound", plan.num_images, start) as bar:
            for images, batch in _batches(
                split, chosen, plan.batch_size, start, len(self._devices)
            ):
                count = images.stop - images.start
                image = batch["image"].reshape(-1, *batch["image"].shape[2:])[:count]
                x_0 = to_x_0(image, levels)
                prior = jax.vmap(likelihood.prior_term, (None, 0))(last_row, x_0)
                prior = likelihood.bits(prior.reshape(len(x_0), -1).mean(axis=1))
                sums.set("prior", images, np.asarray(prior))
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
        flow, levels = self._plan.flow, self._levels
        assert flow is not None  # evaluate calls it only if there is a flow
        predict = create_predict(self._network, params, batch["label"])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        bin_keys, probe_keys = jax.vmap(jax.random.split)(keys).T
        x_0 = to_x_0(batch["image"], levels)
        if levels is not None:
            x_0 = jax.vmap(functools.partial(likelihood.dequantise, levels=levels))(bin_keys, x_0)
        log_likelihood = likelihood.flow_log_likelihood(
            predict,
            schedule,
            probe_keys,
            x_0,
            num_steps=flow.num_steps,
            solver=flow.solver,
            divergence=flow.divergence,
        )
        return likelihood.bits_per_dim(log_likelihood, x_0[0].size, levels)

    def _add_flow(self, sums: Sums, shared: tuple[Any, ...], split: Split) -> Iterator[None]:
        """Generator: adds the flow's likelihood of one batch, then yields, as ``_add_bound``."""
        plan, flow = self._plan, self._plan.flow
        assert flow is not None  # evaluate calls it only if there is a flow
        chosen = spread_evenly(plan.num_images, len(split.images))
        chosen = chosen[
            spread_evenly(flow.num_examples, plan.num_images)
        ]  # images whose bound is computed too
        start = int(sums.arrays["flow_done"])
        with _bar("flow", flow.num_examples, start) as bar:
            for images, batch in _batches(
                split, chosen, plan.batch_size, start, len(self._devices)
            ):
                bits = np.asarray(self._flow(*shared, batch)).reshape(-1)
                sums.set("flow", images, bits[: images.stop - images.start])
                sums.arrays["flow_done"] = np.asarray(images.stop)
                yield
                bar.update(images.stop - images.start)
                _tell("flow", bar, images.stop)


def _read(sums: Sums, images: slice, strata: Strata, output: tuple[Array, Terms]) -> None:
    """Wait for the output of a call and add it to the sums."""
    positions, terms = output
    count = images.stop - images.start  # the other images only fill up the batch

    def of_images(leaf: Array | np.ndarray) -> np.ndarray:
        return np.asarray(leaf).reshape(len(leaf), -1)[:, :count]

    sums.add(images, of_images(positions), Terms(*map(of_images, terms)), strata.size)


def _bar(name: str, total: int, start: int) -> tqdm:
    """A progress bar on a terminal; elsewhere ``_tell`` logs lines."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
    return tqdm(total=total, initial=start, desc=name, disable=None, bar_format=form)


def _tell(name: str, bar: tqdm, done: int) -> None:
    if bar.disable:
        LOG.info("%s of %d/%d images", name, done, bar.total)


def _batches(
    split: Split,
    chosen: Int[np.ndarray, " images"],
    batch_size: int,
    start: int,
    num_devices: int,
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Slices of the chosen images, and their batches [device, image, ...], which are filled up."""
    size = -(-batch_size // num_devices) * num_devices
    for first in range(start, len(chosen), batch_size):
        images = slice(first, min(first + batch_size, len(chosen)))
        indices = np.full(size, chosen[0])
        indices[: images.stop - first] = chosen[images]
        labels = None if split.labels is None else split.labels[indices]
        batch = {"image": split.images[indices], "label": labels, "index": indices}
        yield images, jax.tree.map(lambda a: a.reshape(num_devices, -1, *a.shape[1:]), batch)


def _calls(strata: Strata, size: int) -> Iterator[Strata]:
    """The strata of each call; the last call is filled up with empty strata."""
    for first in range(0, len(strata.number), size):
        part = Strata(*(np.zeros(size, int) for _ in strata))
        for target, source in zip(part, strata):
            target[: len(source[first : first + size])] = source[first : first + size]
        yield part


def _digest(tree: PyTree) -> str:
    return checkpoint.digest(checkpoint.flatten(tree))

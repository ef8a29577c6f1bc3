"""Every field there is, with the value that holds where no other config says otherwise.

A default that is a type is no value: the field is unset (null in a run's config.json), and the
comment says what stands in for it. In a Path ~ is the home directory. Any field can be set on the
command line:

    python main.py --config=configs/mnist.py --workdir=DIR --config.schedule.s=0.02
"""

import enum
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class Effect(enum.Enum):
    """What another value of a field changes."""

    DATA = enum.auto()  # the data set
    MODEL = enum.auto()  # what a checkpoint means
    BATCHES = enum.auto()  # what a training is shown: the same for all arms of an ablation
    TRAINING = enum.auto()  # how it learns from that
    LENGTH = enum.auto()  # how long: a run may go on for longer
    SCORES = enum.auto()  # the samples and evaluations of a trained model
    NOTHING = enum.auto()  # where it runs, how often something is written, how much at once


DATA, MODEL, BATCHES, TRAINING, LENGTH, SCORES, NOTHING = Effect


class Field(NamedTuple):
    """The default of a field, or its type if it is unset; and what another value changes."""

    default: Any
    effect: Effect


FIELDS: dict[str, Field] = {
    "seed": Field(0, BATCHES),  # of the initial weights, batches, noise and timesteps; samples too
    "num_devices": Field(int, NOTHING),  # of each process; unset: all (on a CPU, every core)
    # join the processes of a pod, or those of JAX_COORDINATOR_ADDRESS
    "distributed": Field(False, NOTHING),
    "compilation_cache": Field(Path, NOTHING),  # folder; unset: ~/.cache/diffusion_jax; "off"
    # sources.DATASETS, or any TFDS image set that is prepared
    "dataset.name": Field("mnist", DATA),
    "dataset.archives": Field(Path, NOTHING),  # folder of the original archives (offline use)
    "dataset.data_dir": Field(Path, NOTHING),  # prepared sets; unset: ~/tensorflow_datasets
    "dataset.flip": Field(False, BATCHES),  # mirror half of the training images left to right
    "schedule.name": Field("cosine", MODEL),  # schedules.SCHEDULES, or learned (VDM's)
    "schedule.num_timesteps": Field(1000, MODEL),  # T
    # The arguments of the schedule functions; unset: the function's own default.
    "schedule.beta_start": Field(float, MODEL),  # beta_1 of all that give it, linear to warmup50
    "schedule.beta_end": Field(float, MODEL),  # their beta_T, and every beta of constant
    "schedule.rescale": Field(bool, MODEL),  # linear: multiply both by 1000/T
    "schedule.s": Field(float, MODEL),  # cosine: the offset
    "schedule.max_beta": Field(float, MODEL),  # cosine, sigmoid: betas are clipped from above
    "schedule.min_beta": Field(float, MODEL),  # and from below
    "schedule.start": Field(float, MODEL),  # sigmoid: where the logistic function begins
    "schedule.end": Field(float, MODEL),  # and ends
    "schedule.tau": Field(float, MODEL),  # its temperature
    "schedule.betas": Field(Path, MODEL),  # from_betas: a .npy file of num_timesteps betas
    "schedule.log_snr_start": Field(float, MODEL),  # where learned's first end begins: 13.3
    "schedule.log_snr_end": Field(float, MODEL),  # and its last: -5
    # rescale so that alpha_bar_T = 0 (Lin et al.)
    "schedule.zero_terminal_snr": Field(False, MODEL),
    "schedule.base_resolution": Field(int, MODEL),  # shift log SNR by 2 log(base/height)
    "model.name": Field("unet", MODEL),  # models.MODELS
    "model.width": Field(128, MODEL),  # channels of the first level
    "model.channel_multipliers": Field((1, 2, 2), MODEL),  # channels of each level, in widths
    "model.num_blocks": Field(2, MODEL),  # residual blocks per level
    "model.attention_resolutions": Field((14,), MODEL),  # image heights that get self-attention
    "model.head_channels": Field(64, MODEL),  # channels of one attention head
    "model.dropout": Field(0.1, MODEL),  # rate inside residual blocks, in training
    "model.class_conditional": Field(False, MODEL),  # give the network the label
    # of the computation: float32, bfloat16 (parameters: float32)
    "model.dtype": Field("float32", MODEL),
    "loss.prediction": Field("eps", MODEL),  # eps, x_0, v, mu, score: what the network puts out
    # vlb: the variational bound; simple, snr, truncated_snr, min_snr, p2, sigmoid, edm: an error
    # weighted by timestep, to which a learned variance adds vlb_scale times the bound (L_hybrid).
    "loss.weighting": Field("simple", TRAINING),  # weightings.WEIGHTINGS
    # The arguments of the weightings; unset: the function's own default.
    "loss.bias": Field(float, TRAINING),  # sigmoid: of the log SNR
    "loss.gamma": Field(float, TRAINING),  # min_snr: the largest SNR; p2: its exponent
    "loss.k": Field(float, TRAINING),  # p2: added to the SNR
    "loss.sigma_data": Field(float, TRAINING),  # edm: standard deviation of the data
    # of p(x_{t-1}|x_t): beta, posterior, learned_range, learned
    "loss.variance": Field("posterior", MODEL),
    "loss.vlb_scale": Field(float, TRAINING),  # unset: 0.001 where the variance is learned
    "loss.timesteps": Field("low_discrepancy", TRAINING),  # uniform, low_discrepancy, importance
    # share of labels withheld, for classifier-free guidance
    "loss.label_dropout": Field(0.0, TRAINING),
    "optimizer.name": Field("adamw", TRAINING),  # adamw, adam
    "optimizer.learning_rate": Field(2e-4, TRAINING),  # after the warm-up
    "optimizer.warmup_steps": Field(500, TRAINING),  # linear, from 0
    "optimizer.decay": Field("constant", TRAINING),  # constant, cosine (to 0 at train.num_steps)
    "optimizer.b1": Field(0.9, TRAINING),  # decay of Adam's first moment
    "optimizer.b2": Field(0.999, TRAINING),  # decay of Adam's second moment
    "optimizer.weight_decay": Field(0.0, TRAINING),  # adamw's, decoupled
    "optimizer.clip_norm": Field(1.0, TRAINING),  # largest global norm of the gradient
    "ema.decay": Field(0.9999, TRAINING),  # of the averaged weights that sample
    "ema.warmup": Field(True, TRAINING),  # decay min(decay, (1 + step) / (10 + step))
    "train.num_steps": Field(100_000, LENGTH),  # of the optimizer
    "train.batch_size": Field(128, BATCHES),  # of all devices together
    "train.steps_per_call": Field(int, NOTHING),  # unset: 1 on a CPU, up to 10 elsewhere
    "train.log_every_steps": Field(100, NOTHING),  # a record in metrics.jsonl and TensorBoard
    "train.sample_every_steps": Field(5_000, NOTHING),  # a DDIM-50 grid; 0: none
    "checkpoint.every_steps": Field(5_000, NOTHING),  # and after the last one
    "checkpoint.keep_last": Field(2, NOTHING),  # newest checkpoints to keep
    "checkpoint.keep_best": Field(1, NOTHING),  # by the mean loss since the checkpoint before
    "sampling.sampler": Field("ancestral", SCORES),  # samplers.SAMPLERS
    "sampling.num_steps": Field(int, SCORES),  # unset: all timesteps
    # trailing, leading, linspace, quadratic: some of the timesteps; log_snr, karras: between them
    "sampling.spacing": Field("trailing", SCORES),
    "sampling.rho": Field(float, SCORES),  # karras's; unset: 7
    "sampling.sigma_min": Field(float, SCORES),  # ends of log_snr and karras, in units of
    "sampling.sigma_max": Field(float, SCORES),  # schedule.sigma; unset: the schedule's own
    # The arguments of the samplers; unset: the sampler's own default.
    # ancestral, predictor_corrector: beta, posterior, learned_range, learned; unset: loss.variance
    "sampling.variance": Field(str, SCORES),
    "sampling.eta": Field(float, SCORES),  # ddim, euler_ancestral, dpmpp_2m_sde: share of noise
    "sampling.churn": Field(float, SCORES),  # edm: S_churn
    "sampling.churn_min": Field(float, SCORES),  # edm: S_tmin, the least sigma that is churned
    "sampling.churn_max": Field(float, SCORES),  # edm: S_tmax, the largest
    "sampling.noise": Field(float, SCORES),  # edm: S_noise, scale of the fresh noise
    "sampling.snr": Field(float, SCORES),  # predictor_corrector: size of a Langevin step
    "sampling.num_corrections": Field(int, SCORES),  # predictor_corrector: Langevin steps each
    "sampling.clip_x_0": Field(True, SCORES),  # the predicted x_0 to [-1, 1] (images only)
    "sampling.dynamic_threshold": Field(float, SCORES),  # its percentile instead, 0.995 say
    "sampling.label": Field(int, SCORES),  # of all images; unset: image i, i mod num_classes
    "sampling.num_images": Field(64, SCORES),  # image i depends on the seed and i alone
    "sampling.batch_size": Field(64, NOTHING),  # of all devices together
    "sampling.num_frames": Field(int, NOTHING),  # of animations; unset: 40 if so many; 0: none
    # evaluator.npz too, in the layout of guided-diffusion's evaluator: arr_0, and labels in arr_1
    "sampling.evaluator_npz": Field(False, NOTHING),
    # steps.png: the same noise by chains so long, (10, 50)
    "sampling.compared_steps": Field((), NOTHING),
    # guidance: of sampling
    "guidance.weight": Field(float, SCORES),  # unset: none; 1 too; 0: only the weaker network
    "guidance.interval_start": Field(float, SCORES),  # least timestep that is guided; unset: 1
    "guidance.interval_end": Field(float, SCORES),  # the largest; unset: T
    "guidance.rescale": Field(float, SCORES),  # phi of Lin et al., in [0, 1]; unset: 0
    # The weaker network, both unset: the same without the label (classifier-free guidance).
    "guidance.weak_workdir": Field(Path, SCORES),  # another run's; unset: this one's
    "guidance.weak_step": Field(int, SCORES),  # its checkpoint; unset: the newest
    # editing: of given images, in place of sampling from noise alone
    "editing.task": Field(str, SCORES),  # image_to_image, inpaint, interpolate, variations
    "editing.images": Field(Path, SCORES),  # a PNG, or an .npz with `images` [n, h, w, c]
    "editing.mask": Field(Path, SCORES),  # inpaint's PNG: white is made anew, black is kept
    "editing.timestep": Field(int, SCORES),  # where the chain begins; unset: T
    "editing.strength": Field(float, SCORES),  # of variations, in [0, 1]; unset: 0.3
    "editing.num_resamples": Field(int, SCORES),  # of inpaint (RePaint); unset: 10
    "editing.jump_length": Field(int, SCORES),  # of inpaint, in steps; unset: 10
    "evaluate.num_examples": Field(int, SCORES),  # of the test split; unset: all
    "evaluate.num_timesteps": Field(int, SCORES),  # unset: all; fewer: one of each stratum
    "evaluate.batch_size": Field(64, NOTHING),  # images of all devices together
    "evaluate.timesteps_per_call": Field(int, NOTHING),  # unset: 1 on a CPU, 8 elsewhere
    # the predicted x_0 to [-1, 1] in the bound (images only)
    "evaluate.clip_x_0": Field(True, SCORES),
    # images whose probability flow is integrated; 0: none
    "evaluate.flow_examples": Field(0, SCORES),
    "evaluate.flow_steps": Field(100, SCORES),  # of the solver, evenly spaced in log SNR
    "evaluate.flow_solver": Field("rk4", SCORES),  # rk4, heun
    # hutchinson, exact (a jvp per dimension)
    "evaluate.flow_divergence": Field("hutchinson", SCORES),
    # ablate: the same model trained and scored with other values of fields
    # Values of fields of schedule, loss, model, optimizer, ema: "schedule.s=0,0.008,0.02", products
    # "schedule.s=0,0.008; loss.prediction=eps,v", one after another "... | schedule.name=linear".
    "ablate.grid": Field(str, NOTHING),  # unset: nothing to ablate
    "ablate.seeds": Field((0, 1, 2), NOTHING),  # each arm is trained with each of them
    "ablate.reference": Field(str, NOTHING),  # the arm others are compared to; unset: the first
    # device: an arm on each device; sequence: one after another, each over all devices; vmap:
    # several on each device; auto: what is fastest on the platform (``slots.choose_parallel``)
    "ablate.parallel": Field("auto", NOTHING),
    "ablate.arms_per_device": Field(int, NOTHING),  # of vmap; unset: all, 8 at most
    "ablate.shard": Field(str, NOTHING),  # "i/n": only this share of the jobs, without a report
    # of the sample quality: frechet, kernel (for few samples)
    "ablate.distance": Field("frechet", NOTHING),
}


def get_config() -> ConfigDict:
    """The config that every other one starts from."""
    config = ConfigDict()
    for name, (default, _) in FIELDS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        fields = config[section] if section else config
        is_unset = isinstance(default, type)
        fields[leaf] = placeholder(str if default is Path else default) if is_unset else default
    return config


def effect_of(name: str) -> Effect:
    """What another value of a field, as "schedule.s", changes.

    A field that is not here, of another model or another version, changes a model if others of its
    section do.
    """
    if name in FIELDS:
        return FIELDS[name].effect
    section = name.partition(".")[0]
    effects = {field.effect for other, field in FIELDS.items() if other.startswith(f"{section}.")}
    return MODEL if MODEL in effects else NOTHING

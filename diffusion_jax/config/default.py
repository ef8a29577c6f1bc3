"""Every field of a config, with its default value and its effect.

A default that is a type (int, float, str, Path) means that the field is unset: it is null in a
run's config.json, and its comment says what happens then. In a Path, ~ is the home directory. The
command line can set every field:

    python main.py --config=configs/mnist.py --workdir=DIR --config.schedule.s=0.02
"""

import enum
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


class Effect(enum.Enum):
    """What changes if a field has another value."""

    DATA = enum.auto()  # the data set
    MODEL = enum.auto()  # the parameters of a checkpoint, or what they mean
    BATCHES = enum.auto()  # the batches and the noise: the same for all arms of an ablation
    TRAINING = enum.auto()  # the loss, the optimizer or the average of the weights
    LENGTH = enum.auto()  # the number of steps: a resumed run may change it
    SCORES = enum.auto()  # the samples and evaluations of a trained model
    NOTHING = enum.auto()  # no result: only speed, memory, logs and files


DATA, MODEL, BATCHES, TRAINING, LENGTH, SCORES, NOTHING = Effect


class Field(NamedTuple):
    """The default of a field, or its type if the field is unset, and the effect of the field.

    Finished jobs are recognised by their fields. A field that is newer than version 0.1.0 does not
    count while it has its default, so that older finished jobs stay finished.
    """

    default: Any
    effect: Effect
    is_newer: bool = False

    def is_default(self, value: Any) -> bool:
        """Whether a value of the field, None if it is unset, is the default."""
        return value == (None if isinstance(self.default, type) else self.default)


FIELDS: dict[str, Field] = {
    "seed": Field(0, BATCHES),  # of initial weights, batches, noise, timesteps and samples
    # devices per process; unset: all accelerators, or as many CPU cores as fit (devices.start)
    "num_devices": Field(int, NOTHING),
    # join the other processes: those of a pod, or those at JAX_COORDINATOR_ADDRESS
    "distributed": Field(False, NOTHING),
    # folder of compiled programs; unset: ~/.cache/diffusion_jax; "off": none
    "compilation_cache": Field(Path, NOTHING),
    # equal bits in every run on a GPU too, with slower steps; a CPU always computes equal bits
    "deterministic": Field(False, NOTHING),
    # of float32 products in training: default (TF32 on GPUs, bfloat16 on TPUs), high (between the
    # two others on TPUs), highest (float32); a CPU always computes float32
    "precision": Field("default", TRAINING, is_newer=True),
    # a name in sources.DATASETS, or of an image set that TFDS has prepared
    "dataset.name": Field("mnist", DATA),
    "dataset.archives": Field(Path, NOTHING),  # folder of the original archives; unset: download
    # folder of prepared sets; unset: $TFDS_DATA_DIR or ~/tensorflow_datasets
    "dataset.data_dir": Field(Path, NOTHING),
    "dataset.flip": Field(False, BATCHES),  # mirror each training image with probability 1/2
    "schedule.name": Field("cosine", MODEL),  # in schedules.SCHEDULES, or "learned" (VDM)
    "schedule.num_timesteps": Field(1000, MODEL),  # T
    # Arguments of the schedule functions; unset: the default of the function.
    # first and last beta of linear, scaled_linear, quadratic, sigmoid_beta, warmup10 and warmup50;
    # beta_end is also every beta of constant
    "schedule.beta_start": Field(float, MODEL),
    "schedule.beta_end": Field(float, MODEL),
    "schedule.rescale": Field(bool, MODEL),  # linear: multiply these betas by 1000/T
    "schedule.s": Field(float, MODEL),  # cosine: the offset
    "schedule.max_beta": Field(float, MODEL),  # cosine, sigmoid: the largest beta (clipped)
    "schedule.min_beta": Field(float, MODEL),  # cosine, sigmoid: the smallest beta (clipped)
    "schedule.start": Field(float, MODEL),  # sigmoid: first argument of the logistic function
    "schedule.end": Field(float, MODEL),  # sigmoid: last argument of the logistic function
    "schedule.tau": Field(float, MODEL),  # sigmoid: temperature
    "schedule.betas": Field(Path, MODEL),  # from_betas: a .npy file of num_timesteps betas
    "schedule.log_snr_start": Field(float, MODEL),  # learned: initial log SNR at t = 1; unset: 13.3
    "schedule.log_snr_end": Field(float, MODEL),  # learned: initial log SNR at t = T; unset: -5
    # rescale so that alpha_bar_T = 0 (Lin et al. 2023)
    "schedule.zero_terminal_snr": Field(False, MODEL),
    "schedule.base_resolution": Field(int, MODEL),  # shift log SNR by 2 log(base/height)
    "model.name": Field("unet", MODEL),  # in models.MODELS
    "model.width": Field(128, MODEL),  # channels of the first convolution (mlp: units)
    # channels of each level, as multiples of width
    "model.channel_multipliers": Field((1, 2, 2), MODEL),
    "model.num_blocks": Field(2, MODEL),  # residual blocks per level
    "model.attention_resolutions": Field((14,), MODEL),  # image heights that get self-attention
    "model.head_channels": Field(64, MODEL),  # channels of one attention head
    "model.dropout": Field(0.1, MODEL),  # dropout rate in residual blocks, in training only
    "model.class_conditional": Field(False, MODEL),  # the label is an input of the network
    # dtype of the computation: float32, bfloat16 (the parameters are float32)
    "model.dtype": Field("float32", MODEL),
    "loss.prediction": Field("eps", MODEL),  # output of the network: eps, x_0, v, mu, score
    # vlb: the variational bound; simple, snr, truncated_snr, min_snr, p2, sigmoid, edm: a weighted
    # squared error. With a learned variance, vlb_scale times the bound is added to it (L_hybrid).
    "loss.weighting": Field("simple", TRAINING),  # in weightings.WEIGHTINGS
    # Arguments of the weightings; unset: the default of the function.
    "loss.bias": Field(float, TRAINING),  # sigmoid: shift of the log SNR
    "loss.gamma": Field(float, TRAINING),  # min_snr: the largest SNR; p2: the exponent
    "loss.k": Field(float, TRAINING),  # p2: the constant added to the SNR
    "loss.sigma_data": Field(float, TRAINING),  # edm: standard deviation of the data
    # variance of p(x_{t-1}|x_t): beta, posterior, learned_range, learned
    "loss.variance": Field("posterior", MODEL),
    "loss.vlb_scale": Field(float, TRAINING),  # only with a learned variance; unset: 0.001
    "loss.timesteps": Field("low_discrepancy", TRAINING),  # uniform, low_discrepancy, importance
    # probability of dropping a label in training, for classifier-free guidance
    "loss.label_dropout": Field(0.0, TRAINING),
    "optimizer.name": Field("adamw", TRAINING),  # adamw, adam
    "optimizer.learning_rate": Field(2e-4, TRAINING),  # after the warm-up
    "optimizer.warmup_steps": Field(500, TRAINING),  # linear warm-up from 0
    "optimizer.decay": Field("constant", TRAINING),  # constant, cosine (to 0 at train.num_steps)
    "optimizer.b1": Field(0.9, TRAINING),  # decay of Adam's first moment
    "optimizer.b2": Field(0.999, TRAINING),  # decay of Adam's second moment
    "optimizer.weight_decay": Field(0.0, TRAINING),  # decoupled weight decay of adamw
    "optimizer.clip_norm": Field(1.0, TRAINING),  # the gradient is clipped to this global norm
    "ema.decay": Field(0.9999, TRAINING),  # of the averaged weights, which sampling uses
    "ema.warmup": Field(True, TRAINING),  # the decay is min(decay, (1 + step) / (10 + step))
    "train.num_steps": Field(100_000, LENGTH),  # optimizer steps
    "train.batch_size": Field(128, BATCHES),  # of all devices together
    # steps in one compiled call; unset: 1 on a CPU, up to 10 on accelerators
    "train.steps_per_call": Field(int, NOTHING),
    "train.log_every_steps": Field(100, NOTHING),  # a record in metrics.jsonl and TensorBoard
    "train.sample_every_steps": Field(5_000, NOTHING),  # a sample grid by 50 steps of DDIM; 0: none
    "checkpoint.every_steps": Field(5_000, NOTHING),  # the last step is saved in any case
    "checkpoint.keep_last": Field(2, NOTHING),  # how many of the newest checkpoints stay
    # how many of the best stay, by the mean loss between a checkpoint and the previous one
    "checkpoint.keep_best": Field(1, NOTHING),
    "sampling.sampler": Field("ancestral", SCORES),  # in samplers.SAMPLERS
    "sampling.num_steps": Field(int, SCORES),  # unset: all timesteps
    # trailing, leading, linspace, quadratic: a subset of the timesteps 1..T;
    # log_snr, karras: noise levels between the timesteps
    "sampling.spacing": Field("trailing", SCORES),
    "sampling.rho": Field(float, SCORES),  # karras; unset: 7
    # log_snr, karras: the range is [sigma_min, sigma_max], in units of Schedule.sigma; unset: the
    # range of the schedule
    "sampling.sigma_min": Field(float, SCORES),
    "sampling.sigma_max": Field(float, SCORES),
    # Arguments of the samplers; unset: the default of the sampler.
    # ancestral, predictor_corrector: beta, posterior, learned_range, learned; unset: loss.variance
    "sampling.variance": Field(str, SCORES),
    # ddim, euler_ancestral, dpmpp_2m_sde: scale of the fresh noise; 0: deterministic
    "sampling.eta": Field(float, SCORES),
    "sampling.churn": Field(float, SCORES),  # edm: S_churn
    "sampling.churn_min": Field(float, SCORES),  # edm: S_tmin, the smallest sigma with churn
    "sampling.churn_max": Field(float, SCORES),  # edm: S_tmax, the largest sigma with churn
    "sampling.noise": Field(float, SCORES),  # edm: S_noise, scale of the fresh noise
    "sampling.snr": Field(float, SCORES),  # predictor_corrector: size of a Langevin step
    # predictor_corrector: Langevin steps per predictor step
    "sampling.num_corrections": Field(int, SCORES),
    "sampling.clip_x_0": Field(True, SCORES),  # clip the predicted x_0 to [-1, 1] (images only)
    # dynamic thresholding (Imagen) at this quantile of |x_0|, such as 0.995; unset: see clip_x_0
    "sampling.dynamic_threshold": Field(float, SCORES),
    "sampling.label": Field(int, SCORES),  # of all images; unset: i mod num_classes for image i
    "sampling.num_images": Field(64, SCORES),  # image i depends only on the seed and on i
    "sampling.batch_size": Field(64, NOTHING),  # of all devices together
    "sampling.precision": Field(str, SCORES, is_newer=True),  # unset: config.precision
    # frames of the animations; unset: at most 40 (editing: none); 0: no animation
    "sampling.num_frames": Field(int, NOTHING),
    # also write evaluator.npz for guided-diffusion's evaluator: images in arr_0, labels in arr_1
    "sampling.evaluator_npz": Field(False, NOTHING),
    # steps.png compares chains of these numbers of steps, such as (10, 50), from the same noise
    "sampling.compared_steps": Field((), NOTHING),
    # guidance: eps = eps_weak + weight (eps - eps_weak), in sampling
    "guidance.weight": Field(float, SCORES),  # unset or 1: no guidance; 0: only the weak network
    "guidance.interval_start": Field(float, SCORES),  # the smallest guided timestep; unset: 1
    "guidance.interval_end": Field(float, SCORES),  # the largest guided timestep; unset: T
    "guidance.rescale": Field(float, SCORES),  # phi of Lin et al. 2023, in [0, 1]; unset: 0
    # The weak network. Both unset: this network without the label (classifier-free guidance).
    "guidance.weak_workdir": Field(Path, SCORES),  # the folder of its run; unset: this run
    "guidance.weak_step": Field(int, SCORES),  # its checkpoint; unset: the newest
    # editing: sampling from given images instead of pure noise
    "editing.task": Field(str, SCORES),  # image_to_image, inpaint, interpolate, variations
    "editing.images": Field(Path, SCORES),  # a picture, or an .npz with `images` [n, h, w, c]
    "editing.mask": Field(Path, SCORES),  # inpaint: a picture; white is inpainted, black stays
    "editing.timestep": Field(int, SCORES),  # where the chain starts; unset: T
    "editing.strength": Field(float, SCORES),  # variations: in [0, 1]; unset: 0.3
    "editing.num_resamples": Field(int, SCORES),  # inpaint: resamplings (RePaint); unset: 10
    "editing.jump_length": Field(int, SCORES),  # inpaint: steps of a jump (RePaint); unset: 10
    "evaluate.num_examples": Field(int, SCORES),  # of the test split; unset: all
    # unset: all; otherwise one timestep is drawn in each of this many strata
    "evaluate.num_timesteps": Field(int, SCORES),
    "evaluate.batch_size": Field(64, NOTHING),  # images of all devices together
    "evaluate.precision": Field(str, SCORES, is_newer=True),  # unset: highest
    # timesteps of an image in one compiled call; unset: 1 on a CPU, 8 on accelerators
    "evaluate.timesteps_per_call": Field(int, NOTHING),
    # clip the predicted x_0 to [-1, 1] in the bound (images only)
    "evaluate.clip_x_0": Field(True, SCORES),
    # images whose likelihood is computed by the probability flow ODE; 0: none
    "evaluate.flow_examples": Field(0, SCORES),
    "evaluate.flow_steps": Field(100, SCORES),  # of the ODE solver, evenly spaced in log SNR
    "evaluate.flow_solver": Field("rk4", SCORES),  # rk4, heun
    # hutchinson (an estimate), exact (one jvp per dimension)
    "evaluate.flow_divergence": Field("hutchinson", SCORES),
    # ablate: train and score one model for each combination of values (an arm) and each seed
    # A list "schedule.s=0,0.008,0.02", a product "schedule.s=0,0.008; loss.prediction=eps,v", or
    # several of these "... | schedule.name=linear"; of schedule, loss, model, optimizer, ema and
    # precision.
    "ablate.grid": Field(str, NOTHING),  # unset: nothing to ablate
    "ablate.seeds": Field((0, 1, 2), NOTHING),  # each arm is trained with each of these seeds
    "ablate.reference": Field(str, NOTHING),  # all arms are compared with this one; unset: first
    # device: one arm on each device; vmap: several arms on each device; sequence: one arm after
    # another, each on all devices; auto: the fastest for the platform (``slots.choose_parallel``)
    "ablate.parallel": Field("auto", NOTHING),
    "ablate.arms_per_device": Field(int, NOTHING),  # vmap; unset: as many as needed, at most 8
    "ablate.shard": Field(str, NOTHING),  # "i/n": run only the i-th of n shares, without a report
    # between the features of samples and of test images: frechet, kernel (for few samples)
    "ablate.distance": Field("frechet", NOTHING),
}


def get_config() -> ConfigDict:
    """The default config, with every field of FIELDS; other configs start from it."""
    config = ConfigDict()
    for name, (default, *_) in FIELDS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        fields = config[section] if section else config
        is_unset = isinstance(default, type)
        fields[leaf] = placeholder(str if default is Path else default) if is_unset else default
    return config


def effect_of(name: str) -> Effect:
    """The effect of a field by its name, such as "schedule.s".

    A field that FIELDS does not have (of another model or version) has the effect MODEL if any
    field of its section has it, and NOTHING otherwise.
    """
    if name in FIELDS:
        return FIELDS[name].effect
    section = name.partition(".")[0]
    effects = {field.effect for other, field in FIELDS.items() if other.startswith(f"{section}.")}
    return MODEL if MODEL in effects else NOTHING

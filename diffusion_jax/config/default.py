"""Every field there is, with the value that holds where no other config says otherwise.

A field that is ``placeholder(type)`` is unset (null in a run's config.json): the comment says
what stands in for it. Any field can be set on the command line:

    python main.py --config=configs/mnist.py --workdir=DIR --config.schedule.s=0.02
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The config that every other one starts from."""
    config = ConfigDict()

    config.seed = 0  # of the initial weights, batches, noise and timesteps; samples too
    config.num_devices = placeholder(int)  # of each process; unset: all (on a CPU, every core)
    config.distributed = False  # join the processes of a pod, or those of JAX_COORDINATOR_ADDRESS
    config.compilation_cache = placeholder(str)  # folder; unset: ~/.cache/diffusion_jax; "off"

    config.dataset = ConfigDict()
    config.dataset.name = "mnist"  # sources.DATASETS, or any TFDS image set that is prepared
    config.dataset.archives = placeholder(str)  # folder of the original archives (offline use)
    config.dataset.data_dir = placeholder(str)  # prepared sets; unset: ~/tensorflow_datasets
    config.dataset.flip = False  # mirror half of the training images left to right

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # schedules.SCHEDULES, or learned (VDM's)
    config.schedule.num_timesteps = 1000  # T
    # The arguments of the schedule functions; unset: the function's own default.
    config.schedule.beta_start = placeholder(
        float
    )  # beta_1 of all that give it, linear to warmup50
    config.schedule.beta_end = placeholder(float)  # their beta_T, and every beta of constant
    config.schedule.rescale = placeholder(bool)  # linear: multiply both by 1000/T
    config.schedule.s = placeholder(float)  # cosine: the offset
    config.schedule.max_beta = placeholder(float)  # cosine, sigmoid: betas are clipped from above
    config.schedule.min_beta = placeholder(float)  # and from below
    config.schedule.start = placeholder(float)  # sigmoid: where the logistic function begins
    config.schedule.end = placeholder(float)  # and ends
    config.schedule.tau = placeholder(float)  # its temperature
    config.schedule.betas = placeholder(str)  # from_betas: a .npy file of the T betas
    config.schedule.log_snr_start = placeholder(float)  # where learned's first end begins: 13.3
    config.schedule.log_snr_end = placeholder(float)  # and its last: -5
    config.schedule.zero_terminal_snr = False  # rescale so that alpha_bar_T = 0 (Lin et al.)
    config.schedule.base_resolution = placeholder(int)  # shift log SNR by 2 log(base/height)

    config.model = ConfigDict()
    config.model.name = "unet"  # models.MODELS
    config.model.width = 128  # channels of the first level
    config.model.channel_multipliers = (1, 2, 2)  # channels of each level, in widths
    config.model.num_blocks = 2  # residual blocks per level
    config.model.attention_resolutions = (14,)  # image heights that get self-attention
    config.model.head_channels = 64  # channels of one attention head
    config.model.dropout = 0.1  # rate inside residual blocks, in training
    config.model.class_conditional = False  # give the network the label
    config.model.dtype = "float32"  # of the computation: float32, bfloat16 (parameters: float32)

    config.loss = ConfigDict()
    config.loss.prediction = "eps"  # eps, x_0, v, mu, score: what the network puts out
    # vlb: the variational bound; simple, snr, truncated_snr, min_snr, p2, sigmoid, edm: an error
    # weighted by timestep, to which a learned variance adds vlb_scale times the bound (L_hybrid).
    config.loss.weighting = "simple"  # weightings.WEIGHTINGS
    # The arguments of the weightings; unset: the function's own default.
    config.loss.bias = placeholder(float)  # sigmoid: of the log SNR
    config.loss.gamma = placeholder(float)  # min_snr: the largest SNR; p2: its exponent
    config.loss.k = placeholder(float)  # p2: added to the SNR
    config.loss.sigma_data = placeholder(float)  # edm: standard deviation of the data
    config.loss.variance = "posterior"  # of p(x_{t-1}|x_t): beta, posterior, learned_range, learned
    config.loss.vlb_scale = placeholder(float)  # unset: 0.001 where the variance is learned
    config.loss.timesteps = "low_discrepancy"  # uniform, low_discrepancy, importance
    config.loss.label_dropout = 0.0  # share of labels withheld, for classifier-free guidance

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, adam
    config.optimizer.learning_rate = 2e-4  # after the warm-up
    config.optimizer.warmup_steps = 500  # linear, from 0
    config.optimizer.decay = "constant"  # constant, cosine (to 0 at train.num_steps)
    config.optimizer.b1 = 0.9  # decay of Adam's first moment
    config.optimizer.b2 = 0.999  # decay of Adam's second moment
    config.optimizer.weight_decay = 0.0  # adamw's, decoupled
    config.optimizer.clip_norm = 1.0  # largest global norm of the gradient

    config.ema = ConfigDict()
    config.ema.decay = 0.9999  # of the averaged weights that sample
    config.ema.warmup = True  # decay min(decay, (1 + step) / (10 + step))

    config.train = ConfigDict()
    config.train.num_steps = 100_000  # of the optimizer
    config.train.batch_size = 128  # of all devices together
    config.train.steps_per_call = placeholder(int)  # unset: 1 on a CPU, up to 10 elsewhere
    config.train.log_every_steps = 100  # a record in metrics.jsonl and TensorBoard
    config.train.sample_every_steps = 5_000  # a DDIM-50 grid; 0: none

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 5_000  # and after the last one
    config.checkpoint.keep_last = 2  # newest checkpoints to keep
    config.checkpoint.keep_best = 1  # by the mean loss since the checkpoint before

    config.sampling = ConfigDict()
    config.sampling.sampler = "ancestral"  # samplers.SAMPLERS
    config.sampling.num_steps = placeholder(int)  # unset: all timesteps
    # trailing, leading, linspace, quadratic: some of the timesteps; log_snr, karras: between them
    config.sampling.spacing = "trailing"
    config.sampling.rho = placeholder(float)  # karras's; unset: 7
    config.sampling.sigma_min = placeholder(float)  # ends of log_snr and karras, in units of
    config.sampling.sigma_max = placeholder(float)  # schedule.sigma; unset: the schedule's own
    # The arguments of the samplers; unset: the sampler's own default.
    # ancestral, predictor_corrector: beta, posterior, learned_range, learned; unset: loss.variance
    config.sampling.variance = placeholder(str)
    config.sampling.eta = placeholder(float)  # ddim, euler_ancestral, dpmpp_2m_sde: share of noise
    config.sampling.churn = placeholder(float)  # edm: S_churn
    config.sampling.churn_min = placeholder(float)  # edm: S_tmin, the least sigma that is churned
    config.sampling.churn_max = placeholder(float)  # edm: S_tmax, the largest
    config.sampling.noise = placeholder(float)  # edm: S_noise, scale of the fresh noise
    config.sampling.snr = placeholder(float)  # predictor_corrector: size of a Langevin step
    config.sampling.num_corrections = placeholder(int)  # predictor_corrector: Langevin steps each
    config.sampling.clip_x_0 = True  # the predicted x_0 to [-1, 1] (images only)
    config.sampling.dynamic_threshold = placeholder(float)  # its percentile instead, 0.995 say
    config.sampling.label = placeholder(int)  # of all images; unset: image i, i mod num_classes
    config.sampling.num_images = 64  # image i depends on the seed and i alone
    config.sampling.batch_size = 64  # of all devices together
    config.sampling.num_frames = placeholder(int)  # of animations; unset: 40 if so many; 0: none
    config.sampling.compared_steps = ()  # steps.png: the same noise by chains so long, (10, 50)

    config.guidance = ConfigDict()  # of sampling
    config.guidance.weight = placeholder(float)  # unset: none; 1 too; 0: only the weaker network
    config.guidance.interval_start = placeholder(float)  # least timestep that is guided; unset: 1
    config.guidance.interval_end = placeholder(float)  # the largest; unset: T
    config.guidance.rescale = placeholder(float)  # phi of Lin et al., in [0, 1]; unset: 0
    # The weaker network, both unset: the same without the label (classifier-free guidance).
    config.guidance.weak_workdir = placeholder(str)  # another run's; unset: this one's
    config.guidance.weak_step = placeholder(int)  # its checkpoint; unset: the newest

    config.editing = ConfigDict()  # of given images, in place of sampling from noise alone
    config.editing.task = placeholder(str)  # image_to_image, inpaint, interpolate, variations
    config.editing.images = placeholder(str)  # a PNG, or an .npz with `images` [n, h, w, c]
    config.editing.mask = placeholder(str)  # inpaint's PNG: white is made anew, black is kept
    config.editing.timestep = placeholder(int)  # where the chain begins; unset: T
    config.editing.strength = placeholder(float)  # of variations, in [0, 1]; unset: 0.3
    config.editing.num_resamples = placeholder(int)  # of inpaint (RePaint); unset: 10
    config.editing.jump_length = placeholder(int)  # of inpaint, in steps; unset: 10

    config.evaluate = ConfigDict()
    config.evaluate.num_examples = placeholder(int)  # of the test split; unset: all
    config.evaluate.num_timesteps = placeholder(int)  # unset: all; fewer: one of each stratum
    config.evaluate.batch_size = 64  # images of all devices together
    config.evaluate.timesteps_per_call = placeholder(int)  # unset: 1 on a CPU, 8 elsewhere
    config.evaluate.clip_x_0 = True  # the predicted x_0 to [-1, 1] in the bound (images only)
    config.evaluate.flow_examples = 0  # images whose probability flow is integrated; 0: none
    config.evaluate.flow_steps = 100  # of the solver, evenly spaced in log SNR
    config.evaluate.flow_solver = "rk4"  # rk4, heun
    config.evaluate.flow_divergence = "hutchinson"  # hutchinson, exact (a jvp per dimension)

    config.ablate = ConfigDict()  # the same model trained and scored with other values of fields
    # Values of fields of schedule, loss, model, optimizer, ema: "schedule.s=0,0.008,0.02", products
    # "schedule.s=0,0.008; loss.prediction=eps,v", one after another "... | schedule.name=linear".
    config.ablate.grid = placeholder(str)  # unset: nothing to ablate
    config.ablate.seeds = (0, 1, 2)  # each arm is trained with each of them
    config.ablate.reference = placeholder(str)  # the arm others are compared to; unset: the first
    # device: an arm on each device; sequence: one after another, each over all devices; vmap:
    # several on each device; auto: what is fastest on the platform (``slots.choose_parallel``)
    config.ablate.parallel = "auto"
    config.ablate.arms_per_device = placeholder(int)  # of vmap; unset: all, 8 at most
    config.ablate.shard = placeholder(str)  # "i/n": only this share of the jobs, without a report
    config.ablate.distance = "frechet"  # of the sample quality: frechet, kernel (for few samples)

    return config

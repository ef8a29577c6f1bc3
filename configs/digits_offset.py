"""Ablation of the cosine schedule's offset s on scikit-learn's digits: seven arms, three seeds.

The network is that of configs/digits.py, with a quarter of the training steps. Digits have 17 grey
levels, so a pixel bin is 1/8. That is sixteen times the bin of 256 levels, for which Nichol &
Dhariwal 2021 (section 3.2) chose s = 0.008.
Hardware and time: docs/RESULTS.md.

    python main.py --config=configs/digits_offset.py --workdir=runs/offset --mode=ablate
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.ablate.grid = "schedule.s=0,0.001,0.004,0.008,0.02,0.05,0.1"
    config.ablate.reference = "schedule.s=0.008"
    config.ablate.seeds = (0, 1, 2)
    config.ablate.distance = "kernel"  # of 300 samples and the 300 test digits
    config.train.num_steps = 400
    config.train.log_every_steps = 50
    config.train.sample_every_steps = 0
    config.optimizer.warmup_steps = 100
    config.ema.decay = 0.99
    config.checkpoint.every_steps = 200
    config.checkpoint.keep_last = 1
    config.checkpoint.keep_best = 0
    config.sampling.num_images = 300
    config.sampling.batch_size = 150
    config.sampling.num_steps = 50
    config.sampling.num_frames = 0
    config.evaluate.num_timesteps = 50
    config.evaluate.batch_size = 100
    return config

"""scikit-learn's 1,797 digits, 8x8 in 17 grey levels: a model in minutes on any machine.

Source: a small U-Net (701,345 parameters) with L_simple of DDPM (Ho et al. 2020) and the cosine
schedule of iDDPM (Nichol & Dhariwal 2021).
Hardware and time: two CPU cores, under 6 minutes, with 64 samples of 1,000 ancestral steps.
Expected: loss 0.13 at the end. The 1-nearest-neighbour two-sample accuracy of 300 samples against
300 held-out digits is 0.52 (0.5 is perfect; docs/RESULTS.md).

    python main.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from diffusion_jax.config import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = "digits"
    config.model.width = 32
    config.model.channel_multipliers = (1, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.head_channels = 32
    config.model.dropout = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.decay = "cosine"
    config.optimizer.warmup_steps = 200
    config.ema.decay = 0.995
    config.train.num_steps = 1_600
    config.train.batch_size = 128
    config.train.sample_every_steps = 800
    config.checkpoint.every_steps = 400
    return config

"""CIFAR-10 with the model and training of DDPM (Ho et al. 2020, section 4 and appendix B).

35.7 M parameters, linear schedule, 800,000 steps of 128, Adam at 2e-4, EMA 0.9999, dropout 0.1,
random flips. The paper reports an FID of 3.17. This config has not been trained here yet. It
needs several accelerators:

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10
"""

from ml_collections import ConfigDict

from diffusion_jax.config import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = "cifar10"
    config.dataset.flip = True
    config.schedule.name = "linear"
    config.model.width = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.attention_resolutions = (16,)
    config.model.head_channels = 256  # one head, as in the paper
    config.loss.timesteps = "uniform"
    config.loss.variance = "beta"
    config.optimizer.name = "adam"
    config.optimizer.warmup_steps = 5_000
    config.train.num_steps = 800_000
    config.train.sample_every_steps = 10_000
    config.checkpoint.every_steps = 10_000
    return config

r"""MNIST: the base of configs/mnist_offset.py, which ablates the offset of the cosine schedule.

Source: a smaller U-Net than that of DDPM (Ho et al. 2020) with the cosine schedule of iDDPM (Nichol
& Dhariwal 2021). The images have their original size, 28x28.

On one accelerator (the defaults below; not measured yet):

    python main.py --config=configs/mnist.py --workdir=runs/mnist

On two CPU cores: 13 minutes, loss 0.043, recognisable digits (docs/RESULTS.md):

    python main.py --config=configs/mnist.py --workdir=runs/mnist_cpu --config.model.width=16 \
        --config.model.channel_multipliers='(1,2,6)' --config.model.num_blocks=1 \
        --config.model.attention_resolutions='(7,)' --config.model.head_channels=32 \
        --config.model.dropout=0 --config.optimizer.learning_rate=2e-3 \
        --config.optimizer.warmup_steps=200 --config.ema.decay=0.995 --config.train.batch_size=64 \
        --config.train.num_steps=1350 --config.train.sample_every_steps=0 \
        --config.checkpoint.every_steps=500 --config.sampling.num_steps=250

The first start downloads MNIST. Without internet access, use --config.dataset.archives=DIR, where
DIR holds the four original files.
"""

from ml_collections import ConfigDict

from diffusion_jax.config import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = "mnist"
    config.model.width = 64
    config.model.channel_multipliers = (1, 2, 2)
    config.model.attention_resolutions = (14, 7)
    config.model.head_channels = 64
    config.optimizer.learning_rate = 5e-4
    config.optimizer.decay = "cosine"
    config.ema.decay = 0.999
    config.train.num_steps = 20_000
    config.train.batch_size = 128
    config.train.sample_every_steps = 2_000
    config.checkpoint.every_steps = 2_000
    return config

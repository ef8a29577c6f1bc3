r"""Ablation of the cosine schedule's offset s on MNIST: seven arms, three seeds.

A pixel bin is 1/127.5. The network is that of configs/mnist.py, with a tenth of the training steps.

On one accelerator (not measured yet):

    python main.py --config=configs/mnist_offset.py --workdir=runs/offset --mode=ablate

On two CPU cores, four offsets and a smaller network (time and results: docs/RESULTS.md):

    python main.py --config=configs/mnist_offset.py --workdir=runs/offset_cpu --mode=ablate \
        --config.model.width=16 --config.model.channel_multipliers='(1,2,6)' \
        --config.model.num_blocks=1 --config.model.attention_resolutions='(7,)' \
        --config.model.head_channels=32 --config.model.dropout=0 \
        --config.optimizer.learning_rate=2e-3 --config.optimizer.warmup_steps=100 \
        --config.ema.decay=0.99 --config.train.batch_size=64 --config.train.num_steps=300 \
        --config.ablate.grid=schedule.s=0,0.008,0.02,0.1 \
        --config.ablate.distance=kernel \
        --config.sampling.num_images=200 --config.evaluate.num_examples=100
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.ablate.grid = "schedule.s=0,0.001,0.004,0.008,0.02,0.05,0.1"
    config.ablate.reference = "schedule.s=0.008"
    config.ablate.seeds = (0, 1, 2)
    config.train.num_steps = 2_000
    config.train.sample_every_steps = 0
    config.checkpoint.every_steps = 1_000
    config.checkpoint.keep_last = 1
    config.checkpoint.keep_best = 0
    config.sampling.num_images = 2_000
    config.sampling.batch_size = 100
    config.sampling.num_steps = 50
    config.sampling.num_frames = 0
    config.evaluate.num_examples = 1_000
    config.evaluate.num_timesteps = 50
    config.evaluate.batch_size = 20
    return config

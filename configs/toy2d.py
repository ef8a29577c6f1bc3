"""An MLP on a Gaussian mixture in the plane: the fastest of the configs."""

from ml_collections import ConfigDict

from diffusion_jax.config import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.name = "toy2d"
    config.schedule.num_timesteps = 100
    config.model = ConfigDict(
        {"name": "mlp", "width": 128, "num_layers": 3, "class_conditional": False}
    )
    config.optimizer.learning_rate = 2e-3
    config.optimizer.decay = "cosine"
    config.optimizer.warmup_steps = 100
    config.ema.decay = 0.995
    config.train.num_steps = 3_000
    config.train.batch_size = 512
    config.train.sample_every_steps = 1_000
    config.checkpoint.every_steps = 1_000
    config.sampling.num_images = 2_000
    config.sampling.batch_size = 2_000
    return config

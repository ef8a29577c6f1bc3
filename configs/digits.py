"""scikit-learn's 1,797 digits."""

from ml_collections import ConfigDict

from configs import default


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

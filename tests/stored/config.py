"""The config of the run and of the ablation in this folder: a tiny network on the digits."""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.num_devices = 2
    config.schedule.num_timesteps = 10
    config.model.width = 4
    config.model.channel_multipliers = (1,)
    config.model.attention_resolutions = ()
    config.model.head_channels = 4
    config.optimizer.decay = "constant"
    config.optimizer.warmup_steps = 5
    config.train.num_steps = 40
    config.train.batch_size = 16
    config.train.log_every_steps = 5
    config.train.sample_every_steps = 0
    config.checkpoint.every_steps = 20
    config.checkpoint.keep_last = 1
    config.checkpoint.keep_best = 0
    config.sampling.num_images = 16
    config.sampling.batch_size = 16
    config.sampling.num_frames = 0
    config.evaluate.num_examples = 12
    config.evaluate.batch_size = 12
    config.evaluate.flow_examples = 4
    config.evaluate.flow_steps = 10
    config.ablate.grid = "schedule.s=0.008,0.02"
    config.ablate.seeds = (0, 1)
    config.ablate.distance = "kernel"
    config.ablate.parallel = "device"
    return config

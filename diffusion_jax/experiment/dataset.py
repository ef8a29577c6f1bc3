"""The data set of a config."""

from ml_collections import ConfigDict

from diffusion_jax.data.dataset import DatasetChoice, DatasetInfo
from diffusion_jax.data.load import describe_dataset


def create_dataset_choice(config: ConfigDict) -> DatasetChoice:
    """Which set a run uses, and where its files are."""
    fields = config.dataset
    return DatasetChoice(
        name=fields.name, archives=fields.archives, data_dir=fields.data_dir, flip=fields.flip
    )


def create_dataset_info(config: ConfigDict) -> DatasetInfo:
    """Name, shape, grey levels and number of classes of the set, which is not read yet.

    Raises:
        ConfigError: there is no such set, or a field does not fit it.
    """
    return describe_dataset(create_dataset_choice(config))

"""Loading of a run's data set, which is prepared first if necessary."""

from pathlib import Path

import numpy as np

from diffusion_jax.data.dataset import Dataset, DatasetChoice, DatasetInfo, Split
from diffusion_jax.data.prepared import (
    data_dir_of,
    describe_prepared,
    find_prepared,
    prepare,
    read_prepared,
)
from diffusion_jax.data.sources import DATASETS
from diffusion_jax.data.sources.source import VERSION
from diffusion_jax.errors import ConfigError, choose, require


def describe_dataset(choice: DatasetChoice) -> DatasetInfo:
    """The properties of the chosen data set; writes nothing.

    Raises:
        ConfigError: the set is unknown, or a field does not fit it.
    """
    exists = choice.archives is None or Path(choice.archives).is_dir()
    require(exists, "config.dataset.archives", choice.archives, "a folder that exists")
    source = DATASETS.get(choice.name)
    folder = None if source else find_prepared(choice)
    if folder is None:
        if source is None:
            noun = (
                "data set, and no TFDS image set of that name is prepared as array_record in "
                f"{data_dir_of(choice)} (config.dataset.data_dir)"
            )
            source = choose("config.dataset.name", choice.name, DATASETS, noun)
        info = DatasetInfo(
            name=choice.name,
            shape=source.shape,
            levels=source.levels,
            num_classes=source.num_classes,
        )
    else:
        info = describe_prepared(choice.name, folder)
    if choice.flip and info.levels is None:
        raise ConfigError(f"config.dataset.flip = True: {choice.name} has points, not images")
    return info


def load_dataset(choice: DatasetChoice) -> Dataset:
    """Load the chosen data set; a set that is not prepared yet is prepared first.

    Raises:
        ConfigError: as describe_dataset; or an archive is missing, damaged or cannot be downloaded;
            or the folder of prepared sets is not writable.
    """
    info = describe_dataset(choice)
    if info.levels is None:
        arrays = DATASETS[info.name].read(Path())
        return Dataset(*info, *(_split(*arrays[name]) for name in ("train", "test")))
    folder = find_prepared(choice)
    if folder is None:
        folder = data_dir_of(choice) / info.name / VERSION
        prepare(info.name, DATASETS[info.name], choice.archives, folder)
    return Dataset(*info, *read_prepared(info, folder))


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images, labels.astype(np.int32))

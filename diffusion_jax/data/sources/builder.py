"""The TFDS builder that writes a set as array_record files, without tensorflow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.sources.source import VERSION, Arrays, Images, Labels


# Not registered, because TFDS has its own builders with most of these names.
class ImageBuilder(  # type: ignore[call-arg]  # TFDS has no types, and takes this argument
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A builder for labelled images that are already in memory."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        name: str,
        data_dir: Path,
        num_classes: int,
        splits: Arrays,
    ) -> None:
        self.name = name
        self._num_classes = num_classes
        self._splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        images, _ = next(iter(self._splits.values()))
        features = {
            "image": tfds.features.Image(shape=images.shape[1:]),
            "label": tfds.features.ClassLabel(num_classes=self._num_classes),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keep the order of the archives: read_batches shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(*arrays) for split, arrays in self._splits.items()}

    def _generate_examples(self, images: Images, labels: Labels) -> Iterator:
        for index, (image, label) in enumerate(zip(images, labels)):
            # TFDS encodes arrays with tensorflow, but Pillow's images without it. Pillow's grey
            # images have no channel axis.
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            yield index, {"image": picture, "label": int(label)}

"""The latents x_T of the images that are edited; each image is inverted once."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float, Int

Inverse = Callable[[Float[np.ndarray, "devices batch ..."]], Float[Array, "devices batch ..."]]
NumbersOf = Callable[[Int[np.ndarray, "..."], int], Int[np.ndarray, "... latents"]]


class Latents:
    """The latents that the edit of each index needs; an image is inverted at its first use.

    ``numbers_of(indices, n)`` are the numbers of the images in ``x_0`` [n, ...] whose latents the
    edits of these indices need. Every call of ``invert`` has the same number of images on each
    device, so that it is compiled once.
    """

    def __init__(
        self,
        invert: Inverse,
        x_0: Float[np.ndarray, "images h w c"],
        *,
        numbers_of: NumbersOf,
        num_devices: int,
    ) -> None:
        self._invert = invert
        self._x_0 = x_0
        self._numbers_of = numbers_of
        self._num_devices = num_devices
        self._per_device = 0  # images on each device, from the first call on
        self._latents: dict[int, Float[np.ndarray, "..."]] = {}

    def of(self, indices: Int[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch latents h w c"]:
        """The latents for the edits of these indices."""
        numbers = self._numbers_of(indices, len(self._x_0))
        missing = [n for n in np.unique(numbers).tolist() if n not in self._latents]
        self._per_device = self._per_device or -(-len(missing) // self._num_devices)
        at_once = self._num_devices * self._per_device
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            padded = np.resize(batch, (self._num_devices, self._per_device))
            self._latents |= zip(batch, np.concatenate(self._invert(self._x_0[padded])))
        flat = np.stack([self._latents[n] for n in numbers.ravel().tolist()])
        return flat.reshape(*numbers.shape, *flat.shape[1:])

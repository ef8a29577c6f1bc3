"""The batches of a training run, read through Grain.

Batch k is a pure function of (seed, k), so that the step number restores the place in the data.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from diffusion_jax.data.dataset import Records, Split


def read_batches(
    split: Split,
    batch_size: int,
    seed: int,
    *,
    start_step: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, Any]]:
    """The batches of steps start_step, start_step + 1, ... without end.

    Every epoch is another permutation of the split; the last batch of one goes on into the next.
    A process gets its contiguous share of the global batch of batch_size examples. flip mirrors
    each image left to right with probability 1/2. "label" is None where the split has none.

    Raises:
        ValueError: a batch_size that cannot be shared evenly, or points to be flipped.
    """
    if batch_size < 1 or batch_size % process_count:
        allowed = f"a positive multiple of the {process_count} processes"
        raise ValueError(f"batch_size = {batch_size}: must be {allowed}")
    if flip and split.images.ndim != 4:
        raise ValueError("flip = True: the examples are points, not images")
    import grain

    share = batch_size // process_count
    offset = process_index * share
    # Grain shuffles epoch e with seed + e: of seeds that follow each other, the one would see
    # next what the other has seen before. A hash keeps them apart.
    shuffle_seed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])

    def gather(step: int, indices: Integer[np.ndarray, " n"]) -> dict[str, Any]:
        images = split.images[indices]
        if flip:
            coins = np.random.default_rng((seed % 2**64, step)).random(batch_size) < 0.5
            mirrored = coins[offset : offset + share, None, None, None]
            images = np.where(mirrored, images[:, :, ::-1], images)
        labels = None if split.labels is None else split.labels[indices].astype(np.int32)
        return {"image": images, "label": labels}

    indices = grain.MapDataset.range(len(split)).shuffle(shuffle_seed).repeat()
    shares = indices.batch(share, batch_fn=np.asarray)[process_index::process_count]
    # Elements are whole batches here: the defaults would keep 500 of them, on 16 threads.
    num_threads = (os.cpu_count() or 1) if isinstance(split.images, Records) else 1
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(shares.map_with_index(gather)[start_step:].to_iter_dataset(options))

"""The batches of a training run, read through Grain.

Batch k is a pure function of (seed, k), so the step number is all that a resumed run needs.
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
    """Yield the batches of steps start_step, start_step + 1, ... without end.

    Each epoch is a new permutation of the split. A batch may span two epochs. Each process gets a
    contiguous share of the global batch of batch_size examples. flip mirrors each image left to
    right with probability 1/2. "label" is None if the split has no labels.

    Raises:
        ValueError: the processes cannot share batch_size evenly, or flip is set for points.
    """
    if batch_size < 1 or batch_size % process_count:
        allowed = f"a positive multiple of the {process_count} processes"
        raise ValueError(f"batch_size = {batch_size}: must be {allowed}")
    if flip and split.images.ndim != 4:
        raise ValueError("flip = True: the examples are points, not images")
    import grain

    share = batch_size // process_count
    offset = process_index * share
    # Grain shuffles epoch e with seed + e, so epoch 1 of seed 0 would equal epoch 0 of seed 1.
    # Hashing the seed avoids that.
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
    # Grain's default buffers 500 elements on 16 threads, and an element here is a whole batch.
    num_threads = (os.cpu_count() or 1) if isinstance(split.images, Records) else 1
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(shares.map_with_index(gather)[start_step:].to_iter_dataset(options))

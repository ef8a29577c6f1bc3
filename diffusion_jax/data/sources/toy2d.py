"""A Gaussian mixture in the plane, whose denoiser is known in closed form."""

from pathlib import Path

import numpy as np

from diffusion_jax.data.sources.source import Arrays, Source

NUM_COMPONENTS = 8
NUM_EXAMPLES = {"train": 20_000, "test": 2_000}
_ANGLES = 2 * np.pi * np.arange(NUM_COMPONENTS) / NUM_COMPONENTS
_RADIAL = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=-1)
_TANGENTIAL = np.stack([-np.sin(_ANGLES), np.cos(_ANGLES)], axis=-1)

# The means lie on the unit circle. The components are narrow along the radius and wider along the
# circle, and every second one has twice the weight, so that samples show a wrong weight, axis or
# scale.
WEIGHTS = np.resize([1.0, 2.0], NUM_COMPONENTS) / (1.5 * NUM_COMPONENTS)  # [component]
MEANS = _RADIAL  # [component, 2]
COVARIANCES = (  # [component, 2, 2]
    0.05**2 * _RADIAL[:, :, None] * _RADIAL[:, None, :]
    + 0.15**2 * _TANGENTIAL[:, :, None] * _TANGENTIAL[:, None, :]
)


def read(folder: Path) -> Arrays:
    """Draw points from the mixture, the same at every call; the label is the component."""
    splits = {}
    factors = np.linalg.cholesky(COVARIANCES)
    for seed, (split, size) in enumerate(NUM_EXAMPLES.items()):
        random = np.random.default_rng(seed)
        labels = random.choice(NUM_COMPONENTS, size, p=WEIGHTS)
        noise = random.standard_normal((size, 2))
        points = MEANS[labels] + np.einsum("nij,nj->ni", factors[labels], noise)
        splits[split] = (points.astype(np.float32), labels)
    return splits


TOY2D = Source(shape=(2,), levels=None, num_classes=NUM_COMPONENTS, urls=(), read=read)

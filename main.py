"""Train, sample and score denoising diffusion models: see diffusion_jax/__main__.py."""

import sys

from diffusion_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measurements: run one as a module, for example ``python -m benchmarks.two_sample``."""

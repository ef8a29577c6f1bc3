"""Fashion-MNIST: the configuration of configs/mnist.py on Zalando's clothes.

Not trained to the end yet: no number is expected of it. Commands as in configs/mnist.py.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.dataset.name = "fashion_mnist"
    return config

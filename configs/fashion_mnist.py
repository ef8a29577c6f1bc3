"""Fashion-MNIST: the config of configs/mnist.py on Zalando's images of clothes.

It has not been trained to the end yet, so there is no expected loss. The commands are those of
configs/mnist.py.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.dataset.name = "fashion_mnist"
    return config

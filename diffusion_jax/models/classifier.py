"""A small convolutional classifier of images, which also returns its last features."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from diffusion_jax.models.layers.linear import conv, linear
from diffusion_jax.models.pure import pure

CHANNELS = (16, 32, 64)
NUM_FEATURES = 64


class ClassifierNetwork(NamedTuple):
    """A classifier as two pure functions of its parameters, a nested dict of float32 arrays.

    init(key) -> params
    apply(params, x_0) -> (features, float32 [B, NUM_FEATURES]; logits, float32 [B, classes])
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def create_classifier(shape: tuple[int, ...], num_classes: int) -> ClassifierNetwork:
    """Create the classifier of images (height, width, channels); no parameters are allocated."""

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return ConvNet(shape, num_classes, rngs=rngs)

    return ClassifierNetwork(*pure(create))


class ConvNet(nnx.Module):
    """Three convolutions of stride 2, a hidden layer (the features) and a layer of logits.

    The convolutions have strides, because the gradient of max pooling is slow on XLA:CPU. The
    activation is SiLU, because with ReLU half of the features were zero for every image.

    Args:
        shape: (height, width, channels) of an image.
        num_classes: number of classes of the data set.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, rngs: nnx.Rngs) -> None:
        height, width, c = shape
        self.convs: nnx.Dict[nnx.Conv] = nnx.Dict()
        for number, c_out in enumerate(CHANNELS, 1):
            self.convs[f"conv_{number}"] = conv(c, c_out, strides=2, rngs=rngs)
            height, width, c = -(-height // 2), -(-width // 2), c_out
        self.hidden = linear(height * width * c, NUM_FEATURES, rngs=rngs)
        self.out = linear(NUM_FEATURES, num_classes, rngs=rngs)

    def __call__(
        self, x_0: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
        """The features (the input of the last layer) and the logits."""
        h = x_0
        for layer in self.convs.values():
            h = nnx.silu(layer(h))
        features = nnx.silu(self.hidden(h.reshape(len(h), -1)))
        return features, self.out(features)

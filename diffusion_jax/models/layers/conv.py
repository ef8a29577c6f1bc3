"""The 3x3 convolution of stride 1, plain and by Winograd's algorithm.

On a CPU the multiplications of these convolutions take two thirds of the time of sampling.
``winograd`` computes the same function with 2.25 times fewer multiplications, but with more
additions and memory. In narrow layers it is faster only for as many images as fit the cache of a
core. In wide layers it is also faster for many images and for gradients. Accelerators use the plain
form, because their libraries choose the algorithm themselves.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Images = Float[Array, "B H W C"]
Outputs = Float[Array, "B H W D"]
Kernel = Float[Array, "3 3 C D"]
Weights = Float[Array, "16 C D"]
LAYOUT = ("NHWC", "HWIO", "NHWC")

# F(2, 3): a filter g of three taps has two outputs A'[(G g) * (B'd)] on four inputs d, with four
# multiplications instead of six (Lavin & Gray 2016, section 4.1).
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
GG = np.kron(G, G)  # for both axes

# With fewer channels the transforms cost more than the saved multiplications.
MIN_CHANNELS, MIN_CHANNELS_IN_TRAINING = 32, 128
MIN_TILES_IN_TRAINING = 64  # of a batch: with fewer tiles the matrix products are too small
WIDE = 128  # channels: from here, sixteen matrix products are faster than one batched product
BYTES_AT_ONCE = 2**20  # of transformed images, which should fit the cache of a core
BYTES_AT_ONCE_IF_WIDE = 2**26


def plain(x: Images, kernel: Kernel) -> Outputs:
    """3x3 convolution of stride 1 with zero padding, by XLA's own convolution."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def winograd(x: Images, kernel: Kernel) -> Outputs:
    """``plain`` by Winograd's F(2x2, 3x3), in groups of as many images as fit the cache."""
    # A single matrix product: XLA moves it out of the sampling loop.
    weights = (jnp.asarray(GG) @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])
    multiply = _products_apart if min(kernel.shape[2:]) >= WIDE else _products
    # The groups have equal sizes: the largest divisor of the batch that fits.
    batch, height, width, channels = x.shape
    most = BYTES_AT_ONCE_IF_WIDE if multiply is _products_apart else BYTES_AT_ONCE
    fitting = max(1, most // (4 * height * width * channels * x.dtype.itemsize))
    at_once = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fitting)
    if at_once == batch:
        return _tiles(x, weights, multiply)
    groups = x.reshape(batch // at_once, at_once, height, width, channels)
    y = jax.lax.map(lambda group: _tiles(group, weights, multiply), groups)
    return y.reshape(batch, height, width, -1)


def _tiles(x: Images, weights: Weights, multiply: Callable[..., list[Array]]) -> Outputs:
    """Compute each tile of 2x2 outputs from its tile of 4x4 inputs."""
    batch, height, width, _ = x.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    products = multiply(_of_tiles(x), weights)
    m = [product.reshape(batch, rows, columns, -1) for product in products]
    pairs = zip(*(_to_outputs(m[i::4]) for i in range(4)))
    tiles = jnp.stack([jnp.stack(_to_outputs(list(pair)), axis=3) for pair in pairs], axis=2)
    return tiles.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _products(inputs: list[Array], weights: Weights) -> list[Array]:
    return list(jnp.einsum("ptc,pcd->ptd", jnp.stack(inputs), weights))


def _products_apart(inputs: list[Array], weights: Weights) -> list[Array]:
    """The products of ``_products`` one by one, without a stacked copy of all inputs."""
    return [tiles @ weight for tiles, weight in zip(inputs, weights)]


def _of_tiles(x: Images) -> list[Float[Array, "tiles C"]]:
    """The 16 entries of B'dB for each 4x4 tile d of inputs; neighbouring tiles overlap by two."""
    _, height, width, channels = x.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
    inputs = []
    for d in _of_inputs([x[:, i : i + 2 * rows : 2] for i in range(4)]):
        inputs += _of_inputs([d[:, :, j : j + 2 * columns : 2] for j in range(4)])
    return [entry.reshape(-1, channels) for entry in inputs]


def _of_inputs(d: list[Array]) -> list[Array]:
    """B'd, the input transform of F(2, 3)."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_outputs(m: list[Array]) -> list[Array]:
    """A'm, the output transform of F(2, 3)."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def winograd_gradients(x: Images, kernel: Kernel, dy: Outputs) -> tuple[Images, Kernel]:
    """The gradients of ``winograd`` for x and the kernel, also by Winograd's algorithm.

    The gradient for x is a convolution of dy with the flipped kernel. The gradient for each of the
    16 transformed weights is the matrix product [C, tiles] by [tiles, D] of the transformed inputs
    B'dB and of A dy A'. G'[...]G of these is the gradient for the kernel.
    """
    x, kernel = _not_before(dy, x), _not_before(dy, kernel)
    dx = winograd(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    dweights = [inputs.T @ outputs for inputs, outputs in zip(_of_tiles(x), _from_outputs(dy))]
    dk = jnp.asarray(GG.T) @ jnp.stack(dweights).reshape(16, -1)
    return dx, dk.reshape(kernel.shape)


def _not_before(dy: Outputs, array: Array) -> Array:
    """Return the array unchanged, but make XLA compute ``dy`` before it uses the array.

    Otherwise XLA stores the transforms of all layers from the forward pass instead of computing
    them again, and transforms all kernels at once, so a step needs twice the memory. XLA:CPU drops
    optimization barriers, but it cannot fold 0 * dy, because NaN * 0 is not 0.
    """
    return array + 0 * dy[0, 0, 0, 0]


def _from_outputs(dy: Outputs) -> list[Float[Array, "tiles D"]]:
    """A dy A' for each 2x2 tile: the transpose of ``_to_outputs`` along both axes."""
    _, height, width, channels = dy.shape
    dy = jnp.pad(dy, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    products = []
    for d in _to_products(dy[:, ::2], dy[:, 1::2]):
        products += _to_products(d[:, :, ::2], d[:, :, 1::2])
    return [entry.reshape(-1, channels) for entry in products]


def _to_products(first: Array, second: Array) -> list[Array]:
    """A y, the transpose of ``_to_outputs``."""
    return [first, first + second, first - second, -second]


def convolve(x: Images, kernel: Kernel) -> Outputs:
    """``plain`` by the algorithm that is fastest on the platform."""
    if min(kernel.shape[2:]) < MIN_CHANNELS or x.dtype != jnp.float32:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=plain)


def convolve_in_training(x: Images, kernel: Kernel) -> Outputs:
    """``plain`` by the algorithm with the fastest gradient on the platform; without jax.jvp."""
    batch, height, width, _ = x.shape
    tiles = batch * math.ceil(height / 2) * math.ceil(width / 2)
    is_large = min(kernel.shape[2:]) >= MIN_CHANNELS_IN_TRAINING and tiles >= MIN_TILES_IN_TRAINING
    return (_lean if is_large and x.dtype == jnp.float32 else plain)(x, kernel)


def _forward(x: Images, kernel: Kernel) -> tuple[Outputs, tuple[Images, Kernel]]:
    # Store x and transform it again in the backward pass: the transform is four times as large.
    return convolve(x, kernel), (x, kernel)


def _backward(residuals: tuple[Images, Kernel], dy: Outputs) -> tuple[Images, Kernel]:
    return jax.lax.platform_dependent(
        *residuals, dy, cpu=winograd_gradients, default=_plain_gradients
    )


def _plain_gradients(x: Images, kernel: Kernel, dy: Outputs) -> tuple[Images, Kernel]:
    return jax.vjp(plain, x, kernel)[1](dy)


_lean = jax.custom_vjp(convolve)
_lean.defvjp(_forward, _backward)


def bias_of(conv: nnx.Conv, dtype: DTypeLike | None) -> Float[Array, "1 1 1 D"]:
    """The bias of a convolution, in a shape that broadcasts over images."""
    assert conv.bias is not None
    return conv.bias[...][None, None, None].astype(dtype)


class Conv3x3(nnx.Conv):
    """A 3x3 convolution of stride 1, with its bias."""

    def __call__(  # type: ignore[override]  # nothing calls it as an nnx.Conv
        self, x: Images, is_training: bool
    ) -> Outputs:
        """The convolved images, with the same height and width, in the layer's dtype."""
        function = convolve_in_training if is_training else convolve
        y = function(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + bias_of(self, self.dtype)

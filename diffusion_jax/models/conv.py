"""The 3x3 convolution of stride 1, plain and by Winograd's algorithm.

Two thirds of the time of a chain on a CPU are the multiplications of these convolutions.
``winograd`` is the same function with 2.25 times fewer of them, at the price of additions and
memory, which a few images in a core's cache can afford. Accelerators get the plain form: their
libraries choose an algorithm by themselves.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

Images = Float[Array, "B H W C"]
Outputs = Float[Array, "B H W D"]
Kernel = Float[Array, "3 3 C D"]

LAYOUT = ("NHWC", "HWIO", "NHWC")
# F(2, 3): two outputs of a filter g of three taps on four inputs d are A'[(G g) * (B'd)], four
# multiplications in place of six (Lavin & Gray 2016, section 4.1).
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
MIN_CHANNELS = 32  # with fewer there is too little to multiply between the transforms
BYTES_AT_ONCE = 2**20  # of transformed images: they should stay in a core's cache


def plain(x: Images, kernel: Kernel) -> Outputs:
    """The sum over the 3x3 neighbours of each pixel, zero outside the image."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def winograd(x: Images, kernel: Kernel) -> Outputs:
    """``plain`` by F(2x2, 3x3), a few images at a time."""
    batch, height, width, channels = x.shape
    # one matrix product, which XLA takes out of the loop of a chain
    weights = (jnp.asarray(np.kron(G, G)) @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])
    fitting = max(1, BYTES_AT_ONCE // (4 * height * width * channels * x.dtype.itemsize))
    at_once = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= fitting)
    if at_once == batch:
        return _tiles(x, weights)
    groups = x.reshape(batch // at_once, at_once, height, width, channels)
    y = jax.lax.map(lambda group: _tiles(group, weights), groups)
    return y.reshape(batch, height, width, -1)


def _tiles(x: Images, weights: Float[Array, "16 C D"]) -> Outputs:
    """Each tile of 2x2 outputs from the 4x4 inputs around it."""
    batch, height, width, channels = x.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
    inputs = []
    for d in _of_inputs([x[:, i : i + 2 * rows : 2] for i in range(4)]):
        inputs += _of_inputs([d[:, :, j : j + 2 * columns : 2] for j in range(4)])
    products = jnp.einsum("ptc,pcd->ptd", jnp.stack(inputs).reshape(16, -1, channels), weights)
    products = products.reshape(4, 4, batch, rows, columns, -1)
    pairs = [jnp.stack(_to_outputs(list(m)), axis=3) for m in _to_outputs(list(products))]
    y = jnp.stack(pairs, axis=2).reshape(batch, 2 * rows, 2 * columns, -1)
    return y[:, :height, :width]


def _of_inputs(d: list[Array]) -> list[Array]:
    """B'd of four inputs."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_outputs(m: list[Array]) -> list[Array]:
    """A'm of four products."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def convolve(x: Images, kernel: Kernel) -> Outputs:
    """``plain``, in the form that is fastest where it runs."""
    if min(kernel.shape[2:]) < MIN_CHANNELS or x.dtype != jnp.float32:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=plain)


class Conv3x3(nnx.Conv):
    """The layer, with its bias. In training it is the plain one, which is as fast there."""

    def __call__(self, x: Images, is_training: bool) -> Outputs:
        """The same height and width, in the layer's dtype."""
        function = plain if is_training else convolve
        y = function(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...][None, None, None].astype(self.dtype)

"""A residual network for points."""

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import require
from diffusion_jax.models.layers.embedding import Embedding
from diffusion_jax.models.layers.linear import ZERO, linear


class MLP(nnx.Module):
    """The denoising network for points: residual layers, each with the timestep's embedding.

    Args:
        shape: (dimension,) of a point.
        num_classes: number of classes of the data set; None if it has no labels.
        learned_variance: whether the output for the variance follows along the last axis.
        width: units of a layer; the embedding has 4 width.
        num_layers: number of residual layers.
        class_conditional: add an embedding of the label, or of "no class", to the timestep's.

    Raises:
        ConfigError: the value of an argument is out of its range, or the data are not points.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        learned_variance: bool,
        *,
        width: int,
        num_layers: int,
        class_conditional: bool,
        rngs: nnx.Rngs,
    ) -> None:
        require(len(shape) == 1, "config.model.name", "mlp", f"'unet' for data of shape {shape}")
        allowed = "even and at least 2"
        require(width > 0 and width % 2 == 0, "config.model.width", width, allowed)
        require(num_layers > 0, "config.model.num_layers", num_layers, "at least 1")
        self.embedding = Embedding(width, num_classes if class_conditional else None, rngs=rngs)
        self.stem = linear(shape[0], width, rngs=rngs)
        self.layers = nnx.List(Layer(width, rngs=rngs) for _ in range(num_layers))
        self.out = linear(width, shape[0] * (1 + learned_variance), kernel_init=ZERO, rngs=rngs)

    def __call__(
        self,
        x_t: Float[Array, "B D"],
        timestep: Float[Array, " B"],
        label: Int[Array, " B"] | None,
        keys: Key[Array, " B"] | None,
    ) -> Float[Array, "B D_out"]:
        """The network's output; the keys have no effect, because there is no dropout."""
        embedding = nnx.silu(self.embedding(timestep, label))
        h = self.stem(x_t)
        for layer in self.layers:
            h = layer(h, embedding)
        return self.out(nnx.silu(h))


class Layer(nnx.Module):
    """A residual layer: h + W_2 silu(W_1 silu(h) + W_e embedding)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(width, width, rngs=rngs)
        self.embedding = linear(4 * width, width, rngs=rngs)
        self.linear_2 = linear(width, width, rngs=rngs)

    def __call__(
        self, h: Float[Array, "B W"], embedding: Float[Array, "B E"]
    ) -> Float[Array, "B W"]:
        """The layer's output; E is the length of the embedding."""
        hidden = self.linear_1(nnx.silu(h)) + self.embedding(embedding)
        return h + self.linear_2(nnx.silu(hidden))

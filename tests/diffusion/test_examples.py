"""Examples: a pytree whose shapes and types are checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from diffusion_jax.diffusion.examples import Examples, example_keys

FIELDS = {
    "x_0": jnp.zeros((4, 3, 2)),
    "label": jnp.arange(4),
    "indices": jnp.arange(4, 8),
    "batch_size": 8,
}


@pytest.mark.parametrize("label", [None, jnp.arange(4)])
def test_examples_that_fit_are_accepted(label):
    examples = Examples(**FIELDS | {"label": label})
    assert examples.label is label
    assert Examples(**FIELDS | {"x_0": jnp.zeros((4, 2))}).x_0.shape == (4, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("x_0", jnp.zeros((3, 3, 2))),  # there are four indices
        ("x_0", jnp.zeros((4, 3, 2), jnp.int32)),
        ("x_0", jnp.zeros(())),
        ("label", jnp.arange(5)),
        ("label", jnp.arange(4).reshape(4, 1)),
        ("label", jnp.zeros(4)),
        ("indices", jnp.arange(3)),
        ("indices", jnp.zeros(4)),
        ("indices", jnp.arange(4).reshape(2, 2)),
        ("batch_size", 8.0),
        ("batch_size", jnp.array(8)),
    ],
)
def test_shapes_and_types_are_checked(field, value):
    with pytest.raises(TypeCheckError):
        Examples(**FIELDS | {field: value})
    # Under a transformation too, because training builds them inside one
    if hasattr(value, "shape") and field != "batch_size":
        arrays = {name: FIELDS[name] for name in ("x_0", "label", "indices")} | {field: value}
        with pytest.raises(TypeCheckError):
            jax.eval_shape(lambda arrays: Examples(**arrays, batch_size=8), arrays)


def test_fields_are_keyword_only_and_frozen():
    with pytest.raises(TypeError, match="positional"):
        Examples(*FIELDS.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Examples(**FIELDS).batch_size = 4


def test_examples_are_a_pytree_with_a_static_batch_size():
    examples = Examples(**FIELDS)
    leaves, structure = jax.tree.flatten(examples)
    assert [leaf.shape for leaf in leaves] == [(4, 3, 2), (4,), (4,)]
    again = jax.tree.unflatten(structure, leaves)
    assert (type(again), again.batch_size) == (Examples, 8)
    assert structure != jax.tree.structure(Examples(**FIELDS | {"batch_size": 4}))
    # jax also makes Examples whose leaves are shapes or axes
    shapes = jax.eval_shape(lambda examples: examples, examples)
    assert shapes.x_0.shape == (4, 3, 2)
    axes = jax.tree.map(lambda leaf: 0, examples)
    total = jax.vmap(lambda one: jnp.sum(one.x_0) + one.batch_size, in_axes=(axes,))(examples)
    np.testing.assert_array_equal(total, jnp.full(4, 8.0))
    compiled = jax.jit(lambda examples: examples)(examples)
    jax.tree.map(np.testing.assert_array_equal, compiled, examples)


def test_the_keys_of_an_example_are_those_of_its_index():
    whole = example_keys(jax.random.key(0), jnp.arange(8))
    part = example_keys(jax.random.key(0), jnp.array([6, 1]))
    data = jax.tree.map(lambda keys: np.asarray(jax.random.key_data(keys)), (whole, part))
    np.testing.assert_array_equal(data[0].common, data[1].common)
    for name in ("first", "second", "dropout", "label"):
        np.testing.assert_array_equal(getattr(data[1], name), getattr(data[0], name)[[6, 1]])
    every = np.concatenate([data[0].common[None], *data[0][1:]])
    assert len(np.unique(every, axis=0)) == 1 + 4 * 8

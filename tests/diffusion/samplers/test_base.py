"""The base class of samplers: what a subclass becomes, what is refused, and the registry."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import gaussian

from diffusion_jax.diffusion import samplers, schedules
from diffusion_jax.diffusion.samplers import SAMPLERS, STATIC, Number, Sampler, sample

SCHEDULE = schedules.cosine(5)
DATA = gaussian(0.4, 0.05)


class Shrunk(Sampler):
    share: Number

    def step(self, now):
        return self.share * now.predict(now.x_t, now.row).x_0, now.state


class Moved(Sampler):
    share: Number
    times: int = dataclasses.field(metadata=STATIC)

    def step(self, now):
        return now.x_t + self.times * self.share, now.state


@jax.jit
def step(sampler, x_t):
    """The first step of a chain."""
    state, keys = sampler.init(x_t, SCHEDULE, SCHEDULE), jax.random.split(jax.random.key(0), 2)
    now = samplers.Step(keys, DATA, state, x_t, SCHEDULE[-1], SCHEDULE[-2])
    return sampler.step(now)[0]


X_T = jnp.ones((2, 3))


# --- a short class as a sampler -------------------------------------------------------------


def test_the_numbers_of_a_sampler_are_leaves():
    assert jax.tree.leaves(Shrunk(0.5)) == [0.5]
    assert jax.tree.leaves(Shrunk(share=jnp.float32(0.25))) == [0.25]
    assert jax.tree.map(lambda leaf: 2 * leaf, Shrunk(0.5)) == Shrunk(1.0)
    [(path, _)] = jax.tree_util.tree_leaves_with_path(Shrunk(0.5))
    assert jax.tree_util.keystr(path) == ".share"


def test_other_numbers_are_another_argument_of_the_same_compiled_function():
    traces = []

    @jax.jit
    def counted(sampler):
        traces.append(())
        return step(sampler, X_T)

    for share in (0.5, 0.25):
        expected = share * DATA(X_T, SCHEDULE[-1]).x_0
        np.testing.assert_allclose(counted(Shrunk(share)), expected, rtol=1e-6)
    assert len(traces) == 1


def test_static_fields_are_part_of_the_structure():
    assert jax.tree.leaves(Moved(0.5, 3)) == [0.5]
    once, twice = Moved(0.5, 1), Moved(0.5, 2)
    assert jax.tree.structure(once) != jax.tree.structure(twice)
    np.testing.assert_array_equal(step(once, X_T), X_T + 0.5)
    np.testing.assert_array_equal(step(twice, X_T), X_T + 1.0)


def test_a_sampler_draws_images_like_any_other():
    x_0 = sample(jax.random.key(0), DATA, SCHEDULE, Moved(0.5, 2), (2, 3), x_T=X_T)
    np.testing.assert_allclose(x_0, X_T + len(SCHEDULE), rtol=1e-6)
    assert Moved(0.5, 2).num_evaluations(5) == 5
    np.testing.assert_array_equal(Moved(0.5, 2).path(2), [2, 1, 0])
    assert not Moved.needs_signal
    assert not Moved.goes_off_grid


@pytest.mark.parametrize("name", ["share", "kind", "other"])
def test_a_sampler_is_frozen(name):
    sampler = Shrunk(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(sampler, name, 1.0)
    assert sampler.share == 0.5


def test_a_sampler_shows_its_own_fields_alone():
    assert repr(Moved(0.5, 2)).endswith("Moved(share=0.5, times=2)")
    assert list(inspect.signature(Moved).parameters) == ["share", "times", "kind"]
    with pytest.raises(TypeError, match="positional"):
        Shrunk(0.5, Moved)


# --- one kind for each class ----------------------------------------------------------------


def define(share):
    """A new class with the same name at each call, as when a notebook cell runs again."""

    class Again(Sampler):
        def step(self, now):
            return share * now.x_t, now.state

    return Again


def test_the_kind_of_each_class_is_unequal_to_every_other():
    classes = [*(type(create()) for create in dict.fromkeys(SAMPLERS.values()))]
    classes = [*dict.fromkeys(classes), Shrunk, Moved, define(2.0), define(3.0)]
    kinds = [cls.kind for cls in classes]
    for one, other in itertools.combinations(kinds, 2):
        assert one != other
    assert all(hash(kind) is not None for kind in kinds)


def test_a_new_definition_is_not_taken_for_the_old_one():
    first, second = define(2.0)(), define(3.0)()
    assert type(first).__qualname__ == type(second).__qualname__
    assert jax.tree.structure(first) != jax.tree.structure(second)
    np.testing.assert_array_equal(step(first, X_T), 2 * X_T)
    np.testing.assert_array_equal(step(second, X_T), 3 * X_T)


def test_a_subclass_of_a_sampler_has_its_fields_and_its_own_kind():
    class Shifted(Shrunk):
        shift: Number

        def step(self, now):
            x_prev, state = super().step(now)
            return x_prev + self.shift, state

    assert jax.tree.leaves(Shifted(0.5, 0.25)) == [0.5, 0.25]
    assert Shifted.kind != Shrunk.kind
    np.testing.assert_allclose(
        step(Shifted(0.5, 0.25), X_T), step(Shrunk(0.5), X_T) + 0.25, rtol=1e-6
    )


# --- what is refused ------------------------------------------------------------------------


def test_an_init_of_its_own_is_refused():
    with pytest.raises(TypeError, match=r"^Own\.__init__: a sampler must not define it"):

        class Own(Sampler):
            def __init__(self, share):
                self.share = share

            def step(self, now):
                return now.x_t, now.state


@pytest.mark.parametrize("body", [{"kind": "own"}, {"__annotations__": {"kind": str}}])
def test_a_field_named_kind_is_refused(body):
    with pytest.raises(TypeError, match=r"^Own\.kind: a sampler must not define it"):
        type(Sampler)("Own", (Sampler,), body | {"step": Moved.step})


def test_a_sampler_without_a_step_cannot_be_made():
    class Still(Sampler):
        share: Number

    with pytest.raises(TypeError, match=r"abstract.*step"):
        Still(0.5)
    with pytest.raises(TypeError, match=r"abstract.*step"):
        Sampler()


# --- the registry ---------------------------------------------------------------------------


def modules_of_samplers():
    names = [module.name for module in pkgutil.iter_modules(samplers.__path__)]
    return [importlib.import_module(f"{samplers.__name__}.{name}") for name in names]


def unregistered(modules):
    """The concrete sampler classes of some modules that no entry of SAMPLERS creates."""
    made = {type(create()) for create in SAMPLERS.values()}
    return [
        cls
        for module in modules
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Sampler) and cls.__module__ == module.__name__
        if not inspect.isabstract(cls) and cls not in made
    ]


def test_every_sampler_is_made_by_an_entry_of_the_registry():
    modules = modules_of_samplers()
    assert {type(create()).__module__ for create in SAMPLERS.values()} <= {
        module.__name__ for module in modules
    }
    assert unregistered(modules) == []


SOURCE = """
from diffusion_jax.diffusion.samplers.base import Number, Sampler

class Abstract(Sampler):
    share: Number

class MadeUp(Abstract):
    def step(self, now):
        return now.x_t, now.state
"""


def test_a_sampler_without_an_entry_is_reported():
    made_up = types.ModuleType(f"{samplers.__name__}.made_up")
    exec(SOURCE, vars(made_up))
    assert unregistered([*modules_of_samplers(), made_up]) == [made_up.MadeUp]

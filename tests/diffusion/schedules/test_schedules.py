"""Schedules against 40-digit arithmetic, published numbers and the invariants of a chain."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from rounding import UNIT

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.schedules.families import SCHEDULES
from diffusion_jax.diffusion.schedules.schedule import Schedule
from diffusion_jax.diffusion.schedules.spacings import GRIDS, SPACINGS
from diffusion_jax.diffusion.schedules.transforms import respace
from diffusion_jax.errors import ConfigError

COLUMNS = [
    "beta",
    "alpha",
    "alpha_bar",
    "alpha_bar_prev",
    "one_minus_alpha_bar",
    "one_minus_alpha_bar_prev",
    "posterior_variance",
]
LENGTHS = [1, 2, 10, 1000, 4000]

# Arguments to test besides the defaults.
CASES = {
    "linear": [{"beta_start": 1e-5, "beta_end": 0.015}],
    "cosine": [
        {"s": 0.0},
        {"s": 1e-4},
        {"s": 0.1},
        {"max_beta": 0.02},
        {"min_beta": 1e-4, "max_beta": 0.5},
    ],
    "sigmoid": [{"start": 0.0, "tau": 0.7}, {"tau": 0.3}, {"max_beta": 0.02, "min_beta": 1e-3}],
}
# The relative error of traced float32 columns where at most the last row is clipped. It is 1e-5
# where columns are running products. A sigmoid of u = 10 (tau = 0.3) multiplies the rounding of u
# by 10.
TRACED = {"cosine": 1e-6, "sigmoid": 2e-6}


# --- the definitions, in 40 digits ----------------------------------------------------------


def between(start, end, steps):
    """Evenly spaced numbers from start to end."""
    return [start + (end - start) * i / max(steps - 1, 1) for i in range(steps)]


def quadratic(num_timesteps, beta_start, beta_end):
    return [root**2 for root in between(mp.sqrt(beta_start), mp.sqrt(beta_end), num_timesteps)]


def clipped(alpha_bars, max_beta, min_beta):
    """The betas of alpha_bar_0 .. alpha_bar_T, clipped to [min_beta, max_beta]."""
    ratios = [after / before for before, after in itertools.pairwise(alpha_bars)]
    return [max(min(1 - ratio, max_beta), min_beta) for ratio in ratios]


def cosine(num_timesteps, s, max_beta, min_beta):
    f = [
        mp.cos((mpf(t) / num_timesteps + s) / (1 + s) * mp.pi / 2) ** 2
        for t in range(num_timesteps + 1)
    ]
    return clipped([value / f[0] for value in f], max_beta, min_beta)


def logistic(x):
    return 1 / (1 + mp.exp(-x))


def sigmoid(num_timesteps, start, end, tau, max_beta, min_beta):
    u = [
        logistic((mpf(t) / num_timesteps * (end - start) + start) / tau)
        for t in range(num_timesteps + 1)
    ]
    return clipped([(u[-1] - value) / (u[-1] - u[0]) for value in u], max_beta, min_beta)


def warmup(share, num_timesteps, beta_start, beta_end):
    rising = between(beta_start, beta_end, num_timesteps // share)
    return rising + [beta_end] * (num_timesteps - len(rising))


def own_betas(num_timesteps):
    t = np.arange(num_timesteps)
    return np.asarray(1e-4 + 0.02 * np.sin(t) ** 2, np.float32).astype(np.float64)


DEFINITIONS = {
    "linear": lambda T, beta_start, beta_end: between(beta_start, beta_end, T),
    "scaled_linear": quadratic,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_beta": lambda T, beta_start, beta_end: [
        logistic(x) * (beta_end - beta_start) + beta_start for x in between(mpf(-6), mpf(6), T)
    ],
    "constant": lambda T, beta_end: [beta_end] * T,
    "jsd": lambda T: [mpf(1) / (T - t + 1) for t in range(1, T + 1)],
    "warmup10": functools.partial(warmup, 10),
    "warmup50": functools.partial(warmup, 2),
    "from_betas": lambda T: [mpf(beta) for beta in own_betas(T)],
}


def columns_of(betas):
    """Every column by its definition, computed from betas of 40 digits and rounded to float64."""
    alpha = [1 - beta for beta in betas]
    alpha_bar = list(itertools.accumulate(alpha, lambda product, factor: product * factor))
    alpha_bar_prev = [mpf(1), *alpha_bar[:-1]]
    one_minus = [1 - value for value in alpha_bar]
    one_minus_prev = [1 - value for value in alpha_bar_prev]
    variance = [b * p / o for b, p, o in zip(betas, one_minus_prev, one_minus)]
    values = [betas, alpha, alpha_bar, alpha_bar_prev, one_minus, one_minus_prev, variance]
    return {name: np.array(column, np.float64) for name, column in zip(COLUMNS, values)}


@functools.cache
def exact(name, num_timesteps, items):
    with mp.workdps(40):
        arguments = {field: mpf(value) for field, value in items}
        return columns_of([mpf(b) for b in DEFINITIONS[name](num_timesteps, **arguments)])


def build(name, num_timesteps, arguments):
    if name == "from_betas":
        return schedules.from_betas(own_betas(num_timesteps))
    return SCHEDULES[name](num_timesteps, **arguments)


def float_arguments(name):
    """The float arguments of a schedule at their defaults."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.items()
    return {field: p.default for field, p in parameters if isinstance(p.default, float)}


def cases(name):
    return [float_arguments(name) | case for case in [{}, *CASES.get(name, [])]]


def assert_close(schedule, expected, tolerance):
    for name, reference in expected.items():
        column = getattr(schedule, name)
        assert column.dtype == jnp.float32
        # An exact 0 (the first posterior variance, zero terminal SNR) must be 0
        error = np.abs(np.asarray(column, np.float64) - reference)
        assert np.all(error <= tolerance * reference), (
            f"{name}: {np.max(error / np.where(reference > 0, reference, 1)):.2g}"
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_plain_numbers_are_the_40_digit_values_rounded_once(name):
    for num_timesteps, arguments in itertools.product(LENGTHS, cases(name)):
        schedule = build(name, num_timesteps, arguments)
        assert_close(schedule, exact(name, num_timesteps, tuple(arguments.items())), 1e-7)
        assert len(schedule) == num_timesteps
        np.testing.assert_array_equal(schedule.timestep, np.arange(1, num_timesteps + 1))


@pytest.mark.parametrize("num_timesteps", [10, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_under_jit_and_vmap_stays_close_to_40_digits(name, num_timesteps):
    if name == "from_betas":
        traced = jax.jit(schedules.from_betas)(jnp.asarray(own_betas(num_timesteps)))
        return assert_close(traced, exact(name, num_timesteps, ()), 1e-5)
    stack = [{f: np.float32(value) for f, value in case.items()} for case in cases(name)]
    if not stack[0]:
        pytest.skip("no float argument")
    stacked = {field: jnp.array([case[field] for case in stack]) for field in stack[0]}
    traced = jax.jit(jax.vmap(lambda p: SCHEDULES[name](num_timesteps, **p)))(stacked)
    traced = jax.device_get(traced)
    for i, case in enumerate(stack):
        items = tuple((field, float(value)) for field, value in case.items())
        expected = exact(name, num_timesteps, items)
        is_clipped = np.sum(expected["beta"] >= case.get("max_beta", 2)) > 1
        is_clipped |= np.any(expected["beta"] <= case.get("min_beta", 0))
        assert_close(traced[i], expected, 1e-5 if is_clipped else TRACED.get(name, 1e-5))


def test_naive_float32_loses_a_quarter_of_the_first_beta():
    """So the cosine schedule uses trigonometric identities, which are exact to 1e-6."""
    num_timesteps, s = 4000, np.float32(1e-4)
    t = np.arange(num_timesteps + 1, dtype=np.float32) / np.float32(num_timesteps)
    f = np.cos((t + s) / (1 + s) * np.float32(np.pi / 2)) ** 2
    naive = 1 - f[1:] / f[:-1]
    arguments = float_arguments("cosine") | {"s": float(s)}
    expected = exact("cosine", num_timesteps, tuple(arguments.items()))["beta"]
    ours = jax.jit(lambda s: schedules.cosine(num_timesteps, s).beta)(s)
    assert abs(naive[0] / expected[0] - 1) > 0.2
    assert abs(ours[0] / expected[0] - 1) < 1e-6


def test_alpha_is_one_minus_a_plain_max_beta_when_s_is_traced():
    traced = jax.jit(lambda s: schedules.cosine(1000, s))(0.008)
    assert abs(1 - np.float32(0.999) - 0.001) / 0.001 > 1e-5  # 1 - max_beta in float32 is off
    np.testing.assert_allclose(traced.alpha[-1], 1 - 0.999, rtol=1e-7)


# --- published numbers ----------------------------------------------------------------------


def test_numbers_of_the_papers():
    cosine = schedules.cosine(1000)
    # iDDPM section 3.2: sqrt(beta_1) is slightly smaller than the pixel bin 1/127.5
    np.testing.assert_allclose(cosine.beta[0], 4.128e-5, rtol=2e-4)
    assert 0.006 < np.sqrt(cosine.beta[0]) < 1 / 127.5
    assert np.sum(cosine.beta >= np.float32(0.999)) == 1
    # The largest sigma of Stable Diffusion in k-diffusion and diffusers
    np.testing.assert_allclose(schedules.scaled_linear(1000).sigma[-1], 14.6146, atol=5e-5)
    # DDPM's chain ends at alpha_bar_T = 4.036e-5; a rescaled chain of 4000 steps ends near it
    np.testing.assert_allclose(schedules.linear(1000).alpha_bar[-1], 4.036e-5, rtol=1e-4)
    rescaled = schedules.linear(4000, rescale=True)
    np.testing.assert_allclose(np.asarray(rescaled.beta)[[0, -1]], [2.5e-5, 5e-3], rtol=1e-7)
    np.testing.assert_allclose(rescaled.alpha_bar[-1], 4.036e-5, rtol=0.15)
    np.testing.assert_allclose(schedules.jsd(1000).alpha_bar[249], 0.75, rtol=1e-7)


def test_clipped_cosine():
    schedule = schedules.cosine(1000, max_beta=0.02)
    assert np.sum(schedule.beta >= np.float32(0.02)) == 98
    assert schedule.alpha_bar[-1] > 0
    assert np.isfinite(schedule.sigma[-1])


# --- invariants -----------------------------------------------------------------------------

TRANSFORMS = {
    "native": lambda schedule: schedule,
    "zero_terminal_snr": schedules.zero_terminal_snr,
    "shifted": lambda schedule: schedules.shift_log_snr(schedule, 256, 64),
    "respaced": lambda schedule: respace(schedule, 37),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_chain(name, transform):
    schedule = TRANSFORMS[transform](build(name, 1000, float_arguments(name)))
    beta, alpha, alpha_bar, before, one_minus, one_minus_before, variance = (
        np.asarray(getattr(schedule, column), np.float64) for column in COLUMNS
    )
    assert np.all((beta > 0) & (beta <= 1))
    assert np.all(np.diff(alpha_bar) < 0)
    assert np.all(variance[1:] > 0)
    np.testing.assert_allclose(alpha + beta, 1, atol=1e-7)
    np.testing.assert_allclose(alpha_bar + one_minus, 1, atol=1e-7)
    assert (before[0], one_minus_before[0], variance[0]) == (1, 0, 0)
    np.testing.assert_array_equal(before[1:], alpha_bar[:-1])
    np.testing.assert_array_equal(one_minus_before[1:], one_minus[:-1])
    np.testing.assert_allclose(alpha_bar, before * alpha, rtol=3e-7)
    # Four columns are rounded once each; in "shifted" two of them come from rounded columns
    np.testing.assert_allclose(variance, beta * one_minus_before / one_minus, rtol=6 * UNIT)
    # Noise added at s is scaled by alpha_{s+1} .. alpha_t until t; the variances add up
    total = itertools.accumulate(zip(alpha, beta), lambda v, ab: ab[0] * v + ab[1], initial=0.0)
    np.testing.assert_allclose(list(total)[1:], one_minus, rtol=2e-6)
    np.testing.assert_allclose(schedule.snr, alpha_bar / one_minus, rtol=3e-7)
    np.testing.assert_allclose(schedule.sigma[:-1], schedule.snr[:-1] ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(schedule.log_snr[:-1], np.log(schedule.snr[:-1]), atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_one_timestep(name):
    schedule = build(name, 1, float_arguments(name))
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, schedule.beta)
    np.testing.assert_array_equal(schedule.posterior_variance, [0])
    np.testing.assert_allclose(
        schedule.posterior_log_variance_clipped, np.log(schedule.beta), rtol=1e-6
    )
    assert_same(respace(schedule, 1), schedule)


def test_zero_terminal_snr_is_the_rescaling_of_lin_et_al():
    for name in ["scaled_linear", "cosine", "linear"]:
        before = exact(name, 1000, tuple(float_arguments(name).items()))
        with mp.workdps(40):
            arguments = {f: mpf(value) for f, value in float_arguments(name).items()}
            betas = DEFINITIONS[name](1000, **arguments)
            roots = [mp.sqrt(a) for a in itertools.accumulate((1 - b for b in betas), mp.fmul)]
            scaled = [(r - roots[-1]) * roots[0] / (roots[0] - roots[-1]) for r in roots]
            squares = [mpf(1), *(root**2 for root in scaled)]
            expected = columns_of([1 - b / a for a, b in itertools.pairwise(squares)])
        schedule = build(name, 1000, float_arguments(name))
        rescaled = schedules.zero_terminal_snr(schedule)
        assert_close(rescaled, expected, 4e-7)
        np.testing.assert_allclose(rescaled.alpha_bar[0], before["alpha_bar"][0], rtol=1e-7)
        assert (rescaled.alpha_bar[-1], rescaled.beta[-1], rescaled.snr[-1]) == (0, 1, 0)
        assert_close(jax.jit(schedules.zero_terminal_snr)(schedule), expected, 1e-5)


def test_shift_log_snr_shifts_the_log_snr():
    for name, resolution in itertools.product(["cosine", "linear"], [8, 64, 512]):
        schedule = build(name, 1000, float_arguments(name))
        shifted = schedules.shift_log_snr(schedule, resolution, 64)
        expected = schedule.log_snr + 2 * np.log(64 / resolution)
        np.testing.assert_allclose(shifted.log_snr, expected, atol=3e-6)
        with mp.workdps(40):
            arguments = {f: mpf(value) for f, value in float_arguments(name).items()}
            alphas = (1 - b for b in DEFINITIONS[name](1000, **arguments))
            c = (mpf(64) / resolution) ** 2
            bars = [mpf(1), *itertools.accumulate(alphas, mp.fmul)]
            bars = [c * bar / (c * bar + 1 - bar) for bar in bars]
            exactly = columns_of([1 - b / a for a, b in itertools.pairwise(bars)])
        assert_close(shifted, exactly, 4e-7)
        traced = jax.jit(schedules.shift_log_snr)(schedule, float(resolution), 64.0)
        assert_close(traced, exactly, 1e-6)
    assert_close(schedules.shift_log_snr(schedule, 64, 64), dict_of(schedule), 2e-7)


# --- respacing ------------------------------------------------------------------------------


def dict_of(schedule):
    return {name: np.asarray(getattr(schedule, name), np.float64) for name in COLUMNS}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacings_are_increasing_rows_of_the_chain(spacing):
    for num_timesteps in [*range(1, 41), 1000]:
        for num_steps in range(1, num_timesteps + 1):
            rows = SPACINGS[spacing](num_timesteps, num_steps)
            assert rows.shape == (num_steps,)
            assert np.issubdtype(rows.dtype, np.integer)
            assert np.all(np.diff(rows) > 0)
            assert rows[0] >= 1
            assert rows[-1] <= num_timesteps
            if spacing in ("trailing", "linspace"):
                assert rows[-1] == num_timesteps
            if spacing != "trailing" and num_steps > 1:
                assert rows[0] == 1


def test_spacings_are_those_of_diffusers_and_ddim():
    """The expected numbers are diffusers' DDIMScheduler's, T = 1000, 10 steps, counted from 0."""
    assert [*SPACINGS["trailing"](1000, 10) - 1] == [
        99,
        199,
        299,
        399,
        499,
        599,
        699,
        799,
        899,
        999,
    ]
    assert [*SPACINGS["leading"](1000, 10) - 1] == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert [*SPACINGS["linspace"](1000, 10) - 1] == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    ddim = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 10) ** 2]
    assert [*SPACINGS["quadratic"](1000, 10) - 1] == ddim


@pytest.mark.parametrize("spacing", SPACINGS)
def test_respaced_rows_are_those_of_the_native_chain(spacing):
    with mp.workdps(40):
        arguments = tuple(float_arguments("cosine").items())
        for num_timesteps in [1, 2, 11]:
            betas = cosine(num_timesteps, **{field: mpf(value) for field, value in arguments})
            bars = [mpf(1), *itertools.accumulate((1 - b for b in betas), mp.fmul)]
            schedule = schedules.cosine(num_timesteps)
            for num_steps in range(1, num_timesteps + 1):
                rows = SPACINGS[spacing](num_timesteps, num_steps)
                if num_timesteps > 1 and rows[-1] == 1:
                    continue  # a single step from t = 1 is refused
                short = respace(schedule, num_steps, spacing)
                visited = [mpf(1), *(bars[t] for t in rows)]
                expected = columns_of([1 - b / a for a, b in itertools.pairwise(visited)])
                assert_close(short, expected, 4e-7)
                for column in ("timestep", "alpha_bar", "one_minus_alpha_bar"):
                    native = np.asarray(getattr(schedule, column))[rows - 1]
                    np.testing.assert_array_equal(getattr(short, column), native)


@pytest.mark.parametrize("name", SCHEDULES)
def test_respacing_to_every_timestep_changes_nothing(name):
    schedule = build(name, 1000, float_arguments(name))
    for spacing in SPACINGS:
        same = respace(schedule, 1000, spacing)
        assert_close(same, dict_of(schedule), 3e-7)
        np.testing.assert_array_equal(same.timestep, schedule.timestep)


def test_traced_schedules_can_be_transformed():
    offsets = jnp.array([0.0, 0.008, 0.1])

    def transformed(s):
        schedule = schedules.zero_terminal_snr(schedules.cosine(100, s))
        return respace(schedules.shift_log_snr(schedule, 128, 64), 10)

    stack = jax.jit(jax.vmap(transformed))(offsets)
    for i, s in enumerate(offsets):
        assert_close(stack[i], dict_of(transformed(float(s))), 1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 5, 2000])
def test_betas_of_a_traced_grid_are_exact_where_log_snrs_are_close(name, grid, num_steps):
    """Differences of 2,000 log SNRs are so small that float32 would keep three digits of them."""
    full = SCHEDULES[name](1000)
    # computed in float64 on the host and rounded once
    expected = dict_of(respace(full, num_steps, grid))
    traced = jax.jit(respace, static_argnums=(1, 2))(full, num_steps, grid)
    assert_close(traced, expected, 1e-5)


# --- the pytree -----------------------------------------------------------------------------


def test_rows_and_slices():
    schedule = schedules.cosine(10)
    row = schedule[3]
    assert row.beta.shape == ()
    assert row.timestep == 4
    assert schedule[-1].timestep == 10
    assert schedule[jnp.array(2)].timestep == 3
    assert len(schedule[2:5]) == 3
    assert_same(schedule[2:5][1], row)
    assert [float(r.timestep) for r in schedule] == list(range(1, 11))
    for index in (10, -11):
        with pytest.raises(IndexError, match="of a schedule of 10 rows"):
            schedule[index]


@pytest.mark.parametrize("index", [-1, 10, [3, -1], [[0], [10]]])
def test_a_row_outside_the_schedule_in_an_array_of_indices_is_an_error(index):
    """-1 in an array does not mean the last row: it was computed, for example as first row - 1."""
    with pytest.raises(IndexError, match="of a schedule of 10 rows"):
        schedules.cosine(10)[np.array(index)]
    assert schedules.cosine(10)[np.array([[0], [9]])].beta.shape == (2, 1)
    assert len(schedules.cosine(10)[np.arange(10) > 3]) == 6


def test_the_row_before_each_row():
    schedule = schedules.cosine(10)
    before = schedules.with_terminal_row(schedule)[:-1]
    start = schedules.terminal_row()
    assert_same(before[0], start)
    assert_same(before[1:], schedule[:-1])
    np.testing.assert_array_equal(before.alpha_bar, schedule.alpha_bar_prev)
    np.testing.assert_array_equal(before.one_minus_alpha_bar, schedule.one_minus_alpha_bar_prev)
    assert (start.timestep, start.sigma, start.alpha, start.snr) == (0, 0, 1, np.inf)


def test_posterior_log_variance_is_clipped_as_in_iddpm():
    schedule = schedules.cosine(10)
    variance = np.asarray(schedule.posterior_variance)
    expected = np.log(np.append(variance[1], variance[1:]))
    np.testing.assert_allclose(schedule.posterior_log_variance_clipped, expected, rtol=1e-6)
    stack = jax.jit(jax.vmap(lambda s: schedules.cosine(10, s)))(jnp.array([0.0, 0.1]))
    for i in range(2):
        np.testing.assert_array_equal(
            stack.posterior_log_variance_clipped[i], stack[i].posterior_log_variance_clipped
        )
    with pytest.raises(ValueError, match="needs a schedule, not a row"):
        _ = schedule[3].posterior_log_variance_clipped


def test_a_schedule_is_a_pytree():
    schedule = schedules.cosine(10)
    leaves, structure = jax.tree.flatten(schedule)
    assert len(leaves) == 8
    assert all(leaf.dtype == jnp.float32 and leaf.shape == (10,) for leaf in leaves)
    assert_same(jax.tree.unflatten(structure, leaves), schedule)
    shapes = jax.eval_shape(lambda: schedules.cosine(10))
    assert isinstance(shapes, Schedule)
    _, betas = jax.lax.scan(lambda carry, row: (carry, row.beta), 0, schedule, reverse=True)
    np.testing.assert_array_equal(betas, schedule.beta)


def test_another_offset_does_not_compile_again():
    traces = []

    @jax.jit
    def build_traced(s):
        traces.append("build")
        return schedules.cosine(10, s)

    @jax.jit
    def use(schedule):
        traces.append("use")
        return schedule.snr

    for s in (0.0, 0.008, 0.1):
        build_traced(s)
        use(schedules.cosine(10, s))
    assert traces == ["build", "use"]


def test_gradient_of_the_first_beta_with_respect_to_the_offset():
    derivative = jax.jit(jax.grad(lambda s: schedules.cosine(100, s).beta[0]))(0.008)
    difference = schedules.cosine(100, 0.0081).beta[0] - schedules.cosine(100, 0.0079).beta[0]
    np.testing.assert_allclose(derivative, difference / 0.0002, rtol=1e-3)


# --- arguments that are refused -------------------------------------------------------------

REFUSED = {
    "num_timesteps = 0: must be": lambda: schedules.linear(0),
    "num_timesteps = -3: must be": lambda: schedules.cosine(-3),
    "num_timesteps = True: must be": lambda: schedules.jsd(True),
    "s = -0.001: must be in [0, 1e100]": lambda: schedules.cosine(10, s=-0.001),
    "s = nan: must be": lambda: schedules.cosine(10, s=float("nan")),
    "s = inf: must be": lambda: schedules.cosine(10, s=float("inf")),
    "s = 1e+163: must be in [0, 1e100]": lambda: schedules.cosine(10, s=1e163),
    "s = -1.0: must be": lambda: schedules.cosine(10, s=jnp.array(-1.0)),
    "max_beta = 0.0: must be in (0, 1]": lambda: schedules.cosine(10, max_beta=0.0),
    "max_beta = 1.1: must be in (0, 1]": lambda: schedules.sigmoid(10, max_beta=1.1),
    "min_beta = -0.1: must be in [0, ": lambda: schedules.cosine(10, min_beta=-0.1),
    "min_beta = 0.3: must be in [0, max_beta = 0.2]": lambda: schedules.sigmoid(
        10, min_beta=0.3, max_beta=0.2
    ),
    "tau = 0.0: must be": lambda: schedules.sigmoid(10, tau=0.0),
    "start = -3.0: must be at most 50 tau": lambda: schedules.sigmoid(10, tau=0.01),
    "end = -3.0: must be in (start": lambda: schedules.sigmoid(10, end=-3.0),
    "beta_start = 0.0: must be in (0, 1]": lambda: schedules.linear(10, beta_start=0.0),
    "beta_start = 1e-60: must be in (0, 1]": lambda: schedules.quadratic(10, beta_start=1e-60),
    "beta_end = 1.5: must be in (0, 1]": lambda: schedules.scaled_linear(10, beta_end=1.5),
    "beta_end = nan: must be in (0, 1]": lambda: schedules.warmup10(10, beta_end=float("nan")),
    "beta_end = -1.0: must be in (0, 1]": lambda: schedules.warmup50(10, beta_end=-1.0),
    "beta_end = 2.0: must be in (0, 1]": lambda: schedules.constant(10, beta_end=2.0),
    "beta_end = 3.0: must be in (0, 1]": lambda: schedules.sigmoid_beta(10, beta_end=3.0),
    "num_timesteps = 19: must be >= 20, as rescale": lambda: schedules.linear(19, rescale=True),
    "betas = array of shape (0,): must be a vector": lambda: schedules.from_betas(np.ones(0)),
    "betas = array of shape (2, 3): must be": lambda: schedules.from_betas(np.ones((2, 3)) / 9),
    "betas[1] = 1.5: must be in (0, 1]": lambda: schedules.from_betas([0.1, 1.5, 0.2]),
    "betas[2] = 0.0: must be in (0, 1]": lambda: schedules.from_betas(jnp.array([0.1, 1, 0])),
    "betas[0] = nan: must be in (0, 1]": lambda: schedules.from_betas([float("nan"), 0.2]),
    "num_steps = 0: must be a whole number in 1..10": lambda: respace(schedules.cosine(10), 0),
    "num_steps = 11: must be a whole number in 1..10": lambda: respace(schedules.cosine(10), 11),
    "spacing = 'even': unknown spacing": lambda: respace(schedules.cosine(10), 5, "even"),
    "num_timesteps = 1: must be >= 2": lambda: schedules.zero_terminal_snr(schedules.cosine(1)),
    "zero_terminal_snr = True: must be False": lambda: schedules.zero_terminal_snr(
        schedules.from_betas([0.1, 1.0, 0.1])
    ),
    "spacing = 'leading': must be trailing for a single step": lambda: respace(
        schedules.cosine(10), 1, "leading"
    ),
    "spacing = 'quadratic': must be trailing for a single step": lambda: respace(
        schedules.cosine(2), 1, "quadratic"
    ),
    "num_steps = 5: must be a whole number in 1..1": lambda: respace(
        schedules.cosine(1), 5, "karras"
    ),
    "resolution = 0: must be": lambda: schedules.shift_log_snr(schedules.cosine(10), 0, 64),
    "base_resolution = -1: must be": lambda: schedules.shift_log_snr(schedules.cosine(10), 8, -1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_impossible_argument_is_named(message):
    with pytest.raises(ConfigError) as error:
        REFUSED[message]()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "from_betas"])
def test_the_length_is_a_whole_number_of_at_least_one(name):
    for num_timesteps in (0, -1, False):
        with pytest.raises(ConfigError, match=f"^num_timesteps = {num_timesteps}: must be a whole"):
            SCHEDULES[name](num_timesteps)
    without_type_checks = inspect.unwrap(schedules.cosine)
    for num_timesteps in (10.5, 10.0, "10"):
        message = f"^num_timesteps = {num_timesteps!r}: must be a whole"
        with pytest.raises(ConfigError, match=message):
            without_type_checks(num_timesteps)


def test_the_limits_of_arguments_are_allowed():
    assert schedules.linear(20, rescale=True).beta[-1] == 1
    zero_snr = schedules.cosine(10, max_beta=1.0)
    np.testing.assert_allclose(zero_snr.beta[-1], 1, rtol=1e-7)
    assert (zero_snr.alpha_bar[-1], zero_snr.one_minus_alpha_bar[-1]) == (0, 1)
    assert schedules.jsd(10).log_snr[-1] == -np.inf


# --- numbers that are not finite -------------------------------------------------------------

EXTREME = {
    "beta[0] = nan": lambda: schedules.sigmoid(4, start=0.0, end=5e-324),
    "beta[0] = 0.0": lambda: schedules.shift_log_snr(schedules.cosine(10), 1e-30, 1.0),
    "beta[1] = nan": lambda: schedules.from_log_snr(np.array([1.0, np.nan]), np.array([1.0, 2.0])),
}


@pytest.mark.parametrize("message", EXTREME)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_schedule_with_a_column_that_is_not_finite_is_an_error(message):
    with pytest.raises(ConfigError, match=r": the arguments are too extreme$") as error:
        EXTREME[message]()
    assert str(error.value).startswith(f"{message}: must be finite and above 0: ")


@pytest.mark.parametrize("s", [0.0, 1.0, 1e20, 1e100])
def test_a_large_cosine_offset_gives_finite_columns(s):
    """For s to infinity alpha_bar goes to (1 - t/T)^2."""
    schedule = schedules.cosine(10, s=s, max_beta=1.0)
    for column in jax.tree.leaves(schedule):
        assert np.isfinite(column).all()
    if s >= 1e20:
        limit = (1 - np.arange(1, 11) / 10) ** 2
        np.testing.assert_allclose(schedule.alpha_bar, limit, rtol=1e-6, atol=1e-12)


# --- rows by their log SNR ------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [10, 1000, 4000])
def test_rows_at_the_schedules_own_log_snr_are_its_rows(num_timesteps):
    """This holds for plain and traced log SNRs, and for the timestep that the network gets."""
    schedule = schedules.cosine(num_timesteps)
    log_snr = np.log(np.float64(schedule.alpha_bar)) - np.log(
        np.float64(schedule.one_minus_alpha_bar)
    )
    found = schedules.at_log_snr(schedule, log_snr)
    traced = jax.jit(schedules.at_log_snr)(schedule, jnp.float32(log_snr))
    for name in ("timestep", "alpha_bar", "one_minus_alpha_bar", "alpha_bar_prev"):
        for rows, tolerance in ((found, 2e-5), (traced, 5e-5)):
            np.testing.assert_allclose(
                getattr(rows, name), getattr(schedule, name), rtol=tolerance, err_msg=name
            )
    # beta is a difference of two log SNRs, each known to 1e-7 from the float32 columns
    step = np.abs(np.diff(log_snr, prepend=np.inf))
    np.testing.assert_allclose(found.beta, schedule.beta, rtol=1e-5 + 2e-6 / step.min())


def test_a_log_snr_between_two_rows_has_a_timestep_between_theirs():
    schedule = schedules.cosine(100)
    log_snr = np.float64(schedule.log_snr)
    between = 0.25 * log_snr[1:] + 0.75 * log_snr[:-1]
    found = schedules.at_log_snr(schedule, between)
    np.testing.assert_allclose(found.timestep, np.arange(1, 100) + 0.25, rtol=1e-4)
    np.testing.assert_allclose(found.log_snr, between, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log_snr", [[11.0], [-30.0], [0.0, 0.0], [-1.0, 1.0]])
def test_rows_outside_or_out_of_order_are_refused(log_snr):
    with pytest.raises(ConfigError, match="log_snr"):
        schedules.at_log_snr(schedules.cosine(100), np.array(log_snr))


def test_a_chain_from_log_snr_is_exact():
    """In 40 digits, alpha_bar is the sigmoid of log SNR and beta follows from ratios."""
    log_snr = np.linspace(9, -9, 50)
    schedule = schedules.from_log_snr(log_snr, np.arange(1.0, 51.0))
    exact = [1 / (1 + mp.e ** -mpf(float(value))) for value in log_snr]
    beta = [1 - a / b for a, b in zip(exact, [mpf(1), *exact[:-1]])]
    np.testing.assert_allclose(schedule.alpha_bar, np.float64(exact), rtol=1e-7)
    np.testing.assert_allclose(schedule.beta, np.float64(beta), rtol=1e-7)

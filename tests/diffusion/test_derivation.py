"""docs/derivation.md: its functions exist, its identities hold, and its numbers are right."""

import functools
import importlib
import itertools
import pathlib
import pkgutil
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

import diffusion_jax
from diffusion_jax.diffusion import process, schedules

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
TEXT = (REPOSITORY / "docs/derivation.md").read_text()
HEADER = "| Check | Should be | Ours | Misprint |"
MODULES = {
    module.name for module in pkgutil.walk_packages(diffusion_jax.__path__, "diffusion_jax.")
}


# --- the document: names and mathematics ----------------------------------------------------


def dotted_names(text):
    """The names in backticks that have a dot, such as `process.posterior`."""
    return re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`", text)


@pytest.mark.parametrize("name", sorted(set(dotted_names(TEXT))))
def test_named_function_exists(name):
    parts = name.split(".")
    choices = [
        (".".join([folder, *parts[:length]]), parts[length:])
        for folder in ("diffusion_jax.diffusion", "diffusion_jax")
        for length in range(len(parts) - 1, 0, -1)
    ]
    module, attributes = next(choice for choice in choices if choice[0] in MODULES)
    functools.reduce(getattr, attributes, importlib.import_module(module))


def test_every_section_with_an_equation_names_a_function():
    sections = re.split(r"^#{1,3} ", TEXT, flags=re.MULTILINE)
    with_equations = [section for section in sections if "$$" in section]
    assert len(with_equations) >= 12
    assert [s.splitlines()[0] for s in with_equations if not dotted_names(s)] == []


def display_blocks():
    return re.findall(r"\$\$(.*?)\$\$", TEXT, flags=re.DOTALL)


def inline_formulas():
    prose = re.sub(r"\$\$.*?\$\$|`[^`]*`", " ", TEXT, flags=re.DOTALL)
    formulas = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\|)", prose):
        assert paragraph.count("$") % 2 == 0, paragraph
        formulas += paragraph.split("$")[1::2]
    return formulas


def test_display_blocks_stand_alone():
    assert TEXT.count("$$") % 2 == 0
    lines = TEXT.splitlines()
    for number, line in enumerate(lines):
        if "$$" in line:
            assert re.fullmatch(r"\$\$[^$]+\$\$", line), line
            assert lines[number - 1] == lines[number + 1] == "", line


@pytest.mark.parametrize("formula", [*display_blocks(), *inline_formulas()])
def test_formula_is_balanced_and_survives_github(formula):
    depth = list(itertools.accumulate((c == "{") - (c == "}") for c in formula))
    assert min(depth) >= 0
    assert depth[-1] == 0
    assert formula.count(r"\left") == formula.count(r"\right")
    for opening, closing in ["()", "[]"]:
        half_open = r"U[0, 1)" in formula
        assert half_open or formula.count(opening) == formula.count(closing)
    # Markdown would change these before the mathematics is read: emphasis, HTML and escapes;
    # GitHub forbids \operatorname
    assert not re.search(r"[^\w\s]_\w|\*|[<>|]|\\[^A-Za-z]|\\operatorname", formula)


def test_document_is_short():
    assert len(TEXT.splitlines()) <= 400


# --- the tables of misprints ----------------------------------------------------------------


def parse(cell):
    """The value of a cell and the error that its digits allow; under three digits mean exact."""
    digits, _, percent = cell.partition(" ")
    assert percent in ("", "%")
    mantissa, _, exponent = digits.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    value, scale = float(digits), 0.01 if percent else 1.0
    significant = len(mantissa.replace(".", "").lstrip("-0"))
    allowed = 0.501 * unit if significant >= 3 and value != 0 else 1e-5 * abs(value)
    return value * scale, max(allowed * scale, 0.0 if value else 1e-6)


def stated():
    """The tables of misprints in the document: {name of a check: its other cells}."""
    lines = TEXT.partition("\n## Misprints")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    rows = [row for row in rows if row[0] != "Check" and not row[0].startswith("---")]
    assert len({row[0] for row in rows}) == len(rows)
    return {name: cells for name, *cells in rows}


def columns(schedule):
    return jax.tree.map(lambda column: np.asarray(column, np.float64), schedule)


def linear_betas():
    return [mpf("0.0001") + (mpf("0.02") - mpf("0.0001")) * t / 999 for t in range(1000)]


def cosine_f(t, num_timesteps, s):
    return mp.cos((mpf(t) / num_timesteps + mpf(s)) / (1 + mpf(s)) * mp.pi / 2) ** 2


def cosine_betas(num_timesteps, s, rows):
    f = [cosine_f(t, num_timesteps, s) for t in range(rows + 1)]
    return np.array([float(1 - b / a) for a, b in itertools.pairwise(f)])


def posterior_mean_checks():
    schedule = schedules.linear(1000)
    row = columns(schedule)
    one, zero = jnp.ones(1000), jnp.zeros(1000)
    mean = jax.vmap(process.posterior_mean)
    of_x_0, ours = (np.asarray(mean(schedule, *x), np.float64) for x in [(one, zero), (zero, one)])
    misprint = ours * np.sqrt(row.alpha_bar) / np.sqrt(row.alpha)
    i = 499

    # q(x_499 | x_500 = 1, x_0 = 0) on a grid
    x = np.linspace(-6, 6, 200_001)
    step = (1 - np.sqrt(row.alpha[i]) * x) ** 2 / row.beta[i]
    density = np.exp(-(step + x**2 / row.one_minus_alpha_bar_prev[i]) / 2)
    yield (
        "weight of x_t at t = 500, Bayes' rule by quadrature",
        (np.sum(x * density) / np.sum(density), ours[i], misprint[i]),
    )

    alpha_bar_499 = float(mp.fprod(1 - beta for beta in linear_betas()[:499]))
    averaged = [of_x_0[i] + w[i] * np.sqrt(row.alpha_bar[i]) for w in (ours, misprint)]
    yield "weight of x_0 in the mean of x_499, t = 500", (np.sqrt(alpha_bar_499), *averaged)

    def sampled(of_x_t):
        """The variance of samples of N(0, 1) data, where E[x_0 | x_t] = sqrt(alpha_bar) x_t."""
        variance = 1.0
        gain = of_x_0 * np.sqrt(row.alpha_bar) + of_x_t
        for g, added in zip(gain[::-1], row.posterior_variance[::-1]):
            variance = g**2 * variance + added
        return variance

    yield "variance of samples, ancestral, data N(0, 1)", (1.0, sampled(ours), sampled(misprint))


def beta_checks():
    betas = linear_betas()
    alpha_bar = list(itertools.accumulate((1 - beta for beta in betas), lambda a, b: a * b))
    slipped = [value / (value - 1) for value in alpha_bar]
    ours = columns(schedules.respace(schedules.linear(1000), 1000))
    yield "beta_1", (betas[0], ours.beta[0], slipped[0])
    yield "beta_1000", (betas[-1], ours.beta[-1], slipped[-1])
    clipped = [min(1 - value, mpf("0.999")) for value in slipped]
    of_ours = np.sum(ours.beta >= np.float32(0.999))
    of_misprint = sum(beta == mpf("0.999") for beta in clipped)
    yield 'rows clipped at 0.999, with "1 minus"', (0, of_ours, of_misprint)
    after_two = (1 - clipped[0]) * (1 - clipped[1])
    yield (
        'alpha_bar_2, with "1 minus" and clipped',
        (alpha_bar[1], ours.alpha_bar[1], after_two),
    )


def squares_checks():
    row = columns(schedules.linear(1000))
    alpha, beta = row.alpha[-1], row.beta[-1]
    yield (
        "sum of the two, or of their squares, at t = 1000",
        (1.0, alpha + beta, alpha**2 + beta**2),
    )

    def variance(alpha):
        return functools.reduce(lambda v, ab: ab[0] * v + ab[1], zip(alpha, row.beta), 1.0)

    misprint = variance(np.sqrt(1 - row.beta**2))
    yield "variance of x_T, data of variance 1", (1.0, variance(row.alpha), misprint)


def lower_clip_checks():
    ours = {s: columns(schedules.cosine(1000, s)).beta for s in (0.004, 0.008, 0.016)}
    clipped = {s: columns(schedules.cosine(1000, s, min_beta=1e-4)).beta for s in ours}
    exact = {s: cosine_betas(1000, str(s), 1)[0] for s in ours}
    triple = (exact[0.008], ours[0.008][0], clipped[0.008][0])
    yield "beta_1, s = 0.008", triple
    bins = tuple(np.sqrt(beta) * 127.5 for beta in triple)
    yield "sqrt(beta_1) in bins of 1/127.5, s = 0.008", bins
    yield (
        "beta_1 at s = 0.016 over beta_1 at s = 0.004",
        (
            exact[0.016] / exact[0.004],
            ours[0.016][0] / ours[0.004][0],
            clipped[0.016][0] / clipped[0.004][0],
        ),
    )
    for s in (0.0, 0.004, 0.008, 0.016, 0.02):
        beta = cosine_betas(1000, str(s), 999)
        raised = [
            np.sum(columns(schedules.cosine(1000, s, min_beta=low)).beta[:-1] > beta * (1 + 1e-5))
            for low in (0.0, 1e-4)
        ]
        yield f"betas raised, s = {s:g}", (0, *raised)


def stable_diffusion_checks():
    # 14.6146 is sigma_max of Stable Diffusion in k-diffusion and in the documentation of diffusers
    sigma = [float(make(1000).sigma[-1]) for make in (schedules.scaled_linear, schedules.cosine)]
    yield "largest sigma", (14.6146, *sigma)


def float32_cosine_beta_1(num_timesteps, s):
    """beta_1 by the printed formula, where every operation rounds to float32, the cosine too."""
    f32 = np.float32

    def f(t):
        angle = (f32(t) / f32(num_timesteps) + f32(s)) / (f32(1) + f32(s)) * f32(np.pi) / f32(2)
        return f32(float(mp.cos(mpf(float(angle))))) ** 2

    return float(f32(1) - f(1) / f(0))


def float32_checks():
    traced = jax.jit(lambda s: schedules.cosine(4000, s).beta)
    for s in ("0", "0.0001"):
        exact = 1 - cosine_f(1, 4000, s) / cosine_f(0, 4000, s)
        ours = float(traced(jnp.float32(s))[0]) / exact - 1
        throughout = float32_cosine_beta_1(4000, float(s)) / exact - 1
        rounded = float(np.float32(1) - np.float32(float(1 - exact))) / exact - 1
        yield f"error of beta_1, float32 throughout, s = {s}", (0, ours, throughout)
        yield f"error of beta_1, alpha_bar rounded perfectly, s = {s}", (0, ours, rounded)

    ours = jax.jit(lambda s: schedules.cosine(1000, s, max_beta=0.999).alpha)(0.008)[-1]
    misprint = float(np.float32(1) - np.float32(0.999))
    yield (
        "relative error of alpha_T at max_beta = 0.999",
        (0, float(ours) / mpf("0.001") - 1, misprint / mpf("0.001") - 1),
    )

    log = mpf(-40) - mpf(2) ** -19  # halfway between two float32 numbers
    chain = schedules.from_betas(np.full(40, float(-mp.expm1(log / 40))))
    ours = float(chain.alpha_bar[-1]) / mp.exp(log) - 1
    from_log = mp.exp(float(np.float32(float(log)))) / mp.exp(log) - 1
    yield "relative error of alpha_bar near exp(-40), as float32 or as its log", (0, ours, from_log)


@functools.cache
@mp.workdps(40)
def computed():
    groups = (
        posterior_mean_checks(),
        beta_checks(),
        squares_checks(),
        lower_clip_checks(),
        stable_diffusion_checks(),
        float32_checks(),
    )
    return {name: [float(v) for v in values] for name, values in itertools.chain(*groups)}


# The allowed error of our value. By default it is 1e-5 relative, or 1e-7 where the value should be
# 0. The exceptions: the ancestral chain's own loss of variance, a published number with few digits,
# and traced formulas.
TOLERANCES = {
    "variance of samples, ancestral, data N(0, 1)": 0.02,
    "largest sigma": 5e-5,
    "error of beta_1, float32 throughout, s = 0": 1e-6,
    "error of beta_1, float32 throughout, s = 0.0001": 1e-6,
    "error of beta_1, alpha_bar rounded perfectly, s = 0": 1e-6,
    "error of beta_1, alpha_bar rounded perfectly, s = 0.0001": 1e-6,
}


def test_every_check_of_the_document_is_computed():
    assert stated().keys() == computed().keys()
    assert TOLERANCES.keys() <= stated().keys()
    sections = TEXT.partition("\n## Misprints")[2].split("\n### ")[1:]
    assert len(sections) == 6
    assert [section.count(HEADER) for section in sections] == [1] * 6


@pytest.mark.parametrize("name", stated())
def test_document_states_what_is_computed(name):
    for cell, value in zip(stated()[name], computed()[name], strict=True):
        number, allowed = parse(cell)
        assert abs(value - number) <= allowed, f"{name}: the document has {cell}, not {value}"


@pytest.mark.parametrize("name", stated())
def test_ours_passes_and_the_misprint_fails(name):
    should, ours, misprint = computed()[name]
    tolerance = TOLERANCES.get(name, 1e-5 * abs(should) or 1e-7)
    assert abs(ours - should) <= tolerance
    assert abs(misprint - should) > 10 * tolerance


# --- the identities, at random arguments, in 40 digits ---------------------------------------


def close(left, right):
    return mp.almosteq(left, right, rel_eps=mpf(10) ** -32, abs_eps=mpf(10) ** -36)


class Draw:
    """Random arguments: T betas, alpha_bar_0 .. alpha_bar_T, and a timestep t >= 2."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.T = self.random.randint(3, 40)
        self.t = self.random.randint(2, self.T)
        self.beta = [mpf(0)] + [self.uniform(0.001, 0.6) for _ in range(self.T)]  # beta[t]
        self.alpha = [1 - beta for beta in self.beta]
        self.alpha_bar = list(itertools.accumulate(self.alpha, lambda a, b: a * b))

    def uniform(self, low, high):
        return mpf(self.random.uniform(low, high))

    @property
    def row(self):
        """beta, alpha, alpha_bar, alpha_bar_prev and beta tilde at t."""
        t = self.t
        ab, ab_prev = self.alpha_bar[t], self.alpha_bar[t - 1]
        variance = self.beta[t] * (1 - ab_prev) / (1 - ab)
        return self.beta[t], self.alpha[t], ab, ab_prev, variance

    def example(self):
        """x_0, eps and their x_t."""
        x_0, eps = self.uniform(-2, 2), self.uniform(-2, 2)
        ab = self.alpha_bar[self.t]
        return x_0, eps, mp.sqrt(ab) * x_0 + mp.sqrt(1 - ab) * eps

    def mean(self, x_0, x_t):
        beta, alpha, ab, ab_prev, _ = self.row
        x_0_part = mp.sqrt(ab_prev) * beta / (1 - ab) * x_0
        return x_0_part + mp.sqrt(alpha) * (1 - ab_prev) / (1 - ab) * x_t


def noise_telescopes(d):
    terms = (d.beta[u] * mp.fprod(d.alpha[u + 1 : d.t + 1]) for u in range(1, d.t + 1))
    yield mp.fsum(terms), 1 - d.alpha_bar[d.t]


def running_logarithms(d):
    total = mp.fsum(mp.log1p(-beta) for beta in d.beta[: d.t + 1])
    yield mp.exp(total), d.alpha_bar[d.t]
    yield -mp.expm1(total), 1 - d.alpha_bar[d.t]


def jsd_telescopes(d):
    product = mp.fprod(1 - mpf(1) / (d.T - t + 1) for t in range(1, d.t + 1))
    yield product, mpf(d.T - d.t) / d.T


def cosine(d):
    s = d.uniform(0, 0.1)
    step = mp.pi / (2 * d.T * (1 + s))
    theta = [(t + d.T * s) * step for t in range(d.T + 1)]
    phi = [(d.T - t) * step for t in range(d.T + 1)]
    t, f = d.t, [cosine_f(t, d.T, s) for t in range(d.T + 1)]
    yield mp.cos(theta[t]) ** 2, f[t]
    yield mp.cos(theta[t]), mp.sin(phi[t])
    yield mp.sin(theta[t] + theta[t - 1]), mp.sin(phi[t] + phi[t - 1])
    a, b = d.uniform(0, 2), d.uniform(0, 2)
    yield mp.cos(a) ** 2 - mp.cos(b) ** 2, mp.sin(b + a) * mp.sin(b - a)
    beta = mp.sin(theta[t] + theta[t - 1]) * mp.sin(step) / mp.cos(theta[t - 1]) ** 2
    yield beta, 1 - f[t] / f[t - 1]
    one_minus = mp.sin(theta[t] + theta[0]) * mp.sin(t * step) / mp.cos(theta[0]) ** 2
    yield one_minus, 1 - f[t] / f[0]


def sigmoid(d):
    def logistic(x):
        return 1 / (1 + mp.exp(-x))

    start, end, tau = d.uniform(-4, 0), d.uniform(0.5, 4), d.uniform(0.3, 2)
    a = [(start + (end - start) * t / d.T) / tau / 2 for t in range(d.T + 1)]
    s, h, t, T = [logistic(2 * value) for value in a], (end - start) / (2 * d.T * tau), d.t, d.T
    yield a[t] - a[t - 1], h
    p, q = d.uniform(-3, 3), d.uniform(-3, 3)
    product = mp.sinh(p - q) / (2 * mp.cosh(p) * mp.cosh(q))
    yield logistic(2 * p) - logistic(2 * q), product
    alpha_bar = [(s[-1] - value) / (s[-1] - s[0]) for value in s]
    cosh, whole = [mp.cosh(value) for value in a], mp.sinh(T * h)
    yield alpha_bar[t], mp.sinh((T - t) * h) * cosh[0] / (whole * cosh[t])
    yield 1 - alpha_bar[t], mp.sinh(t * h) * cosh[-1] / (whole * cosh[t])
    beta = mp.sinh(h) * cosh[-1] / (cosh[t] * mp.sinh((T - t + 1) * h))
    yield 1 - alpha_bar[t] / alpha_bar[t - 1], beta


def clipping(d):
    last_exact = d.random.randint(0, d.t - 1)
    product, base = mp.fprod(d.alpha[last_exact + 1 : d.t + 1]), d.alpha_bar[last_exact]
    yield base * product, d.alpha_bar[d.t]
    yield (1 - base) * product + (1 - product), 1 - d.alpha_bar[d.t]
    yield (1 - d.alpha_bar[d.t - 1]) * d.alpha[d.t] + d.beta[d.t], 1 - d.alpha_bar[d.t]


def zero_terminal_snr(d):
    t, T, r = d.t, d.T, [mp.sqrt(value) for value in d.alpha_bar]
    lost = [mpf(0)]
    lost += [r[u - 1] * d.beta[u] / (1 + mp.sqrt(d.alpha[u])) for u in range(1, T + 1)]
    left = [mp.fsum(lost[u + 1 :]) for u in range(T + 1)]
    yield lost[t], r[t - 1] - r[t]
    yield left[t], r[t] - r[T]
    new = [r[1] * (value - r[T]) / (r[1] - r[T]) for value in r]
    yield new[t], r[1] / left[1] * left[t]
    yield new[1], r[1]
    beta = lost[t] / left[t - 1] * (1 + left[t] / left[t - 1])
    yield beta, 1 - new[t] ** 2 / new[t - 1] ** 2
    one_minus = (1 - d.alpha_bar[1]) / (1 + r[1]) + r[1] / left[1] * mp.fsum(lost[2 : t + 1])
    yield one_minus, 1 - new[t]


def log_snr_shift(d):
    c, t = d.uniform(0.05, 5) ** 2, d.t
    total = [c * value + 1 - value for value in d.alpha_bar]
    new = [c * value / total for value, total in zip(d.alpha_bar, total)]
    snr = d.alpha_bar[t] / (1 - d.alpha_bar[t])
    yield new[t] / (1 - new[t]), c * snr
    yield 1 - new[t], (1 - d.alpha_bar[t]) / total[t]
    yield new[t] / new[t - 1], d.alpha[t] * total[t - 1] / total[t]
    yield 1 - new[t] / new[t - 1], d.beta[t] / total[t]


def respacing(d):
    before = d.random.randint(0, d.t - 1)
    jump = mp.fsum(mp.log1p(-beta) for beta in d.beta[before + 1 : d.t + 1])
    yield -mp.expm1(jump), 1 - d.alpha_bar[d.t] / d.alpha_bar[before]


def posterior(d):
    beta, alpha, ab, ab_prev, variance = d.row
    x_0, x_t, x = (d.uniform(-2, 2) for _ in range(3))
    yield alpha * (1 - ab_prev) + beta, 1 - ab
    yield 1 / variance, alpha / beta + 1 / (1 - ab_prev)
    weighted = mp.sqrt(alpha) / beta * x_t + mp.sqrt(ab_prev) / (1 - ab_prev) * x_0
    yield d.mean(x_0, x_t), variance * weighted
    likelihood = mp.npdf(x_t, mp.sqrt(alpha) * x, mp.sqrt(beta))
    prior = mp.npdf(x, mp.sqrt(ab_prev) * x_0, mp.sqrt(1 - ab_prev))
    evidence = mp.npdf(x_t, mp.sqrt(ab) * x_0, mp.sqrt(1 - ab))
    yield mp.npdf(x, d.mean(x_0, x_t), mp.sqrt(variance)), likelihood * prior / evidence


def predictions(d):
    beta, alpha, ab, _, _ = d.row
    x_0, eps, x_t = d.example()
    signal, noise = mp.sqrt(ab), mp.sqrt(1 - ab)
    v = signal * eps - noise * x_0
    yield (x_t - noise * eps) / signal, x_0
    yield (x_t - signal * x_0) / noise, eps
    yield signal * x_t - noise * v, x_0
    yield noise * x_t + signal * v, eps
    mu = d.mean(x_0, x_t)
    yield (mu - d.mean(0, x_t)) / d.mean(1, 0), x_0
    yield (x_t - beta / noise * eps) / mp.sqrt(alpha), mu
    score = mp.diff(lambda x: -((x - signal * x_0) ** 2) / (2 * noise**2), x_t)
    # The derivative is numerical, so half of the digits are right
    yield mp.nint(score * 10**15), mp.nint(-eps / noise * 10**15)


def weights_of_the_kl(d):
    beta, alpha, ab, ab_prev, variance = d.row
    x_0, eps, x_t = d.example()
    sigma2, wrong = d.uniform(0.01, 1), x_0 + d.uniform(0.1, 1)
    signal, noise = mp.sqrt(ab), mp.sqrt(1 - ab)
    wrong_eps = (x_t - signal * wrong) / noise
    error_v = signal * (wrong_eps - eps) - noise * (wrong - x_0)
    kl = (d.mean(wrong, x_t) - d.mean(x_0, x_t)) ** 2 / (2 * sigma2)
    of_x_0 = ab_prev * beta**2 / (2 * sigma2 * (1 - ab) ** 2)
    yield of_x_0 * (wrong - x_0) ** 2, kl
    yield beta**2 / (2 * sigma2 * alpha * (1 - ab)) * (wrong_eps - eps) ** 2, kl
    yield ab_prev * beta**2 / (2 * sigma2 * (1 - ab)) * error_v**2, kl
    yield beta**2 / (2 * sigma2 * alpha) * ((wrong_eps - eps) / noise) ** 2, kl
    snr, snr_prev = ab / (1 - ab), ab_prev / (1 - ab_prev)
    yield of_x_0 * sigma2 / variance, (snr_prev - snr) / 2


def ddim(d):
    beta, alpha, ab, ab_prev, variance = d.row
    eta = d.uniform(0, 1)
    share = alpha * (1 - ab_prev) / (1 - ab)
    yield beta / (1 - ab), 1 - share
    yield 1 - ab_prev - eta**2 * variance, (1 - ab_prev) * (1 - eta**2 + eta**2 * share)
    at_one = alpha * (1 - ab_prev) ** 2 / (1 - ab)
    yield 1 - ab_prev - variance, at_one
    x_0, eps, x_t = d.example()
    yield mp.sqrt(ab_prev) * x_0 + mp.sqrt(at_one) * eps, d.mean(x_0, x_t)


def averaged_weights(d):
    share = mp.fprod(mpf(1 + n) / (10 + n) for n in range(d.T))
    yield share, 1 / mp.binomial(d.T + 9, 9)


IDENTITIES = [
    noise_telescopes,
    running_logarithms,
    jsd_telescopes,
    cosine,
    sigmoid,
    clipping,
    zero_terminal_snr,
    log_snr_shift,
    respacing,
    posterior,
    predictions,
    weights_of_the_kl,
    ddim,
    averaged_weights,
]


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda identity: identity.__name__)
def test_identity(identity):
    with mp.workdps(40):
        for seed in range(20):
            for number, (left, right) in enumerate(identity(Draw(seed))):
                assert close(left, right), f"{number}, seed {seed}: {left} is not {right}"


def test_numbers_of_the_averaged_weights():
    # (1 + n) / (10 + n) reaches d at n = (10 d - 1) / (1 - d)
    decay = mpf("0.9999")
    assert f"$n = {int((10 * decay - 1) / (1 - decay)):,}$".replace(",", "{,}") in TEXT
    assert f"{float(decay**2000):.0%} after 2,000".replace("%", " %") in TEXT

"""A second implementation of every sampler, from the formulas of the papers, in float64 numpy.

A chain is a list of noise levels (nodes), from that of x_T to that of x_0. All arrays broadcast, so
one call runs many chains of the same number of steps. The data are Gaussian: their denoiser is
known in closed form.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EDM = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "noise": 1.003}
SNR = 0.16  # the argument of predictor_corrector
SAME = 5e-6  # two lambdas closer than this may be the same number before rounding to float32


class Node(NamedTuple):
    """A noise level: x_t = signal x_0 + noise eps; ``half_log_snr`` is lambda."""

    signal: np.ndarray
    noise: np.ndarray
    half_log_snr: np.ndarray

    @property
    def sigma(self):
        return self.noise / self.signal


def node_at(half_log_snr):
    signal2 = 1 / (1 + np.exp(-2 * half_log_snr))
    noise2 = 1 / (1 + np.exp(2 * half_log_snr))
    return Node(np.sqrt(signal2), np.sqrt(noise2), half_log_snr)


class Problem(NamedTuple):
    """Data N(mean, variance), the normal draws of a step, and the rounding of each value."""

    mean: float
    variance: float
    lowest: np.ndarray  # lambda at T of the schedule before respacing
    noise: tuple[np.ndarray, ...]  # drawn with the keys of a step, then with their draws 0 and 1
    rounded: Callable[[np.ndarray], np.ndarray]

    def predict(self, node, x):
        """E[x_0 | x_t] and E[eps | x_t]."""
        total = node.signal**2 * self.variance + node.noise**2
        centred = (x - node.signal * self.mean) / total
        x_0 = self.mean + node.signal * self.variance * centred
        return self.rounded(x_0), self.rounded(node.noise * centred)

    def width(self, node, following):
        return self.rounded(following.half_log_snr - node.half_log_snr)


def ddim_of(x_0, eps, following):
    return following.signal * x_0 + following.noise * eps


def is_last(following):
    return np.all(following.noise == 0)


def of_beta(node, following):
    """beta / (1 - alpha_bar) = 1 - exp(-2 h), h the width of the step (Kingma et al. 2021, VDM)."""
    return -np.expm1(2 * (node.half_log_snr - following.half_log_snr))


# --- one evaluation per step ------------------------------------------------------------------


def ddim(problem, nodes, x, eta=0.0):
    """DDIM eqs. 12 and 16."""
    for node, following in itertools.pairwise(nodes):
        x_0, eps = problem.predict(node, x)
        drop = of_beta(node, following)
        sigma = eta * following.noise * np.sqrt(drop)
        direction = following.noise * np.sqrt(1 - eta**2 * drop)
        x = following.signal * x_0 + direction * eps + sigma * problem.noise[0]
        x = problem.rounded(x)
    return x


def euler_ancestral(problem, nodes, x):
    return ddim(problem, nodes, x, eta=1.0)


def ancestral_step(problem, node, following, x, z):
    """DDPM eq. 7 with the variance beta~, which is 0 in the step to x_0."""
    x_0, _ = problem.predict(node, x)
    drop = of_beta(node, following)
    mean = following.signal * drop * x_0
    mean = mean + node.signal / following.signal * (following.noise / node.noise) ** 2 * x
    return mean + np.sqrt(drop) * following.noise * z


def ancestral(problem, nodes, x):
    for node, following in itertools.pairwise(nodes):
        x = problem.rounded(ancestral_step(problem, node, following, x, problem.noise[0]))
    return x


def predictor_corrector(problem, nodes, x):
    """Song et al. 2021, algorithm 5. Draw 0 is the predictor's noise, draw 1 the corrector's."""
    _, of_predictor, of_corrector = problem.noise
    for node, following in itertools.pairwise(nodes):
        _, eps = problem.predict(node, x)
        size = 2 * (node.signal / following.signal) ** 2 * SNR**2 * node.noise**2
        x = problem.rounded(x - size * eps / node.noise + np.sqrt(2 * size) * of_corrector)
        x = problem.rounded(ancestral_step(problem, node, following, x, of_predictor))
    return x


# --- two evaluations per step ------------------------------------------------------------------


def heun_step(problem, node, following, x):
    """EDM algorithm 1, in y = x / signal."""
    x_0, eps = problem.predict(node, x)
    euler = problem.rounded(ddim_of(x_0, eps, following))
    if is_last(following):
        return euler
    _, slope = problem.predict(following, euler)
    y = x / node.signal + (following.sigma - node.sigma) * (eps + slope) / 2
    return problem.rounded(following.signal * y)


def heun(problem, nodes, x):
    for node, following in itertools.pairwise(nodes):
        x = heun_step(problem, node, following, x)
    return x


def edm(problem, nodes, x):
    """EDM algorithm 2, with sigma raised at most to its value at T."""
    gamma = min(EDM["churn"] / (len(nodes) - 1), np.sqrt(2) - 1)
    for node, following in itertools.pairwise(nodes):
        inside = (node.sigma >= EDM["churn_min"]) & (node.sigma <= EDM["churn_max"])
        room = node.half_log_snr - problem.lowest
        inside &= room > SAME
        raised = node_at(node.half_log_snr - np.where(inside, np.minimum(np.log1p(gamma), room), 0))
        added = np.sqrt(np.where(inside, raised.sigma**2 - node.sigma**2, 0))
        y = x / node.signal + EDM["noise"] * added * problem.noise[0]
        x = heun_step(problem, raised, following, problem.rounded(raised.signal * y))
    return x


def dpmpp_2s(problem, nodes, x):
    """DPM-Solver++ algorithm 1, r = 1/2."""
    for node, following in itertools.pairwise(nodes):
        x_0, _ = problem.predict(node, x)
        if is_last(following):
            return x_0
        h = problem.width(node, following)
        middle = node_at(node.half_log_snr + h / 2)
        half = middle.noise / node.noise * x - middle.signal * np.expm1(-h / 2) * x_0
        x_0, _ = problem.predict(middle, problem.rounded(half))
        x = following.noise / node.noise * x - following.signal * np.expm1(-h) * x_0
        x = problem.rounded(x)
    return x


# --- multistep methods -------------------------------------------------------------------------


def exponential(problem, node, following, x, x_0, h, polynomial):
    """Solve the probability flow for an x_0 that is a polynomial in tau = lambda - lambda_t.

    x' = s'/s x + a' int_0^h exp(tau - h) (c_0 + c_1 tau + c_2 tau^2) dtau. Where h is infinite, the
    step is DDIM's.
    """
    c_1, c_2 = polynomial
    finite = np.isfinite(h)
    h = np.where(finite, h, 1.0)
    i_0 = -np.expm1(-h)
    i_1 = h - i_0
    i_2 = h**2 - 2 * i_1
    integral = i_0 * x_0 + i_1 * c_1 + i_2 * c_2
    exact = following.noise / node.noise * x + following.signal * integral
    _, eps = problem.predict(node, x)
    return problem.rounded(np.where(finite, exact, ddim_of(x_0, eps, following)))


def newton(values, h_1, h_2):
    """The coefficients c_1 and c_2 of the parabola through three values at 0, -h_1, -h_1 - h_2.

    A value at an infinite distance has no effect.
    """
    slope_1, slope_2 = (values[0] - values[1]) / h_1, (values[1] - values[2]) / h_2
    second = (slope_1 - slope_2) / (h_1 + h_2)
    return slope_1 + second * np.where(np.isfinite(h_1), h_1, 0), second


def multistep(problem, nodes, x, order, eta=0.0):
    values, widths = [np.zeros_like(x)] * 3, [np.full_like(x, np.inf)] * 2
    for node, following in itertools.pairwise(nodes):
        x_0, eps = problem.predict(node, x)
        values, h = [x_0, *values[:2]], problem.width(node, following)
        if order == 3:
            x = exponential(problem, node, following, x, x_0, h, newton(values, *widths))
        else:  # DPM-Solver++ algorithm 2: a line gives x_0 at the middle of the step
            finite = np.isfinite(h)
            step = np.where(finite, h, 1.0)
            slope = (values[0] - values[1]) / widths[0]
            middle = np.where(finite, x_0 + step / 2 * slope, x_0)
            total = np.where(finite, step * (1 + eta), np.inf)
            lost = np.where(finite, step * eta, np.inf if eta else 0.0)
            of_x = following.noise * np.exp(-lost)
            added = following.noise * np.sqrt(-np.expm1(-2 * lost))
            # s'/s e^(-eta h) x + ..., with a x_0 + s eps written for x
            x = of_x * eps + following.signal * (x_0 - np.expm1(-total) * (middle - x_0))
            x = problem.rounded(x + added * problem.noise[0])
        widths = [h, widths[0]]
    return x


def dpmpp_2m(problem, nodes, x):
    return multistep(problem, nodes, x, order=2)


def dpmpp_2m_sde(problem, nodes, x):
    return multistep(problem, nodes, x, order=2, eta=1.0)


def dpmpp_3m(problem, nodes, x):
    return multistep(problem, nodes, x, order=3)


def unipc(problem, nodes, x):
    """UniPC-2: the predictor fits a line, the corrector a parabola through the newest value too."""
    values, widths = [np.zeros_like(x)] * 2, [np.full_like(x, np.inf)] * 2
    corrected, before = x, None
    for node, following in itertools.pairwise(nodes):
        x_0, _ = problem.predict(node, x)
        h, h_before = widths
        if before is not None:
            rise = (x_0 - values[0]) / h
            second = (rise - (values[0] - values[1]) / h_before) / (h + h_before)
            # x_0 = value + rise tau + second tau (tau - h)
            bend = rise - second * np.where(np.isfinite(h), h, 0), second
            better = exponential(problem, before, node, corrected, values[0], h, bend)
            corrected = np.where(np.isfinite(h), better, x)
        h_next = problem.width(node, following)
        slope = (x_0 - values[0]) / h
        eps = (corrected - node.signal * x_0) / node.noise
        finite = np.isfinite(h_next)
        step = np.where(finite, h_next, 1.0)
        i_1 = step + np.expm1(-step)
        bent = np.where(finite, following.signal * i_1 * slope, 0)
        x = problem.rounded(ddim_of(x_0, eps, following) + bent)
        values, widths, before = [x_0, values[0]], [h_next, h], node
    return x


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55, -59, 37, -9))
ADAMS_BASHFORTH = (*ADAMS_BASHFORTH[:3], tuple(weight / 24 for weight in ADAMS_BASHFORTH[3]))


def linear_multistep(problem, nodes, x, num_starting, start):
    """PNDM eqs. 9 to 12 in y = x / signal: y' = y + (sigma' - sigma) e."""
    history = []
    for number, (node, following) in enumerate(itertools.pairwise(nodes)):
        x_0, eps = problem.predict(node, x)
        history = [eps, *history[:3]]
        euler = ddim_of(x_0, eps, following)

        def along(eps_of_step, target, node=node, x=x):
            y = x / node.signal + (target.sigma - node.sigma) * eps_of_step
            return problem.rounded(target.signal * y)

        if number < num_starting and not is_last(following):
            combined = start(problem, node, following, eps, along)
        else:
            combined = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(history) - 1], history))
        # y loses digits in a step from a large sigma to 0; Euler plus a correction loses none
        change = following.signal * (following.sigma - node.sigma) * (combined - eps)
        x = problem.rounded(euler + change)
    return x


def improved_euler(problem, node, following, eps, along):
    _, end = problem.predict(following, along(eps, following))
    return (eps + end) / 2


def runge_kutta(problem, node, following, eps, along):
    middle = node_at((node.half_log_snr + following.half_log_snr) / 2)
    _, second = problem.predict(middle, along(eps, middle))
    _, third = problem.predict(middle, along(second, middle))
    _, fourth = problem.predict(following, along(third, following))
    return (eps + 2 * second + 2 * third + fourth) / 6


def plms(problem, nodes, x):
    return linear_multistep(problem, nodes, x, 1, improved_euler)


def pndm(problem, nodes, x):
    return linear_multistep(problem, nodes, x, 3, runge_kutta)


SOLVERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": ddim,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "edm": edm,
    "dpmpp_1s": ddim,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "plms": plms,
    "pndm": pndm,
    "predictor_corrector": predictor_corrector,
}

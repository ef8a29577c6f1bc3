"""A bound on the rounding error of float32 sums of products, on any processor."""

import numpy as np

UNIT = 2.0**-24  # the unit roundoff of float32


def rounding(num_terms, squares):
    """A bound on the rounding error of sums of ``num_terms`` products, added in any order.

    The products have random signs; ``squares`` holds the sums of their squares. A partial sum is
    z sqrt(squares). n roundings, each of at most UNIT of a partial sum, add up to an error of
    w sqrt(n) UNIT of it. z is no wider than a standard normal variable because the signs are
    random, and w because rounding errors have mean zero (Higham 2002, Accuracy and Stability of
    Numerical Algorithms, section 2.8; Higham & Mary 2020, Sharper probabilistic backward error
    analysis for basic linear algebra kernels with random data). |zw| exceeds 32 with a probability
    of exp(-32), 1e-14.

    A fast form of a convolution rounds each product 16 times more. It takes differences of inputs
    and sums of weights, so its sum of squares is 25/9 times as large over an image, and up to 4
    times in one pixel. A million sums of a thousand products of normal variables each, added one
    after another, reach a sixteenth of this bound.
    """
    return 32 * np.sqrt(num_terms + 16) * UNIT * np.sqrt(4 * np.max(squares))

"""How far float32 sums of products may be from the exact ones, on any processor."""

import numpy as np

UNIT = 2.0**-24  # the unit roundoff of float32


def rounding(num_terms, squares):
    """The error that sums of products of random signs may have, in any order.

    A partial sum is z sqrt(sum of the squared products), and n roundings of at most UNIT of one
    add up to w sqrt(n) UNIT of it: z is no wider than a normal variable for random signs, and w
    for rounding errors of mean zero (Higham 2002, Accuracy and Stability of Numerical Algorithms,
    section 2.8; Higham & Mary 2020, Sharper probabilistic backward error analysis for basic linear
    algebra kernels with random data). |zw| > 32 has a probability of exp(-32), 1e-14.
    The fast forms of a convolution have 16 more roundings on the way of a product and, as each
    takes differences of inputs and sums of weights, a sum of squares 25/9 times as large in an
    image and up to 4 times in one pixel. Products of normal variables summed one after another,
    a thousand for each of a million sums, come to a sixteenth of it.
    """
    return 32 * np.sqrt(num_terms + 16) * UNIT * np.sqrt(4 * np.max(squares))

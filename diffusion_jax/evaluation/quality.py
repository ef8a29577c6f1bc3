"""How close generated images are to real ones, in the eyes of a classifier of the same data set.

Sets of images are compared through the features of a small classifier that was trained on the
set itself, by a Fréchet or a kernel distance. These are the formulas of FID and KID with other
features: the numbers compare samplers and models of one data set under one classifier, and are
not to be put beside FIDs or KIDs. Every number has a confidence interval, and two arms that
began with the same noise are compared in pairs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

CONFIDENT = 0.9  # a probability


class ClassBalance(NamedTuple):
    """Whether images are plainly of one class, and whether all classes occur."""

    confident: float  # the share of images of which one class has a probability of 0.9 or more
    entropy: float  # of the histogram of the likeliest classes, in bits; at most log2(classes)


def class_balance(probabilities: Float[np.ndarray, "n classes"]) -> ClassBalance:
    """The share of confident images and the entropy of the classes that they are taken for.

    To be read beside the same of real images: many doubtful images are blurs or mixtures, and an
    entropy below the real one says that classes are missing.
    """
    share = np.bincount(probabilities.argmax(axis=1)) / len(probabilities)
    share = share[share > 0]
    confident = np.mean(probabilities.max(axis=1) >= CONFIDENT)
    return ClassBalance(float(confident), float(-(share * np.log2(share)).sum()))

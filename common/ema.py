"""The average of the weights (EMA)."""

import numpy as np


def gamma_of(sigma_rel):
    """The exponent gamma of the power-function average whose relative width is sigma_rel.

    After step k = 1, 2, ... the average moves by 1 - (1 - 1/k)^(gamma+1) towards the weights, so
    that the weights of step j contribute in proportion to j^gamma. gamma is the largest root of
    sigma_rel^2 (gamma+2)^2 (gamma+3) = gamma+1 (EDM2, Karras et al. 2024).
    """
    variance = sigma_rel ** -2
    return max(np.roots([1, 7, 16 - variance, 12 - variance]).real)

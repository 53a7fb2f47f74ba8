"""The activations that GPT-2's relatives have in place of its own GELU, by Hugging Face's names for them."""

import math

import numpy as np

from fast.arrays import elementwise

# Abramowitz & Stegun 1964, 7.1.26: erfc(z) = t (a_1 + a_2 t + ...) exp(-z^2) with t = 1 / (1 + p z), z >= 0, within
# 1.5e-7. NumPy has no erf.
ERFC_P, ERFC_A = 0.3275911, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


@elementwise
def gelu_erf(x):  # [...] -> [...]
    """x Phi(x), the exact form of Hendrycks & Gimpel 2016, as relu(x) - |x| / 2 erfc(|x| / sqrt(2))."""
    size = np.abs(x)
    t = 1 / (1 + size * (ERFC_P / math.sqrt(2)))
    series = t * ERFC_A[-1]
    for a in ERFC_A[-2::-1]:
        series += a
        series *= t
    return np.maximum(x, 0) - size * series * np.exp(x * x * -0.5) * 0.5


@elementwise
def relu(x):  # [...] -> [...]
    return np.maximum(x, 0)


@elementwise
def silu(x):  # [...] -> [...], x times the logistic function of x (Elfwing et al. 2017)
    return x / (1 + np.exp(-x))


ACTIVATIONS = {"gelu": gelu_erf, "relu": relu, "silu": silu}

"""Numbers of the subspace-inference paper on UCI regression.

Source: Izmailov et al., "Subspace Inference for Bayesian Deep Learning" (UAI 2019), supplement: tables 2 to 4 (small
sets; log-likelihood in original units) and 5 to 7 (large sets; log-likelihood of normalised targets). Mean and standard
deviation over splits, coverage of the 95 % interval without one. The released code normalised with the test rows
included, and drew SWAG's diagonal with the variance in place of the standard deviation; the sampler for PCA+ESS had a
prior of another width than the one for PCA+VI.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Level(NamedTuple):
    """Mean over splits, and standard deviation where one was printed."""

    mean: float
    std: float | None = None


COLUMNS = ("SGD", "PCA+ESS", "PCA+VI", "SWAG")
SMALL = ("boston", "concrete", "energy", "naval", "yacht")  # their log-likelihood is in original units


def _row(*values: tuple[float, float | None]) -> Mapping[str, Level]:
    return {method: Level(*value) for method, value in zip(COLUMNS, values, strict=True)}


def _plain(*values: float) -> Mapping[str, Level]:
    return _row(*((value, None) for value in values))


LOG_LIKELIHOOD: Mapping[str, Mapping[str, Level]] = {
    "boston": _row((-2.752, 0.132), (-2.719, 0.132), (-2.716, 0.133), (-2.761, 0.132)),
    "concrete": _row((-3.178, 0.198), (-3.007, 0.086), (-2.994, 0.095), (-3.013, 0.086)),
    "energy": _row((-1.736, 1.613), (-1.563, 1.243), (-1.715, 1.588), (-1.679, 1.488)),
    "naval": _row((6.567, 0.185), (6.541, 0.095), (6.708, 0.105), (6.708, 0.105)),
    "yacht": _row((-0.418, 0.426), (-0.225, 0.400), (-0.396, 0.419), (-0.404, 0.418)),
    "elevators": _row((-0.538, 0.108), (-0.397, 0.05), (-0.380, 0.041), (-0.395, 0.030)),
    "keggdirected": _row((0.985, 0.022), (0.995, 0.104), (0.988, 0.106), (0.984, 0.114)),
    "keggundirected": _row((0.700, 0.046), (0.707, 0.032), (0.702, 0.043), (0.707, 0.038)),
    "protein": _row((-0.861, 0.027), (-0.834, 0.021), (-0.849, 0.025), (-0.861, 0.031)),
    "skillcraft": _row((-1.147, 0.035), (-1.159, 0.034), (-1.109, 0.036), (-1.181, 0.032)),
    "pol": _row((1.290, 0.183), (1.737, 0.043), (1.728, 0.076), (1.680, 0.075)),
}

RMSE: Mapping[str, Mapping[str, Level]] = {
    "boston": _row((3.504, 0.975), (3.453, 0.953), (3.457, 0.951), (3.517, 0.981)),
    "concrete": _row((5.194, 0.446), (5.194, 0.448), (5.142, 0.418), (5.233, 0.417)),
    "energy": _row((1.602, 0.275), (1.598, None), (1.587, None), (1.594, None)),
    "naval": _plain(0.001, 0.001, 0.001, 0.001),
    "yacht": _row((0.973, 0.374), (0.972, None), (0.973, None), (0.973, None)),
    "elevators": _row((0.092, 0.003), (0.093, 0.004), (0.090, 0.002), (0.090, 0.002)),
    "keggdirected": _row((0.121, 0.003), (0.137, 0.031), (0.137, 0.032), (0.138, 0.032)),
    "keggundirected": _row((0.125, 0.024), (0.125, 0.023), (0.125, None), (0.125, None)),
    "protein": _row((0.443, 0.009), (0.440, 0.007), (0.444, 0.009), (0.447, 0.011)),
    "skillcraft": _row((0.284, 0.015), (0.286, 0.016), (0.276, 0.015), (0.298, 0.015)),
    "pol": _row((3.018, 0.310), (2.446, 0.151), (2.427, 0.161), (2.452, 0.156)),
}

COVERAGE: Mapping[str, Mapping[str, Level]] = {
    "boston": _plain(0.986, 0.985, 0.984, 0.986),
    "concrete": _plain(0.864, 0.941, 0.934, 0.933),
    "energy": _plain(0.947, 0.953, 0.949, 0.951),
    "naval": _plain(0.948, 0.978, 0.967, 0.967),
    "yacht": _plain(0.895, 0.948, 0.898, 0.898),
    "elevators": _plain(0.857, 0.947, 0.968, 0.904),
    "keggdirected": _plain(0.965, 0.962, 0.961, 0.961),
    "keggundirected": _plain(0.962, 0.965, 0.962, 0.965),
    "protein": _plain(0.917, 0.928, 0.926, 0.924),
    "skillcraft": _plain(0.979, 0.980, 0.976, 0.978),
    "pol": _plain(0.941, 0.965, 0.952, 0.947),
}

"""Dense float64 oracles and the comparison that every numerical test uses.

Tolerance policy: ``rtol = C[dtype] * cond``, and a tolerance of 0.1 or more is an error, since it would pass a wrong
answer. The oracle is built from the inputs as they are after rounding to their dtype.
"""

import mpmath
import torch
from torch import Tensor

C = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def dense(root: Tensor, diag: Tensor, mix: Tensor | float = 1.0) -> Tensor:
    """Return diag(diag) + (root mix)(root mix)' in float64."""
    mix = torch.as_tensor(mix, dtype=torch.float64)
    mixed = root.double() * mix if mix.ndim == 0 else root.double() @ mix
    return torch.diag_embed(diag.double()) + mixed @ mixed.mT


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64, cond: float = 1.0) -> None:
    """Assert agreement with a float64 oracle to the precision of ``dtype`` times a condition number."""
    assert expected.dtype == torch.float64, "the oracle must be float64"
    rtol = C[dtype] * max(cond, 1.0)
    assert rtol < 0.1, f"rtol {rtol:.1e} would pass a wrong result; lower cond or raise dtype"
    atol = rtol * (expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def exact_gaussian(root: Tensor, diag: Tensor, x: Tensor, digits: int = 80) -> tuple[float, float]:
    """Return log|S| and x' S^-1 x of S = diag + root root' in ``digits`` decimals: for ill-conditioned matrices."""
    with mpmath.workdps(digits):
        rows = [[mpmath.mpf(v) for v in row] for row in root.double().tolist()]
        matrix = mpmath.matrix(len(rows), len(rows))
        for i, left in enumerate(rows):
            for j, right in enumerate(rows):
                matrix[i, j] = mpmath.fsum(a * b for a, b in zip(left, right, strict=True))
        for i, value in enumerate(diag.double().tolist()):
            matrix[i, i] += mpmath.mpf(value)
        cholesky = mpmath.cholesky(matrix)
        vector = mpmath.matrix([mpmath.mpf(v) for v in x.double().tolist()])
        solution = mpmath.lu_solve(matrix, vector)
        logdet = 2 * mpmath.fsum(mpmath.log(cholesky[i, i]) for i in range(len(rows)))
        return float(logdet), float(mpmath.fsum(v * w for v, w in zip(vector, solution, strict=True)))

"""The low-rank matrix that makes up best for an error in a weight, on the inputs that the weight really has."""

import torch

from methods.adapter import Pair

DAMPING = 1e-4  # of the mean square of an input: those that do not occur are worth a little
ITERATIONS, MORE = 8, 8  # of errors without structure, which converge slowest, 0.3 % more is left than the least


def closest(error: torch.Tensor, hessian: torch.Tensor, *, rank: int) -> Pair:
    """A `[rank, in]` and B `[out, rank]`, fp32, for which `|(error - B A) X|` is all but smallest (arXiv:2410.06040).

    B A is the error within the `rank` directions of the output in which it is largest: `B B^T error`, where B are the
    first eigenvectors of `error X X^T error^T`. They are found by subspace iteration (arXiv:0909.4061): a root of
    `X X^T` and a decomposition of sides of tens of thousands would take minutes for each weight.

    Args:
        error: fp32 `[out, in]`.
        hessian: `X X^T` of the inputs, fp32 `[in, in]`.
    """
    mean = hessian.diagonal().mean()
    weighted = lambda columns: hessian @ columns + (DAMPING * mean + (mean == 0)) * columns  # [in, n]
    shape = len(error), min(rank + MORE, *error.shape)
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(error.device)  # [out, n]
    for _ in range(ITERATIONS):
        found = torch.linalg.qr(error @ weighted(error.T @ found)).Q
    seen = error.T @ found  # [in, n]
    b = found @ torch.linalg.eigh(seen.T @ weighted(seen)).eigenvectors[:, -rank:]
    return Pair(b.T @ error, b)


def changed(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """`|error X|^2`: by how much outputs change, squared and summed; arguments as of `closest`."""
    return torch.tensordot(error @ hessian, error).item()

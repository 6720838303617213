"""Moving rows to their experts and adding up what comes back: the definition. Rows are moved one to one, so that sums
have one order, forward and backward."""

from torch import Tensor


def permute(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """x[N,D], rows[N,k] int64, all different -> y[size,D] with y[rows[n,j]] = x[n], and zeros where none goes."""
    copies = x.unsqueeze(1).expand(-1, rows.shape[1], -1).reshape(-1, x.shape[-1])
    return x.new_zeros(size, x.shape[-1]).index_put((rows.flatten(),), copies)


def unpermute(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """y[S,D], rows and weights[N,k] -> out[N,D] with out[n] = sum over j of weights[n,j] y[rows[n,j]], j in order."""
    given = y[rows.flatten()].view(*rows.shape, -1)
    mine = (given * weights.unsqueeze(-1)).unbind(1)
    total = mine[0]
    for part in mine[1:]:
        total = total + part
    return total

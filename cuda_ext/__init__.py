"""F1: the operators that training spends its time in, one folder each. Importing this package imports no torch.

`op.py` is what rooms call; `reference.py` is the one definition of the operator, which kernels and tests are held to.
"""

from cuda_ext.dispatch import explain

__all__ = ["explain"]

"""How tokens know their place: the cosines and sines of rotary embedding, computed where and when they are used.

No table is stored: nothing to initialise, shard, or keep in step with a longer context. Scaled variants (yarn, llama3)
belong to the families that need them.
"""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [B|1,T,H], of positions[B|1,T] times the frequencies theta^(-2i/H), i < H/2, both halves alike.

    In at least fp32. Angles are taken in fp64: in fp32 an angle at position 100,000 is off by 0.004, and the bits of
    a cosine would depend on its place in the buffer.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    angles = positions.unsqueeze(-1).double() * theta**-exponents
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

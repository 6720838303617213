"""Which head counts can be exchanged over context ranks, and what a refusal names."""

import re

import pytest

from framework.core.errors import UsageError
from framework.parallel.heads import check_heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "context"), [(4, 4, 1), (8, 4, 2), (8, 2, 4), (6, 1, 3), (6, 2, 6), (12, 12, 4)]
)
def test_whole_heads_for_every_rank(heads: int, kv_heads: int, context: int) -> None:
    check_heads(heads, kv_heads, context)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "context", "choices"),
    [
        (6, 2, 3, "1, 2 or 6"),  # 3 divides 6, but 2 key heads are neither shared out nor repeated over 3
        (30, 30, 4, "1, 2, 3, 5, 6, 10, 15 or 30"),
        (4, 4, 8, "1, 2 or 4"),
        (1, 1, 2, "1"),
    ],
)
def test_a_refusal_names_what_would_work(heads: int, kv_heads: int, context: int, choices: str) -> None:
    message = (
        f"{heads} heads with {kv_heads} key heads cannot be exchanged over parallel.context={context} ranks; "
        f"choose {choices}, or the ring, which takes any number of heads"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        check_heads(heads, kv_heads, context)

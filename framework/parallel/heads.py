"""Which head counts the all-to-all form of context parallelism can share out; the ring takes any.

Free of torch, so that a recipe can be refused before anything starts.
"""

from framework.core.config import require


def check_heads(num_heads: int, kv_heads: int, context: int) -> None:
    """Refuse `num_heads` query heads, a multiple of `kv_heads`, that cannot be exchanged over `context` ranks.

    Each rank takes whole heads: `context` divides the query heads, and either it divides the key heads too, or they
    divide it and are repeated. Where tensor ranks share out the heads first, the counts are one tensor rank's.
    """
    fitting = [str(ranks) for ranks in range(1, num_heads + 1) if _fits(num_heads, kv_heads, ranks)]
    require(
        _fits(num_heads, kv_heads, context),
        f"{num_heads} heads with {kv_heads} key heads cannot be exchanged over parallel.context={context} ranks; "
        f"choose {' or '.join(filter(None, [', '.join(fitting[:-1]), fitting[-1]]))}, "
        "or the ring, which takes any number of heads",
    )


def _fits(num_heads: int, kv_heads: int, context: int) -> bool:
    return num_heads % context == 0 and (kv_heads % context == 0 or context % kv_heads == 0)

"""What one micro-batch leaves in memory for its backward pass, and what stands beside it for the time being; in bytes.

In the manner of Korthikanti et al. 2022 (sections 4 and 5), for our own blocks: with p places of its rows on this rank,
D hidden, Q and K numbers of queries and of keys, F inner, N heads, e bytes a number, w a wide one (4 or more),
a block with RMSNorm and SwiGLU keeps

    norms      2 p (2 D + 1) w     the input and the normalised, and 1/rms
    matrices   2 p D e             what attention and the feed-forward block take in
    attention  p (2 Q + 2 K) e + p N w + B T T e     q, k, v, the output, its log-sum-exp; the mask of packed rows
    inner      4 p F e             gate, up, silu(gate), their product

and one with E experts, k of F numbers a token, in place of inner (what another block beside them keeps comes on top)

    experts    p (E w + 3 k (w + 8)) + 2 p k D e + 4 p k F e     probabilities, weights, places; the rows that experts
                                                                 take in and give; gate, up, silu(gate), product

Where kernels run (`cuda_ext`), each norm keeps p (D e + 4), its input and 1/rms; inner is 3 p F e, gate, up and what
they give; and the head keeps p (D e + 16) + V D e: a pointwise loss takes the gradients of both at once, beside a
buffer of one chunk's logits and the sum of V D fp32 numbers.

With t tensor ranks Q, K, N and F are shared out, and so are the norms' p, which is sequence parallelism; what the
matrices take in is gathered, and kept so. Left out: strict mode, compiled blocks, entropies, the
balance of experts (p E w).
"""

from dataclasses import dataclass

from framework.models.config import Activation, ModelConfig, Norm
from framework.parallel.config import Recompute

CHUNK_LOGITS = 1 << 25  # as cuda_ext.linear_log_probs and parallel.tensor: logits held at once


@dataclass(frozen=True)
class Load:
    """A micro-batch as one rank meets it. Example: Load(rows=4, length=512, compute=2)."""

    rows: int
    length: int  # places of a row, all ranks together
    compute: int = 4  # bytes of a number that is computed with
    packed: bool = True  # several documents a row: attention is shown a mask
    tensor: int = 1
    context: int = 1
    ring: bool = True  # how context ranks attend
    kernel: bool = False  # those of cuda_ext run
    fused_norms: bool = False  # theirs, or another library's

    @property
    def places(self) -> int:
        """Between blocks each tensor rank holds a share of these."""
        return self.rows * self.length // self.context

    @property
    def wide(self) -> int:
        return max(4, self.compute)


def block_kept(model: ModelConfig, load: Load, recompute: Recompute, layer: int = 0) -> int:
    """Bytes that one block keeps for backward."""
    p, e = load.places, load.compute
    taken = p * model.hidden_size * e
    queries, keys, inner = _shared(model, load, layer)
    experts = _experts(model, load) if model.moe.at(layer) else 0
    if recompute is Recompute.FULL:
        return taken // load.tensor
    if recompute is Recompute.SELECTIVE:  # its input, and what each product gave
        ups = 2 if model.activation.is_gated else 1
        products = p * (queries + 2 * keys + ups * inner) * e + 2 * taken
        if experts:  # k outcomes of ways down in place of one
            products += p * (model.moe.experts + (model.moe.top_k - 1) * model.hidden_size) * e
        return taken // load.tensor + products + _attended(model, load)
    gated = 4 if model.activation.is_gated else 2
    acted = 1 if model.activation is Activation.RELU else gated
    if load.kernel and model.activation is Activation.SWIGLU:
        acted = 3
    given = p * (queries + 2 * keys) * e
    return (
        2 * _norm_kept(model, load) + 2 * taken + given + _attended(model, load) + _mask(load) + acted * p * inner * e
    ) + experts


def shared_kept(model: ModelConfig, load: Load, recompute: Recompute) -> int:
    """Bytes that all blocks keep together: the tables of rotary positions, and the mask, to compute blocks again."""
    tables = 2 * load.places * model.head_size * load.wide if model.rotary_parts else 0
    return tables + (0 if recompute is Recompute.NONE else _mask(load) // load.compute)


def head_kept(model: ModelConfig, load: Load, labels: bool = True) -> int:
    """Bytes that the end of the model keeps: the last norm, and the states that labels are scored from with their
    log-probs, every label counting. `labels` False: a value or class head, which keeps next to nothing."""
    norm = _norm_kept(model, load) if model.ends_with_norm else 0
    if not labels:
        return norm
    if load.kernel:
        gradients = (load.places + _vocabulary(model, load)) * model.hidden_size * load.compute
        return norm + gradients + 16 * load.places
    states, rows = load.places * model.hidden_size * load.wide, _vocabulary(model, load)
    cast = rows * model.hidden_size * load.wide if load.wide > load.compute else 0
    logits = load.places * rows
    return norm + states + cast + (logits * load.wide if logits <= CHUNK_LOGITS else 0)


def head_working(model: ModelConfig, load: Load) -> int:
    """Bytes beside all that is kept while the first gradients are taken: two tables of logits' gradients; of a chunk
    whose logits are computed again, these too. By the kernel a chunk's logits, the states that are scored, and the
    weight's gradient in fp32."""
    if load.kernel:
        from cuda_ext.linear_log_probs.op import rows_of  # torch, which only a machine with kernels has to wait for

        vocabulary = _vocabulary(model, load)
        states = load.places * model.hidden_size * load.compute
        return rows_of(vocabulary) * vocabulary * load.compute + states + vocabulary * model.hidden_size * load.wide
    logits = load.places * _vocabulary(model, load)
    return 2 * logits * load.wide if logits <= CHUNK_LOGITS else 3 * CHUNK_LOGITS * load.wide


def block_working(model: ModelConfig, load: Load, recompute: Recompute, layer: int = 0) -> int:
    """Bytes beside all that is kept while a block's gradients are taken: what it computes again, and the gradients of
    its widest part."""
    again = block_kept(model, load, Recompute.NONE, layer) - block_kept(model, load, recompute, layer)
    inner = (3 if model.activation.is_gated else 2) * load.places * _shared(model, load, layer)[2] * load.compute
    return max(0, again) + max(inner + load.places * model.hidden_size * load.compute, _ring_working(model, load))


def _shared(model: ModelConfig, load: Load, layer: int = 0) -> tuple[int, int, int]:
    """(Q, K, F) of one tensor rank; F of all blocks that a token passes."""
    inner = model.feed_forward_size
    if model.moe.at(layer):
        inner = model.moe.top_k * model.expert_size + model.moe.shared
    sizes = model.num_heads * model.head_size, model.kv_heads * model.head_size, inner
    queries, keys, inner = (-(-size // load.tensor) for size in sizes)
    return queries, keys, inner


def _experts(model: ModelConfig, load: Load) -> int:
    """Probabilities, weights before and after they are divided, orders; the rows that experts take in and give."""
    experts, k = model.moe.experts, model.moe.top_k
    rows = 2 * k * model.hidden_size * load.compute
    return load.places * (experts * load.wide + 3 * k * (load.wide + 8) + rows)


def _attended(model: ModelConfig, load: Load) -> int:
    """Attention's output and its log-sum-exp."""
    return load.places * (_shared(model, load)[0] * load.compute + -(-model.num_heads // load.tensor) * load.wide)


def _mask(load: Load) -> int:
    """torch makes a mask of numbers from one of bools, in every block. The ring holds document ids instead."""
    if not load.packed or (load.context > 1 and load.ring):
        return 0
    return load.rows * load.length**2 * load.compute


def _norm_kept(model: ModelConfig, load: Load) -> int:
    if load.fused_norms:
        statistics = 2 if model.norm is Norm.LAYER else 1
        return load.places // load.tensor * (model.hidden_size * load.compute + 4 * statistics)
    if model.norm is Norm.LAYER:
        return load.places // load.tensor * (model.hidden_size * load.compute + 2 * load.wide)
    return load.places // load.tensor * (2 * model.hidden_size + 1) * load.wide


def _ring_working(model: ModelConfig, load: Load) -> int:
    """Scores of half a block of keys, their gradients, and a third of their kind (`parallel.ring`)."""
    if load.context == 1 or not load.ring:
        return 0
    heads, length = model.num_heads // load.tensor, load.length // load.context
    return 3 * load.rows * heads * length * length // 2 * load.wide


def _vocabulary(model: ModelConfig, load: Load) -> int:
    return -(-model.vocab_size // load.tensor)

"""flash-attn 2.8.3 (flash_attn/flash_attn_interface.py): its signatures, computed by `tests.cuda_ext.packed`."""

from tests.cuda_ext import packed

CALLS = []  # what the last calls were told


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    CALLS.append({"packed": False, "deterministic": deterministic})
    return packed.whole(q, k, v, softmax_scale, causal, window_size, softcap)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    CALLS.append({"packed": True, "deterministic": deterministic})
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k
    return packed.packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap)

"""flash-attn 3 (hopper/flash_attn_interface.py at 01afd16d): its signatures. Older ones return a pair,
as is done here for whole rows."""

from tests.cuda_ext import packed

CALLS = []


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    CALLS.append({"packed": False, "deterministic": deterministic})
    return packed.whole(q, k, v, softmax_scale, causal, window_size, softcap), None


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    CALLS.append({"packed": True, "deterministic": deterministic})
    return packed.packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap)

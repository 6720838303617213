"""flash-attn 2.8.3 (flash_attn/cute/interface.py): its signatures. It cannot be deterministic."""


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    pack_gqa=None,
):  # fmt: skip
    raise AssertionError("too old to be called")


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, pack_gqa=None,
):  # fmt: skip
    raise AssertionError("too old to be called")

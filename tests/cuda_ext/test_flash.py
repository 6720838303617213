"""Attention by flash-attn and by torch's varlen_attn, played by stand-ins with the real signatures: results and
gradients of the definition; which version takes which call; documents in place of masks. Not run against the real
libraries."""

import inspect
import logging
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cuda_ext
from cuda_ext import dispatch
from cuda_ext.attention import flash, op, reference
from cuda_ext.attention.documents import Documents, find_documents, whole_rows
from cuda_ext.attention.op import attention, takes_documents
from framework.parallel.recompute import _KEPT_BY_NAME
from tests.cuda_ext import packed
from tests.cuda_ext.standing_in import H100, standing_in
from tests.cuda_ext.test_attention import draw

VERSIONS = ("flash_2", "flash_3", "flash_4")
A100, L40, B200 = (8, 0), (8, 9), (10, 0)
IDS = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3]])


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: object = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn of torch 2.13."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    return packed.packed(query, key, value, cu_seq_q, max_q, scale, False, window_size, 0.0)


def close_with_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_whole_rows_are_the_definitions(version: str, heads: int, groups: int, causal: bool, cap: float) -> None:
    inputs = draw(2, 7, 7 if causal else 5, heads, groups, 8, dtype=torch.float64, requires_grad=True)
    with standing_in(version):
        ours = attention(*inputs, causal=causal, scale=0.4, cap=cap)
        assert said("attention") == f"flash-attn {version[-1]}"
    close_with_gradients(ours, reference.attention(*inputs, causal=causal, scale=0.4, cap=cap), inputs)


@pytest.mark.parametrize("version", [*VERSIONS, "torch"])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("causal", "window", "cap"), [(True, 0, 0.0), (True, 3, 0.0), (True, 1, 1.5), (False, 0, 0.0)])
def test_packed_rows_are_the_definitions_under_their_mask(
    monkeypatch: pytest.MonkeyPatch, version: str, heads: int, groups: int, causal: bool, window: int, cap: float
) -> None:
    inputs = draw(2, 8, 8, heads, groups, 8, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(op, "varlen_attn", varlen)
    found = find_documents(IDS)
    assert found is not None
    documents = Documents(found.starts, found.longest, window)
    with standing_in(*(version,) if version != "torch" else ()):
        ours = attention(*inputs, documents=documents, causal=causal, cap=cap)
        by = "torch varlen_attn" if version == "torch" else f"flash-attn {version[-1]}"
        assert said("attention") == ("reference" if cap and version == "torch" else by)
    close_with_gradients(ours, reference.attention(*inputs, mask=by_hand(IDS, causal, window), cap=cap), inputs)


def by_hand(ids: Tensor, causal: bool, window: int) -> Tensor:
    """[B,1,T,T]: a query sees keys of its own id, up to its place where causal, the last `window` of them."""
    rows, length = ids.shape
    seen = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        for query in range(length):
            for key in range(length):
                back = query - key
                own = bool(ids[row, query] == ids[row, key])
                seen[row, 0, query, key] = own and not (causal and back < 0) and not (window and back >= window)
    return seen


def said(op_name: str) -> str:
    """By what it last ran, as the log has it; one word for each."""
    (name,) = {implementation.name for name, implementation in dispatch._announced if name == op_name}
    return name


def test_documents_by_hand() -> None:
    found = find_documents(torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1]]))
    assert found is not None
    assert found.starts.tolist() == [0, 2, 3, 4, 8]
    assert found.starts.dtype == torch.int32
    assert found.longest == 4
    assert whole_rows(2, 4, torch.device("cpu")).starts.tolist() == [0, 4, 8]
    one = find_documents(torch.ones(1, 1, dtype=torch.long))
    assert one is not None
    assert (one.starts.tolist(), one.longest) == ([0, 1], 1)


def test_numbers_of_documents_are_powers_of_two_and_what_is_added_is_empty() -> None:
    found = find_documents(torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4]]))
    assert found is not None
    assert found.starts.tolist() == [0, 3, 5, 10, 12]
    found = find_documents(torch.tensor([[5, 5, 5, 6, 6, 7, 7, 7, 7, 7, 8, 0]]))
    assert found is not None
    assert found.starts.tolist() == [0, 3, 5, 10, 11, 12, 12, 12, 12]
    assert found.longest == 8
    row = find_documents(torch.ones(2, 12, dtype=torch.long))
    assert row is not None
    assert row.longest == 12  # no document is longer than a row


def test_documents_of_any_rows_say_what_the_mask_says() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        rows, length = int(torch.randint(1, 4, ())), int(torch.randint(1, 20, ()))
        ids = torch.rand(rows, length).lt(0.3).cumsum(1) + 1
        ids[:, length - int(torch.randint(0, length, ())) :] = 0
        found = find_documents(ids)
        assert found is not None
        for causal in (True, False):
            assert torch.equal(found.mask(rows, length, causal), by_hand(ids, causal, 0))


@pytest.mark.parametrize("ids", [[[1, 2, 1]], [[1, 0, 1]], [[1, 1, 2], [2, 1, 2]]])
def test_a_document_in_two_pieces_wants_a_mask(ids: list[list[int]]) -> None:
    assert find_documents(torch.tensor(ids)) is None
    assert find_documents(torch.zeros(2, 0, dtype=torch.long)) is None
    assert find_documents(torch.tensor([[0, 1, 0, 2, 0]])) is not None  # padding may


@pytest.mark.parametrize(
    ("installed", "card", "dtype", "size", "capped", "exact", "runs"),
    [
        ((2, 3, 4), H100, torch.bfloat16, 128, False, False, 3),
        ((2, 3, 4), H100, torch.float16, 256, True, False, 3),
        ((2, 3, 4), H100, torch.bfloat16, 256, False, True, 4),  # 3 is not deterministic there
        ((2, 3), H100, torch.bfloat16, 200, False, True, 2),
        ((2, 3), H100, torch.bfloat16, 192, False, True, 3),
        ((2, 4), H100, torch.bfloat16, 64, False, False, 4),
        ((2, 3, 4), B200, torch.bfloat16, 128, True, True, 4),
        ((2, 3, 4), B200, torch.bfloat16, 192, False, False, 2),
        ((2, 3, 4), B200, torch.bfloat16, 256, False, False, 4),
        ((2, 3, 4), B200, torch.bfloat16, 256, True, False, 2),
        ((2, 3, 4), A100, torch.bfloat16, 64, True, True, 2),
        ((2, 3, 4), L40, torch.float16, 64, False, False, 2),
        ((2, 3, 4), (12, 0), torch.float16, 64, False, False, 2),
        (
            (3, 4),
            A100,
            torch.bfloat16,
            64,
            False,
            False,
            "flash-attn 3 is for compute capability 9.0, this card has 8.0",
        ),
        ((2,), (7, 5), torch.float16, 64, False, False, "is for compute capability from 8.0 on, this card has 7.5"),
        ((2, 3, 4), H100, torch.float32, 64, False, False, "takes bfloat16 and float16, not float32"),
        ((2, 3, 4), H100, torch.bfloat16, 20, False, False, "takes heads of 8, 16, .. 256 numbers, not 20"),
        ((2, 3, 4), H100, torch.bfloat16, 264, False, False, "numbers, not 264"),
        ((), H100, torch.bfloat16, 64, False, False, flash.ABSENT),
    ],
)
def test_which_version_takes_a_call(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[int, ...], card: flash.Card, dtype: torch.dtype, size: int,
    capped: bool, exact: bool, runs: int | str,
) -> None:  # fmt: skip
    numbers = {version: version.number in installed for version in flash.VERSIONS}
    monkeypatch.setattr(flash, "_is_there", numbers.__getitem__)
    monkeypatch.setattr(flash, "load_error", lambda version: "")
    flash._pick.cache_clear()
    found = flash.pick(card, dtype, size, capped, exact)
    flash._pick.cache_clear()
    if isinstance(runs, str):
        assert isinstance(found, str)
        assert runs in found
    else:
        assert isinstance(found, flash.Version)
        assert found.number == runs


def test_what_is_installed_and_cannot_be_used_is_explained() -> None:
    """flash-attn 2.8.3 brings a draft of version 4, whose functions take other words."""
    with standing_in("flash_2"):
        assert flash.pick(B200, torch.bfloat16, 64, False, False) == flash.VERSIONS[2]
        assert flash.explain() == (
            "flash-attn 4 cannot be used: its flash_attn_func does not take deterministic (install a newer one); "
            "flash-attn 2 is installed"
        )
    with standing_in("flash_4"):
        assert flash.explain() == "flash-attn 4 is installed"
        assert "flash-attn 4 is installed" in next(
            line for line in cuda_ext.explain().splitlines() if "attention" in line
        )
    if not any(find_spec(name) for name in ("flash_attn", "flash_attn_interface")):
        assert flash.explain() == flash.ABSENT


@pytest.mark.parametrize("exact", [True, False])
def test_backward_is_deterministic_where_torch_must_be(exact: bool) -> None:
    inputs = draw(1, 4, 4, 2, 2, 8, dtype=torch.float64)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(exact)
    try:
        with standing_in("flash_2"):
            attention(*inputs, causal=True)
            attention(*inputs, documents=whole_rows(1, 4, inputs[0].device), causal=True)
            import flash_attn  # type: ignore[import-not-found]

            assert [(call["packed"], call["deterministic"]) for call in flash_attn.CALLS] == [
                (False, exact),
                (True, exact),
            ]
    finally:
        torch.use_deterministic_algorithms(before)


def test_calls_that_no_library_takes_run_as_before_and_are_right() -> None:
    q, k, v = draw(2, 4, 6, 2, 2, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 6) < 0.7
    mask[..., 0] = True
    odd = draw(2, 8, 8, 2, 2, 6, dtype=torch.float64)
    found = find_documents(IDS)
    with standing_in("flash_2"):
        expected = reference.attention(q, k, v, mask=mask)
        torch.testing.assert_close(attention(q, k, v, mask=mask), expected, rtol=0, atol=1e-12)
        expected = reference.attention(q, k, v, causal=True)  # of 4 queries and 6 keys: not from the last key on
        torch.testing.assert_close(attention(q, k, v, causal=True), expected, rtol=0, atol=1e-12)
        expected = reference.attention(*odd, mask=by_hand(IDS, True, 0))  # heads of 6 numbers
        torch.testing.assert_close(attention(*odd, documents=found, causal=True), expected, rtol=0, atol=1e-12)
        strict = attention(*odd, documents=found, causal=True, strict=True)
        torch.testing.assert_close(strict, expected, rtol=0, atol=1e-12)
        assert attention(q[:0], k[:0], v[:0]).shape == (0, 4, 2, 8)
        import flash_attn

        assert not flash_attn.CALLS


def test_the_choice_is_the_recipes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "varlen_attn", varlen)
    inputs = draw(2, 8, 8, 2, 2, 8, dtype=torch.float64)
    documents = find_documents(IDS)
    lines = []
    for choice in ("auto", "flash", "torch", "reference"):
        with standing_in("flash_3"), dispatch.preferring(attention=choice), caplog.at_level(logging.INFO, "cuda_ext"):
            caplog.clear()
            for told in ({"causal": True}, {"documents": documents, "causal": True}, {"mask": by_hand(IDS, True, 0)}):
                attention(*inputs, **told)  # type: ignore[arg-type]
            lines.append([record.message.removeprefix("attention runs as ") for record in caplog.records])
    flash_3, sdpa = "flash-attn 3 (it is here, and fits)", "torch scaled_dot_product_attention"
    assert lines == [
        [flash_3, f"{sdpa} (the library's own fused kernels)"],
        [flash_3, f"{sdpa} (ops.attention=flash, but a mask is given)"],
        [f"{sdpa} (the library's own fused kernels)", "torch varlen_attn (packed rows, without a mask)"],
        ["reference (ops.attention=reference)"],
    ]


def test_on_a_cpu_nothing_takes_documents_and_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "pick", None)
    device = torch.device("cpu")
    assert not takes_documents(device, torch.bfloat16, 64, 0.0)
    q, k, v = draw(1, 4, 4, 2, 2, 8)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert torch.equal(attention(q, k, v, causal=True), theirs.transpose(1, 2))


def test_torchs_own_function_takes_what_it_is_given() -> None:
    """The real one, on tensors without numbers; the stand-in has its signature."""
    theirs = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if "window_size" not in inspect.signature(theirs).parameters:
        pytest.skip(f"torch {torch.__version__} has an older one, which is not called")
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(varlen).parameters)
    with FakeTensorMode(), standing_in():
        q, k, v = (torch.empty(2, 8, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        documents = Documents(torch.empty(5, dtype=torch.int32), 4, window=3)
        y = attention(q, k, v, documents=documents, causal=True)
        assert said("attention") == "torch varlen_attn"
        assert y.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    assert str(torch.ops.torch_attn._varlen_attn.default) in _KEPT_BY_NAME  # selective recomputation keeps it

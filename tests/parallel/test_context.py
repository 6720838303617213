"""Rows cut over context ranks: both forms of attention give one process's outputs and gradients; cut, join and last
give numbers worked by hand; and what is sent is what the formulas say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cuda_ext.attention import reference
from framework.core.errors import DeadlineError, UsageError
from framework.core.runtime import Runtime
from framework.models.mask import document_mask
from framework.parallel.collectives import Ranks
from framework.parallel.context import Cut, ExchangeCore, WholeIds
from framework.parallel.heads import check_heads
from framework.parallel.movements import sum_over
from framework.parallel.ring import RingCore
from tests.distributed import run_ranks

CORES = {"ring": RingCore, "exchange": ExchangeCore}
MESHES = {"2": (1, 2), "3": (1, 3), "4": (1, 4), "2 of 4": (2, 2)}  # data, context
PARTS = ("y", "dq", "dk", "dv")


def cut_over(shape: tuple[int, int]) -> Cut:
    return Cut(Ranks(init_device_mesh("cpu", shape, mesh_dim_names=("data", "context")), ("context",)))


@dataclass(frozen=True)
class Case:
    """One attention over whole rows. `documents` are each row's lengths, and what they leave of T is padding."""

    documents: tuple[tuple[int, ...], ...]
    length: int  # T
    heads: tuple[int, int] = (4, 2)  # N, K
    head_size: int = 5
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def ids(self) -> Tensor:
        rows = torch.zeros(len(self.documents), self.length, dtype=torch.int64)
        for row, lengths in zip(rows, self.documents):
            ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, all of whole rows."""
        draw = torch.Generator().manual_seed(self.seed)
        shapes = [(len(self.documents), self.length, self.heads[i], self.head_size) for i in (0, 1, 1, 0)]
        q, k, v, g = (torch.randn(shape, generator=draw, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return q, k, v, g


def fixed_cases(size: int) -> dict[str, Case]:
    """Cases for `size` context ranks; 4 size places a row, so that chunks hold two."""
    length, some, many = 4 * size, (3 * size, size), (2 * size, 2 * size)
    return {
        "one document": Case(((length,),), length, many),
        "documents across borders": Case(((1, 2, length - 3), (length - 1, 1), (3, length - 3)), length, some),
        "padding": Case(((length - 3,), (1, 1), (2, size)), length, many),
        "a row of padding": Case(((), (length,), ()), length, some),
        "every token alone": Case(((1,) * length,), length, many),
        "chunks of one": Case(((1, 2 * size - 2),), 2 * size, many),
        "chunks of three": Case(((4, 1), (6 * size,)), 6 * size, some),
        "one key head": Case(((2 * size - 1, 2),), length, (size, 1), head_size=8),
        "as many key heads": Case(((2 * size - 1, 2),), length, (size, size), head_size=1),
        "six heads on two": Case(((2 * size - 1, 2),), length, (6, 2)),
    }


def random_cases(size: int) -> Iterator[tuple[str, Case]]:
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)

        def number(low: int, high: int, draw: torch.Generator = draw) -> int:
            return int(torch.randint(low, high + 1, (), generator=draw))

        length = 2 * size * number(1, 5)
        documents = [tuple(_split(number(0, length), number)) for _ in range((1, 3)[seed % 2])]
        heads = (size * number(1, 2), (1, size)[number(0, 1)])
        yield f"seed {seed}", Case(tuple(documents), length, heads, number(1, 9), seed=seed)


def _split(length: int, number: Callable[[int, int], int]) -> Iterator[int]:
    while length > 0:
        yield (part := number(1, length))
        length -= part


def backward(core: Any, inputs: tuple[Tensor, ...], mask: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = core(*leaves, mask, True)
    y.backward(grad)
    return dict(zip(PARTS, [y.detach(), *(x.grad for x in leaves if x.grad is not None)], strict=True))


def one_process(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The definition over whole rows, in `dtype` on the numbers that the case's own dtype can hold."""
    *inputs, grad = (x.to(dtype or case.dtype) for x in case.tensors())
    mask = document_mask(case.ids())
    return backward(lambda q, k, v, m, _: reference.attention(q, k, v, mask=m), tuple(inputs), mask, grad)


def cut_up(core: Any, case: Case) -> dict[str, Tensor]:
    *inputs, grad = (core.cut.cut(x) for x in case.tensors())
    mask = WholeIds(core.cut)(core.cut.cut(case.ids()))
    assert torch.equal(mask, case.ids())
    return backward(core, tuple(inputs), mask, grad)


def deviations(core: Any, case: Case, dtype: torch.dtype | None = None) -> dict[str, float]:
    """max|difference| of this rank's places from one process's, in parts of the largest number. Law Layout's measure:
    a gradient may be zero (that of a score over one key), so the RMS of all three is the least that it counts as."""
    found, whole = cut_up(core, case), one_process(case, dtype)
    assert {x.dtype for x in found.values()} == {case.dtype}
    least = float(torch.cat([whole[name].double().flatten() for name in PARTS[1:]]).square().mean().sqrt())
    largest = {name: max(float(whole[name].abs().max()), least) for name in PARTS}
    return {name: _furthest(found[name], core.cut.cut(whole[name])) / largest[name] for name in PARTS}


def _furthest(found: Tensor, its: Tensor) -> float:
    return float((found.double() - its.double()).abs().max())


def _fits(case: Case, size: int) -> bool:
    try:
        check_heads(*case.heads, size)
    except UsageError:
        return False
    return True


def _everything(runtime: Runtime, shape: tuple[int, int]) -> dict[tuple[str, str, str], dict[str, float]]:
    cut, size = cut_over(shape), shape[1]
    found = {}
    data_rank = runtime.rank // size  # data ranks have rows of their own, and none may hear of another's
    drawn = {**fixed_cases(size), **dict(random_cases(size))}
    cases = {name: replace(case, seed=case.seed + 100 * data_rank) for name, case in drawn.items()}
    for form, build in CORES.items():
        core = build(cut)
        for name, case in cases.items():
            if form == "ring" or _fits(case, size):
                found[form, "fp64", name] = deviations(core, case)
        for name in ("documents across borders", "chunks of three"):
            found[form, "fp32", name] = deviations(core, replace(cases[name], dtype=torch.float32))
            found[form, "bf16", name] = deviations(core, replace(cases[name], dtype=torch.bfloat16), torch.float64)
    return found


@pytest.fixture(scope="module", params=MESHES)
def results(request: pytest.FixtureRequest) -> tuple[int, list[dict[tuple[str, str, str], dict[str, float]]]]:
    shape = MESHES[request.param]
    return shape[1], run_ranks(_everything, shape[0] * shape[1], shape)


@pytest.mark.parametrize("form", CORES)
def test_fp64_gives_one_process_s_numbers_to_twelve_digits(results: Any, form: str) -> None:
    size, ranks = results
    for rank, found in enumerate(ranks):
        cases = {name: parts for (its, dtype, name), parts in found.items() if (its, dtype) == (form, "fp64")}
        assert len(cases) >= 20
        assert {name: parts for name, parts in cases.items() if max(parts.values()) > 1e-12} == {}, (size, rank)


def bound(case: Case) -> float:
    """The error model of fp32, in parts of the largest number: an output sums over the keys, a gradient of a key over
    the queries of its group, each in another order than one process, and each weight carries the roundings of a score
    (some standard deviations large) that sums over the head size; errors add like a random walk."""
    terms = case.length * case.heads[0] // case.heads[1] + case.head_size
    return 2.0**-24 * 4 * terms**0.5


@pytest.mark.parametrize("form", CORES)
@pytest.mark.parametrize("name", ["documents across borders", "chunks of three"])
def test_fp32_to_its_bound(results: Any, form: str, name: str) -> None:
    size, ranks = results
    limit = bound(fixed_cases(size)[name])
    for rank, found in enumerate(ranks):
        measured = max(found[form, "fp32", name].values())
        print(f"{form} over {size}, rank {rank}, {name}: {measured:.1e} of {limit:.1e}")
        assert measured < limit


@pytest.mark.parametrize("form", CORES)
@pytest.mark.parametrize("name", ["documents across borders", "chunks of three"])
def test_bf16_stays_near(results: Any, form: str, name: str) -> None:
    """Against fp64 on the same inputs: a few of the 2^-8 by which bf16 rounds."""
    for found in results[1]:
        measured = max(found[form, "bf16", name].values())
        print(f"{form} over {results[0]}, {name}: {measured:.1e}")
        assert measured < 3 * 2**-8


@pytest.mark.parametrize("form", CORES)
def test_a_process_alone_holds_whole_rows(form: str) -> None:
    core = CORES[form](Cut(Ranks(None)))
    odd = Case(((4, 2), (), (7,)), 7)
    for case in (*fixed_cases(1).values(), odd, replace(odd, documents=((1,),), length=1)):
        assert max(deviations(core, case).values()) < 1e-12


@pytest.mark.parametrize("form", CORES)
def test_without_a_mask_each_row_is_one_document(form: str) -> None:
    core = CORES[form](Cut(Ranks(None)))
    *inputs, grad = (case := Case(((8,), (8,)), 8)).tensors()
    found, whole = backward(core, tuple(inputs), None, grad), one_process(case)
    assert max(_furthest(found[name], whole[name]) for name in PARTS) < 1e-12


def _hand_worked(_: Runtime) -> dict[str, Any]:
    cut = cut_over((1, 2))
    whole = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17]])
    mine = cut.cut(whole).requires_grad_()
    joined = cut.join(mine)
    (joined * torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 9, 9, 9, 9]])).sum().backward()
    wide = cut.join(cut.cut(whole.view(2, 8, 1).expand(2, 8, 3)))
    # Last real tokens: place 6 (held by rank 0), place 2 (rank 1), and place 0 of the row of padding (rank 0).
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [4, 4, 4, 0, 0, 0, 0, 0], [0] * 8])
    hidden = cut.cut(torch.arange(48.0).view(3, 8, 2)).requires_grad_()
    last = sum_over(cut.last(hidden, cut.cut(ids)), cut.ranks)
    (last * torch.tensor([[1.0, 2], [3, 4], [5, 6]])).sum().backward()
    return {
        "places": cut.places(8),
        "mine": mine.detach(),
        "joined": joined.detach(),
        "joined grad": mine.grad,
        "wide": torch.equal(wide, whole.view(2, 8, 1).expand(2, 8, 3)),
        "last": last.detach(),
        "last grad": hidden.grad,
    }


def test_cut_join_and_last_by_hand() -> None:
    ranks = run_ranks(_hand_worked, 2)
    assert [rank["places"].tolist() for rank in ranks] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [rank["mine"].tolist() for rank in ranks] == [
        [[0, 1, 6, 7], [10, 11, 16, 17]],
        [[2, 3, 4, 5], [12, 13, 14, 15]],
    ]
    for rank in ranks:
        assert rank["joined"].tolist() == [list(range(8)), list(range(10, 18))]
        assert rank["wide"]
        assert rank["last"].tolist() == [[12, 13], [20, 21], [32, 33]]
    assert [rank["joined grad"].tolist() for rank in ranks] == [
        [[1, 2, 7, 8], [9, 9, 9, 9]],
        [[3, 4, 5, 6], [9, 9, 9, 9]],
    ]
    nothing = [0, 0]
    assert [rank["last grad"].tolist() for rank in ranks] == [
        [[nothing, nothing, [1, 2], nothing], [nothing] * 4, [[5, 6], *[nothing] * 3]],
        [[nothing] * 4, [[3, 4], *[nothing] * 3], [nothing] * 4],
    ]


def test_alone_cut_join_and_last_change_nothing() -> None:
    cut, x = Cut(Ranks(None)), torch.arange(6.0).view(1, 3, 2)
    assert cut.places(3).tolist() == [0, 1, 2]
    assert torch.equal(cut.cut(x), x)
    assert torch.equal(cut.join(x), x)
    assert cut.last(x, torch.tensor([[1, 1, 0]])).tolist() == [[2, 3]]


def test_rows_that_do_not_cut_evenly_are_refused() -> None:
    ranks = Ranks(None)
    ranks.size = 3
    expected = (
        r"^rows of 8 places cannot be cut over parallel.context=3 ranks: that takes a multiple of 6; pad them to 12$"
    )
    with pytest.raises(UsageError, match=expected):
        Cut(ranks).cut(torch.zeros(1, 8))


def test_by_rank_is_undone_by_row_order() -> None:
    ranks = Ranks(None)
    ranks.size = 3
    cut, x = Cut(ranks), torch.arange(12).view(1, 12)
    assert cut.by_rank(x).tolist() == [[[0, 1, 10, 11]], [[2, 3, 8, 9]], [[4, 5, 6, 7]]]
    assert torch.equal(cut.in_row_order(cut.by_rank(x)), x)


@dataclass
class Traffic:
    """What this rank sent: how often and how much, by kind."""

    calls: dict[str, int]
    sent_bytes: int = 0

    def count(self, kind: str, sent_bytes: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent_bytes += sent_bytes


def watched(traffic: Traffic) -> Any:
    """torch's collectives, counted into `traffic` and then called."""
    hop, exchange, gather, total = (
        dist.batch_isend_irecv,
        dist.all_to_all_single,
        dist.all_gather,
        dist.all_reduce,
    )

    def counted_hop(operations: list[dist.P2POp]) -> Any:
        traffic.count("hop", sum(each.tensor.nbytes for each in operations if each.op is dist.isend))
        return hop(operations)

    def counted_exchange(output: Tensor, x: Tensor, group: Any) -> Any:
        traffic.count("exchange", x.nbytes * (group.size() - 1) // group.size())
        return exchange(output, x, group=group)

    def counted_gather(parts: list[Tensor], x: Tensor, group: Any) -> Any:
        traffic.count("gather", x.nbytes)
        return gather(parts, x, group=group)

    def counted_total(x: Tensor, group: Any) -> Any:
        traffic.count("sum", x.nbytes)
        return total(x, group=group)

    return mock.patch.multiple(
        dist,
        batch_isend_irecv=counted_hop,
        all_to_all_single=counted_exchange,
        all_gather=counted_gather,
        all_reduce=counted_total,
    )


def _traffic(_: Runtime, form: str, case: Case, size: int) -> list[Traffic]:
    core = CORES[form](cut_over((1, size)))
    q, k, v, grad = (core.cut.cut(x).requires_grad_() for x in case.tensors())
    found = [Traffic({}) for _ in range(3)]
    with watched(found[0]):
        mask = WholeIds(core.cut)(core.cut.cut(case.ids()))
    with watched(found[1]):
        y = core(q, k, v, mask, True)
    with watched(found[2]):
        y.backward(grad)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_ring_hops_once_to_each_other_rank(dtype: torch.dtype) -> None:
    case = Case(((12,), (7, 2)), 12, (4, 2), 8, dtype)
    wide, numbers = max(dtype.itemsize, 4), 2 * 2 * 4 * 2 * 8  # 2 B t K H
    for ids, forward, backward in run_ranks(_traffic, 3, "ring", case, 3):
        assert ids.calls == {"gather": 1}
        assert (forward.calls, forward.sent_bytes) == ({"hop": 2}, 2 * numbers * dtype.itemsize)
        assert (backward.calls, backward.sent_bytes) == ({"hop": 4}, 2 * numbers * (dtype.itemsize + wide))


@pytest.mark.parametrize(("kv_heads", "repeated"), [(6, 6), (1, 3)])
def test_the_exchange_sends_heads_there_and_back(kv_heads: int, repeated: int) -> None:
    case = Case(((12,), (7, 2)), 12, (6, kv_heads), 8)
    expected = 2 * 2 * 2 * 4 * (6 + repeated) * 8 * 8 // 3  # (c-1)/c 2 B t (N + K') H e
    for ids, forward, backward in run_ranks(_traffic, 3, "exchange", case, 3):
        assert ids.calls == {"gather": 1}
        assert (forward.calls, forward.sent_bytes) == ({"exchange": 2}, expected)
        assert (backward.calls, backward.sent_bytes) == ({"exchange": 2}, expected)


def _heads_do_not_fit(_: Runtime) -> str:
    core = ExchangeCore(cut_over((1, 2)))
    q, k, v, _ = Case(((4,),), 4, (3, 3)).tensors()
    with pytest.raises(UsageError) as caught:
        core(core.cut.cut(q), core.cut.cut(k), core.cut.cut(v), None, True)
    return str(caught.value)


def test_heads_that_cannot_be_exchanged_are_refused_on_every_rank() -> None:
    for message in run_ranks(_heads_do_not_fit, 2):
        assert message.startswith(
            "3 heads with 3 key heads cannot be exchanged over parallel.context=2 ranks; choose 1 or 3"
        )


def _one_stays_away(runtime: Runtime, form: str) -> str:
    core = CORES[form](cut_over((1, 2)))
    core.cut.ranks.sum(torch.ones(1), "what all join")
    store = dist.distributed_c10d._get_default_store()
    if runtime.rank == 1:
        store.wait(["given up"], timedelta(seconds=30))  # alive, and elsewhere
        return "away"
    with pytest.raises(DeadlineError) as caught:
        core(*[torch.ones(1, 2, 2, 1)] * 3, None, True)
    store.set("given up", "")
    return str(caught.value)


@pytest.mark.parametrize(
    ("form", "phase"), [("ring", "the hop of keys and values"), ("exchange", "the exchange of attention heads")]
)
def test_a_missing_rank_ends_in_an_error(form: str, phase: str) -> None:
    message, _ = run_ranks(_one_stays_away, 2, form, deadline_s=1.0)
    assert f"; rank 0 waits at {phase} (waited in vain" in message

"""AdamW's kernel on the emulator: the definition's bits over many steps, skipping, copies, the norm, sizes, bad input.

The definition takes its root by torch, which on a CPU takes it by MKL: of one number in five an ulp from the nearest.
Here it is taken as IEEE 754 has it, and as cards do; the kernel must then give the same bits.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.adamw import benchmark, op, reference
from tests.cuda_ext.emulated import DTYPES, draw, emulated, rounded_once, same_bits, shifted, sparse

HYPER = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# One number, a matrix, a block and less and more, several, nothing.
SHAPES = [(1,), (3, 5), (4096,), (4095,), (4101,), (2, 4099), (0,)]


@pytest.fixture(autouse=True)
def ieee_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = lambda tensors: [torch.from_numpy(np.sqrt(x.numpy())) for x in tensors]  # noqa: E731
    monkeypatch.setattr(torch, "_foreach_sqrt", roots)


def numbers(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    return [draw(*shape, dtype=dtype, seed=seed + 100 * n) for n, shape in enumerate(shapes)]


def state(shapes: list[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    """params, exp_avgs, exp_avg_sqs."""
    return [numbers(shapes), numbers(shapes, seed=1), [x.square() for x in numbers(shapes, seed=2)]]


def cloned(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[x.clone() for x in tensors] for tensors in lists]


def same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_emulated_a_hundred_steps_give_the_definition_s_bits() -> None:
    shapes = [(3, 5), (4101,), (1,)]
    ours, theirs = state(shapes), state(shapes)
    ours[0][1] = shifted(ours[0][1])
    for step in range(1, 101):
        grads, hyper = numbers(shapes, seed=step), HYPER | {"lr": 0.01 / step}
        with emulated(seed=step):
            op.adamw(ours[0], grads, *ours[1:], step=step, **hyper)
        reference.adamw(theirs[0], grads, *theirs[1:], step=step, **hyper)
    same(ours, theirs)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_clipped_unscaled_copied_gradients_of_any_dtype(dtype: torch.dtype, clip: float | None) -> None:
    ours, grads = state(), numbers(dtype=dtype, seed=7)
    theirs, before = cloned(ours), cloned([grads])
    copies = [[x.bfloat16().zero_() for x in numbers()] for _ in range(2)]
    factor = None if clip is None else torch.tensor(clip)
    with emulated():
        op.adamw(ours[0], grads, *ours[1:], step=3, **HYPER, unscale=1 / 3, clip=factor, copies=copies[0])
    reference.adamw(theirs[0], grads, *theirs[1:], step=3, **HYPER, unscale=1 / 3, clip=factor, copies=copies[1])
    same([*ours, copies[0], grads], [*theirs, copies[1], *before])


def test_emulated_with_torch_s_own_root_it_is_within_its_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ours, grads = state(), numbers(seed=7)
    theirs = cloned(ours)
    with emulated():
        op.adamw(ours[0], grads, *ours[1:], step=3, **HYPER)
    reference.adamw(theirs[0], grads, *theirs[1:], step=3, **HYPER)
    same(ours[1:], theirs[1:])
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=2**-22)


def test_emulated_nothing_is_written_where_the_flag_stands() -> None:
    ours, copies = state(), [x.bfloat16() for x in numbers()]
    before = cloned([*ours, copies])
    with emulated():
        for flag in (1.0, torch.nan):
            stop = torch.tensor(flag)
            op.adamw(ours[0], numbers(), *ours[1:], step=1, **HYPER, non_finite=stop, copies=copies)
            same([*ours, copies], before)
        op.adamw(ours[0], numbers(), *ours[1:], step=1, **HYPER, non_finite=torch.zeros(1))
    assert not torch.equal(ours[0][1], before[0][1])


def test_emulated_more_tensors_than_one_launch_holds() -> None:
    shapes: list[tuple[int, ...]] = [(n % 7,) for n in range(150)]
    ours, grads = state(shapes), numbers(shapes, seed=7)
    theirs = cloned(ours)
    with emulated():
        op.adamw(ours[0], grads, *ours[1:], step=1, **HYPER)
        norm, _ = op.multi_tensor_norm(grads)
    reference.adamw(theirs[0], grads, *theirs[1:], step=1, **HYPER)
    same(ours, theirs)
    rounded_once(norm, torch.cat(grads).double().norm())


def test_emulated_wherever_the_numbers_lie() -> None:
    for strided in (False, True):
        ours, grads = state([(5, 16), (64,)]), numbers([(5, 16), (64,)], torch.bfloat16, seed=7)
        theirs, plain = cloned(ours), grads.copy()
        grads[0] = torch.stack([grads[0], grads[0]], -1)[..., 0]
        grads[1], ours[2][1] = shifted(grads[1]), shifted(ours[2][1])
        if strided:
            ours[0][0] = ours[0][0].t().contiguous().t()  # the reference's
        with emulated():
            op.adamw(ours[0], grads, *ours[1:], step=1, **HYPER)
        reference.adamw(theirs[0], plain, *theirs[1:], step=1, **HYPER)
        same(ours, theirs)


def test_emulated_bits_depend_on_no_schedule() -> None:
    grads = numbers(seed=7)

    def updated() -> tuple[Tensor, ...]:
        ours = state()
        op.adamw(ours[0], grads, *ours[1:], step=1, **HYPER)
        return (*ours[0], *ours[1], *(x.reshape(1) for x in op.multi_tensor_norm(grads)))

    same_bits(updated)


def test_emulated_what_is_not_a_number_stays_where_it_is() -> None:
    ours = [[torch.zeros(3)] for _ in range(3)]
    with emulated():
        op.adamw(ours[0], [torch.tensor([1.0, torch.nan, torch.inf])], *ours[1:], step=1, **HYPER)
        op.adamw([], [], [], [], step=1, **HYPER)
    assert ours[0][0].isfinite().tolist() == [True, False, False]
    assert ours[2][0].isfinite().tolist() == [True, False, False]


def test_emulated_parameters_that_have_gradients_are_written_in_place() -> None:
    params, grads = [x.requires_grad_() for x in numbers()], numbers(seed=7)
    version = params[1]._version
    with emulated(), torch.no_grad():
        op.adamw(params, grads, *state()[1:], step=1, **HYPER)
    assert params[1]._version > version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_the_norm_is_the_root_of_all_squares(dtype: torch.dtype) -> None:
    tensors = [*numbers(dtype=dtype, seed=7), shifted(draw(4101, dtype=dtype)), draw(6, 4, dtype=dtype).t()]
    tensors.append(draw(70, seed=3))  # dtypes may differ
    true = torch.cat([x.flatten().double() for x in tensors]).norm()
    with emulated():
        norm, non_finite = op.multi_tensor_norm(tensors)
        third, _ = op.multi_tensor_norm(tensors, unscale=1 / 3)
        nothing = op.multi_tensor_norm([torch.empty(0, dtype=dtype)])
    rounded_once(norm, true)
    rounded_once(third, true / 3)
    assert (norm.shape, norm.dtype, float(non_finite)) == ((), torch.float32, 0)
    assert [float(x) for x in nothing] == [0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_emulated_a_norm_that_is_not_finite_is_flagged(bad: float) -> None:
    tensors = numbers()
    tensors[4][4100] = bad
    with emulated():
        norm, non_finite = op.multi_tensor_norm(tensors)
    assert (bool(norm.isfinite()), float(non_finite)) == (False, 1)


def test_emulated_norm_clip_and_step_are_torch_s() -> None:
    shapes: list[tuple[int, ...]] = [(3, 5), (4101,)]
    params, grads = numbers(shapes), numbers(shapes, seed=7)
    leaves = [param.clone().requires_grad_() for param in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    optimizer = torch.optim.AdamW(leaves, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    optimizer.step()
    with emulated():
        norm, non_finite = op.multi_tensor_norm(grads)
        zeros = [[torch.zeros_like(x) for x in params] for _ in range(2)]
        clip = (0.5 / (norm + 1e-6)).clamp(max=1)
        op.adamw(params, grads, *zeros, step=1, **HYPER, clip=clip, non_finite=non_finite)
    for ours, theirs in zip(params, leaves, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6)


def test_emulated_beyond_two_to_the_31st() -> None:
    """Only the last block runs, in a tensor that begins in block 3 of its launch."""
    numel = 2**31 + 4096 + 5
    small = [(3,), (4100,)]
    big = [sparse(numel, dtype=torch.float32) for _ in range(4)]
    few = [draw(5, seed=seed).abs() for seed in range(4)]
    for x, last in zip(big, few, strict=True):
        x[-5:] = last
    lists = [[*numbers(small), x] for x in big]
    last = 3 + (numel - 1) // op.CHUNK
    with emulated(first_block=last):
        op.adamw(*lists, step=1, **HYPER)
    reference.adamw(*([x] for x in few), step=1, **HYPER)
    assert all(torch.equal(x[-5:], y) for x, y in zip(big, few, strict=True))

    sums, norm, flag = torch.zeros(op.parts(lists[1])), torch.empty(()), torch.empty(())
    with emulated(first_block=len(sums) - 1):
        library.operators(sums).adamw_norm(lists[1], 1.0, sums, norm, flag)
    rounded_once(norm, big[1][-5:].double().norm())


def test_emulated_torch_finds_nothing_wrong_with_the_operators() -> None:
    ours, grads = state([(3,), (2, 2)]), numbers([(3,), (2, 2)], seed=7)
    copies = [x.bfloat16() for x in ours[0]]
    factors = [*reference.Factors.of(1, 0.1, 0.9, 0.95, 1e-8, 0.1), 1.0]
    with emulated():
        torch.library.opcheck(op.fused, (ours[0], grads, *ours[1:], copies, factors, torch.ones(()), torch.zeros(())))
        torch.library.opcheck(op.fused, (ours[0], grads, *ours[1:], [], factors, None, None))
        torch.library.opcheck(op.fused_norm, (grads, 1.0))


def test_emulated_it_stays_in_a_compiled_graph() -> None:
    def step(params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor]) -> Tensor:
        norm, non_finite = op.multi_tensor_norm(grads)
        op.adamw(params, grads, averages, squares, step=1, **HYPER, clip=1 / norm, non_finite=non_finite)
        return norm + 1

    ours, grads = state([(3,), (2, 2)]), numbers([(3,), (2, 2)], seed=7)
    theirs = cloned(ours)
    with emulated():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ours[0], grads, *ours[1:]), step(theirs[0], grads, *theirs[1:]))
    same(ours, theirs)


def test_emulated_the_benchmark_runs() -> None:
    with emulated():
        for case in benchmark.cases("cpu", sizes=[[30, 30]]):
            for side in (case.ours, *case.rivals.values()):
                side()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grads": [torch.ones(3)]}, "grads are 1 tensors beside 2 params"),
        ({"grads": []}, "grads are 0 tensors beside 2 params"),
        ({"copies": [torch.ones(3).bfloat16()]}, "copies are 1 tensors beside 2 params"),
        ({"grads": [torch.ones(3), torch.ones(4, 2)]}, r"grads\[1\] \[4,2\] is not of its parameter's shape \[2,4\]"),
        ({"grads": [torch.ones(3), torch.ones(2, 4).half()]}, r"grads\[1\] is float16, not float32"),
        ({"grads": [torch.ones(3).double()] * 2}, r"grads\[0\] is float64, not float32, bfloat16 or float16"),
        ({"params": [torch.ones(3), torch.ones(4, 2).t()]}, r"params\[1\] \[2,4\] has stride 2 in dimension 1, not 1"),
        ({"params": [torch.ones(3).half(), torch.ones(2, 4)]}, r"params\[0\] is float16, not float32"),
        ({"exp_avg_sqs": [torch.ones(3), torch.ones(3)]}, r"exp_avg_sqs\[1\] \[3\] is not of its parameter's shape"),
        ({"copies": [torch.ones(3), torch.ones(2, 4)]}, r"copies\[0\] is float32, not bfloat16"),
        ({"clip": torch.ones(2)}, r"clip \[2\] has 2 elements, not 1"),
        ({"non_finite": torch.ones(1).bool()}, "non_finite is bool, not float32"),
    ],
)
def test_emulated_what_does_not_fit_is_named(change: dict[str, object], says: str) -> None:
    lists = {name: [torch.ones(3), torch.ones(2, 4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments = lists | {"copies": []} | {str(n): 0.5 for n in range(9)} | {"clip": None, "non_finite": None} | change
    with emulated(), pytest.raises(RuntimeError, match="adamw_update: " + says):
        library.operators(torch.ones(1)).adamw_update(*arguments.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tensors": [torch.ones(3).double()]}, r"tensors\[0\] is float64, not float32, bfloat16 or float16"),
        ({"tensors": [torch.ones(4, 2).t()]}, r"tensors\[0\] \[2,4\] has stride 2 in dimension 1, not 1"),
        ({"tensors": [torch.ones(5000)]}, r"sums \[1\] has 1 elements, not 2"),
        ({"norm": torch.ones(2)}, r"norm \[2\] has 2 elements, not 1"),
    ],
)
def test_emulated_a_norm_that_does_not_fit_is_named(change: dict[str, object], says: str) -> None:
    arguments = {
        "tensors": [torch.ones(3)], "unscale": 1.0, "sums": torch.ones(1), "norm": torch.ones(1),
        "non_finite": torch.ones(1),
    }  # fmt: skip
    with emulated(), pytest.raises(RuntimeError, match="adamw_norm: " + says):
        library.operators(torch.ones(1)).adamw_norm(*(arguments | change).values())

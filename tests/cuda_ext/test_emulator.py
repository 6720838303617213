"""The emulator is held to CUDA's rules, and catches what it is there for: planted faults, and real kernels with a
barrier or a bound taken out. Each library runs in a process of its own, which nothing else has loaded kernels into."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ext.build import ADDRESS, BUILT, EMULATOR, ROOT, Kind, build, kernels
from tests.cuda_ext.emulated import SCHEDULES

PLANTED = Path(__file__).parent / "planted/kernel.cu"
BEGIN = """
import ctypes, sys, torch
from cuda_ext import library
assert library._register(sys.argv[1]) == ""
ops, emulate = torch.ops.cuda_ext_emulator, ctypes.CDLL(sys.argv[1]).cuda_ext_emulate
emulate.argtypes = [ctypes.c_uint32, ctypes.c_int64, ctypes.c_int64]
x, y = torch.arange(1.0, 65.0), torch.zeros(64)
"""
NORM = """
emulate(int(sys.argv[2]), 0, 1 << 40)
x, y, inverse = torch.randn(1, 1000), torch.zeros(1, 1000), torch.zeros(1)
ops.rms_norm_forward(x, None, torch.ones(1000), 1e-5, y, None, inverse)
print(torch.allclose(y, torch.nn.functional.rms_norm(x, (1000,), eps=1e-5)))
"""
MATMUL = """
a, b = torch.randn(130, 456).bfloat16(), torch.randn(456, 264).bfloat16()
for seed, rung in [(seed, rung) for seed in map(int, sys.argv[2:]) for rung in (5, 6, 7)]:
    emulate(seed, 0, 1 << 40)
    c = torch.zeros(130, 264).bfloat16()
    try:
        ops.matmul(rung, a, b, c)
        print(torch.allclose(c.float(), a.float() @ b.float(), rtol=0.01, atol=0.01))
    except RuntimeError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(EMULATOR, tmp_path_factory.mktemp("planted"), [PLANTED])


@pytest.fixture(scope="module")
def planted_with_bounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ADDRESS, tmp_path_factory.mktemp("planted"), [PLANTED])


def run(
    code: str, library: Path, *words: str, home: Path = ROOT.parent, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + code, str(library), *words]
    place = os.environ | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=home, capture_output=True, text=True, env=place, timeout=200, check=False)


def sanitized(code: str, library: Path, *words: str, home: Path = ROOT.parent) -> subprocess.CompletedProcess[str]:
    return run(code, library, *words, home=home, **sanitizer())


def sanitizer() -> dict[str, str]:
    """AddressSanitizer in a Python that was built without it; it must find C++'s exceptions when it starts."""
    names = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    return {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def test_lanes_see_each_other_as_on_a_card(planted: Path) -> None:
    code = """
x[40] = -1
outs = [torch.zeros(64) for _ in range(3)] + [torch.zeros(64, dtype=torch.int64)]
ops.planted_lanes(x, *outs)
up, down, across, votes = outs
for w in (slice(0, 32), slice(32, 64)):
    a = x[w]
    assert torch.equal(up[w], torch.cat([a[:1], a[:-1]]))
    assert torch.equal(down[w], torch.cat([a[2:], a[-2:]]))
    assert torch.equal(across[w], torch.cat([a[16:], a[:16]]))
assert set(votes[:32].tolist()) == {2**32 - 1} and set(votes[32:].tolist()) == {2**32 - 1 - 2**8}
"""
    done = run(code, planted)
    assert done.returncode == 0, done.stderr


def test_blocks_run_or_are_left_out(planted: Path) -> None:
    code = "emulate(1, 3, 5); ops.planted(6, x[:8], y); print(y[:8].int().tolist())"
    assert run(code, planted).stdout == "[0, 0, 0, 3, 4, 5, 0, 0]\n"


def test_a_barrier_is_a_barrier_and_a_missing_one_is_seen(planted: Path) -> None:
    code = """
for seed in range(3):
    for which in (0, 1):
        emulate(seed, 0, 1 << 40); ops.planted(which, x, y); print(which, torch.equal(y, x.flip(0)))
"""
    assert run(code, planted).stdout.splitlines() == ["0 True", "1 False"] * 3


@pytest.mark.parametrize(
    ("which", "says"),
    [
        (2, "planted: a block hangs: 40 of its 64 threads wait at a barrier, 24 have ended, 0 wait at a shuffle"),
        (3, "planted: a shuffle reads lane 40, which is not there"),
    ],
)
def test_what_would_hang_or_be_undefined_is_one_line(planted: Path, which: int, says: str) -> None:
    assert says in run(f"ops.planted({which}, x, y)", planted).stderr.splitlines()[-1]


REFUSED = """
def refused(op, *arguments):
    try:
        op(*arguments)
    except RuntimeError as error:
        print(error)
"""


def test_what_an_mbarrier_tells(planted: Path) -> None:
    code = """
ops.planted(8, x, y)
assert y.eq(1).all(), "ten arrivals end the phase"
for which in (7, 9, 103):
    refused(ops.planted, which, x, y)
"""
    hangs, new, card = run(REFUSED + code, planted).stdout.splitlines()
    assert hangs.startswith("planted: a block hangs: 0 of its 64 threads wait at a barrier, 0 have ended, 0 wait at")
    assert hangs.endswith("a shuffle, 64 at an mbarrier")
    assert new == "planted: an mbarrier is used that this thread does not see initialised"
    assert card == "planted: rung wgmma needs a card of compute capability 9.0, and this one has 10.3"


def test_tma_leaves_a_box_swizzled_and_zeros_outside_the_matrix(planted: Path) -> None:
    """Sixteen bytes number c of row r stand where c ^ r is."""
    code = """
x, y = torch.arange(1.0, 11 * 40 + 1).view(11, 40), torch.zeros(8, 8, 4)
ops.planted_box(16, 6, 0, x, y)
padded = torch.zeros(14, 48)
padded[:11, :40] = x
for row in range(8):
    for chunk in range(8):
        assert torch.equal(y[row, chunk ^ row], padded[6 + row, 16 + 4 * chunk :][:4])
for fault in [1] * 9 + [2]:
    refused(ops.planted_box, 16, 6, fault, x, y)
"""
    done = run(REFUSED + code, planted)
    assert done.returncode == 0, done.stderr
    *ended, twice = done.stdout.splitlines()
    assert set(ended) == {"planted_box: a block ends while copies are on their way to it: 1"}
    assert 0 < len(ended) < 9, "they land at random"
    assert twice == "planted_box: an mbarrier gets more arrivals than the 1 of its phase"


@pytest.mark.parametrize(("which", "where"), [(4, "beyond("), (5, "beyond_shared(")])
def test_an_access_out_of_bounds_is_named_with_its_line(planted_with_bounds: Path, which: int, where: str) -> None:
    done = sanitized(f"ops.planted({which}, x, y)", planted_with_bounds)
    assert "heap-buffer-overflow" in done.stderr
    assert where in done.stderr
    assert "kernel.cu:" in done.stderr
    assert sanitized("ops.planted(0, x, y)", planted_with_bounds).returncode == 0


def test_a_wide_access_that_does_not_begin_on_its_width_is_named(planted_with_bounds: Path) -> None:
    """A card stops there; a CPU would go on."""
    done = sanitized("ops.planted(10, x, y)", planted_with_bounds)
    assert "device.cuh:" in done.stderr
    assert "misaligned address" in done.stderr
    assert done.returncode


def mutated(folder: Path, kind: Kind, change: Callable[[str], str], name: str, op: str = "rms_norm") -> Path:
    """The library of `op` alone, with one header changed."""
    shutil.copytree(ROOT, folder / "cuda_ext", ignore=shutil.ignore_patterns("built", "__pycache__"))
    header = folder / "cuda_ext" / name
    before = header.read_text()
    header.write_text(change(before))
    assert header.read_text() != before
    for same in BUILT.glob(f"{kind.name}-binding-*.o"):
        shutil.copy(same, folder)  # taken where its own headers are the same
    words = "import sys, pathlib, cuda_ext.build as b; print(b.build(b.KINDS[sys.argv[1]], pathlib.Path(sys.argv[2]), "
    words += "[b.ROOT / sys.argv[3] / 'kernel.cu']))"
    done = subprocess.run(
        [sys.executable, "-c", words, kind.name, str(folder), op],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)}, check=True,
    )  # fmt: skip
    return Path(done.stdout.strip())


def test_a_kernel_without_one_of_its_barriers_gives_other_numbers(tmp_path: Path) -> None:
    barrier = "  __syncthreads();\n  value = warp_sum(lane"
    library = mutated(
        tmp_path, EMULATOR, lambda text: text.replace(barrier, barrier.split("\n")[1]), "device/device.cuh"
    )
    for seed in SCHEDULES:
        assert run(NORM, library, str(seed), home=tmp_path).stdout == "False\n"


def test_a_kernel_without_one_of_its_bounds_is_caught(tmp_path: Path) -> None:
    bound = "    if (column >= width) break;\n    Pack<T, N> pack = load"
    library = mutated(
        tmp_path, ADDRESS, lambda text: text.replace(bound, "    Pack<T, N> pack = load"), "device/norm.cuh"
    )
    done = sanitized(NORM, library, "0", home=tmp_path)
    assert "heap-buffer-overflow" in done.stderr
    assert "norm_forward<" in done.stderr


def test_a_ring_that_is_read_too_early_or_filled_too_early_gives_other_numbers(tmp_path: Path) -> None:
    """Rung 6 without its wait for full stages; rung 7 handing them back before its products are done; rung 5 as is."""
    wait, done = "hopper::mbarrier_wait(filled + now.stage * 8, now.turn);", "hopper::wgmma_wait<1>();"

    def change(text: str) -> str:
        sixth, seventh = text.split("namespace specialised {", 1)
        assert (sixth.count(wait), seventh.count(done)) == (1, 1)
        return sixth.replace(wait, "") + "namespace specialised {" + seventh.replace(done, "")

    library = mutated(tmp_path, EMULATOR, change, "matmul/wgmma.cuh", "matmul")
    told = run(MATMUL, library, *map(str, SCHEDULES), home=tmp_path).stdout.splitlines()
    assert told[::3] == ["True"] * len(SCHEDULES)
    assert len(told) == 3 * len(SCHEDULES)
    assert "True" not in told[1::3] + told[2::3]


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def sanitized_tests(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Of every op that is asked for, its tests under sanitizers; two at a time."""
    build(ADDRESS)
    asked = (
        getattr(item, "callspec", None) for item in request.session.items if "sanitized_tests" in item.fixturenames
    )
    with ThreadPoolExecutor(2) as pool:
        yield {call.params["op"]: pool.submit(_sanitized_tests, call.params["op"]) for call in asked if call}


def _sanitized_tests(op: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_EXT_EMULATOR": "address", "OMP_NUM_THREADS": "1"} | sanitizer()
    words = ["-q", "-k", "test_emulated and not compiled", *map(str, Path(__file__).parent.glob(f"test_{op}*.py"))]
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=800, check=False)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", kernels())
def test_no_kernel_leaves_its_bounds_in_any_of_its_tests(op: str, sanitized_tests: Runs) -> None:
    """All that begins with test_emulated_, again, with AddressSanitizer in every tensor, and it and the sanitizer of
    undefined behaviour in the kernels."""
    done = sanitized_tests[op].result()
    assert done.returncode == 0, done.stdout + done.stderr

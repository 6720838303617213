"""What the build promises: machine code as each kernel demands, no spill, no warning; a library that torch can load."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_ext import proof
from cuda_ext.__main__ import main
from cuda_ext.build import CUDA, ROOT, BuildError, build, compile_one, compiler, kernels


def has_nvcc() -> bool:
    try:
        return bool(compiler(CUDA))
    except BuildError:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="nvcc is not here")
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
  float kept[64];
  for (int n = 0; n < 64; n++) kept[n] = x[n * 1024 + threadIdx.x];
  for (int n = 0; n < 64; n++)
    for (int m = 0; m < 64; m++) kept[m] = kept[m] * kept[(m + n) % 64] + kept[n];
  for (int n = 0; n < 64; n++) y[n * 1024 + threadIdx.x] = kept[n];
}
"""
SERIAL = """
__global__ void serial(const float* x, float* y, unsigned long long a, int steps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  float d[4] = {x[0], x[1], x[2], x[3]};
  for (int n = 0; n < steps; n++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 2; k++) {
      asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                   "{%0, %1, %2, %3}, %4, %4, p, 1, 1, 0, 1; }"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a));
      y[n * 2 + k] = d[0];  // before the wait
    }
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
#endif
}
"""
WARNS = "__global__ void warns(int* x) { int unused = 3; x[0] = 1; }"


@pytest.fixture(scope="module")
def built() -> Path:
    """All kernels, compiled side by side."""
    return build(CUDA)


@needs_nvcc
@pytest.mark.usefixtures("built")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", kernels())
def test_the_machine_code_is_as_the_kernel_demands(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", op]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == op
    assert {f"compiled  {arch}:" in told for arch in ("sm_80", "sm_90a")} == {True}
    assert "FAULT" not in told
    assert (ROOT / op / "kernel.cu").read_text().count("// sass ") == told.count("  SASS  ") > 0


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "says"), [(SPILLS, "Registers are spilled"), (WARNS, "never referenced"), (SERIAL, "serialized")]
)
def test_a_spill_or_a_warning_is_an_error(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong/kernel.cu").write_text(source)
    with pytest.raises(BuildError, match=says):
        compile_one(CUDA, tmp_path / "wrong/kernel.cu", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == [], "nothing half-made stays"


def test_demands_that_are_not_met_are_faults() -> None:
    kernels = [
        proof.Kernel("fast<float>", "sm_80", 20, 0, 0, {"LDG.E.128.CONSTANT": 2}),
        proof.Kernel("slow<float>", "sm_80", 20, 0, 8, {"LDG.E": 2}),
        proof.Kernel("new<half>", "sm_80", 4, 0, 0, {"EXIT": 1}),
        proof.Kernel("new<half>", "sm_90a", 20, 0, 0, {"HGMMA.64x128x16.F32": 4}),
    ]
    demands = {"<float>": ["LDG.E.128"], "gone<": ["HMMA"], "new< on sm_90a": ["HGMMA", "UTMALDG"]}
    demands |= {"new< on sm_90": ["HGMMA"]}
    assert list(proof._faults(kernels, demands)) == [
        "slow<float> on sm_80 uses local memory",
        "slow<float> on sm_80 has no LDG.E.128",
        "no kernel is called gone<",
        "new<half> on sm_90a has no UTMALDG",
        "no kernel is called new< on sm_90",
    ]


@needs_nvcc
def test_the_library_for_cards_loads_beside_a_torch_for_cpus(built: Path) -> None:
    """Nothing here can run it; that it loads, registers and names its needs can be seen."""
    code = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
count = library.cuda_ext_register()
driver, runtime = ctypes.c_int(), ctypes.c_int()
library.cuda_ext_versions(ctypes.byref(driver), ctypes.byref(runtime))
print(count, runtime.value >= 12000, library.cuda_ext_capability(99))
print(torch.ops.cuda_ext_cuda.rms_norm_forward.default._schema)
"""
    words = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    first, schema = done.stdout.splitlines()
    assert int(first.split()[0]) >= 4
    assert first.split()[1:] == ["True", "0"]
    assert schema.startswith("cuda_ext_cuda::rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps,")
    assert ctypes.sizeof(ctypes.c_void_p) == 8


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["card", "rms_norn"], "'rms_norn' is not an op with a kernel: choose one of "),
        (["new", "rms_norm"], "'rms_norm' cannot be the name of a new op"),
        (["new", "Bad-Name"], "'Bad-Name' cannot be the name of a new op"),
        (["benchmark", "rms_norm"], "nothing can be measured here: "),
        (["buidl"], "build [cuda|emulator|address]"),
        ([], "build [cuda|emulator|address]"),
    ],
)
def test_wrong_words_are_answered(words: list[str], says: str) -> None:
    assert says in str(main(words))

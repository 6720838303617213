"""What can be said of a kernel without running it, from its machine code: its proof card's upper half.

A kernel's file says what its machine code must hold, one line a demand, as a pattern over the kernel's demangled name:

    // sass norm_forward<.*, [1248], [48]>: LDG.E.128 STG.E.128
    // sass matmul_wgmma<.*> on sm_90a: HGMMA

No kernel may use local memory: what does not fit in registers is a defect of the kernel. Left out: all that needs a
card to run (`benchmark.py` of each op, `launch/gpu`).
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cuda_ext.build import CUDA, ROOT, BuildError, compile_one

_DEMAND = re.compile(r"^// sass (.+): ([\w. ]+)$", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. `instructions` counts each opcode with its width, as LDG.E.128."""

    name: str
    architecture: str
    registers: int
    shared: int
    local: int
    instructions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """All kernels of an op, and what is wrong with them. Example: read("rms_norm").faults == []"""

    op: str
    kernels: list[Kernel]
    demands: dict[str, list[str]]
    faults: list[str]

    def __str__(self) -> str:
        return "\n".join([*self._compiled(), *self._machine_code(), *(f"  FAULT     {fault}" for fault in self.faults)])

    def _compiled(self) -> Iterator[str]:
        for architecture in sorted({kernel.architecture for kernel in self.kernels}):
            mine = [kernel for kernel in self.kernels if kernel.architecture == architecture]
            registers = sorted(kernel.registers for kernel in mine)
            shared = max(kernel.shared for kernel in mine)
            yield (
                f"  compiled  {architecture}: {len(mine)} kernels, {registers[0]} to {registers[-1]} registers, "
                f"at most {shared} bytes of shared memory, no warning, nothing spilled"
            )

    def _machine_code(self) -> Iterator[str]:
        for pattern, opcodes in self.demands.items():
            yield f"  SASS      {pattern}: {', '.join(opcodes)} in all {len(_asked(self.kernels, pattern))}"


def read(op: str) -> Card:
    """Compile `op` for every architecture and look at what came out. BuildError: a warning, or registers spilled."""
    source = ROOT / op / "kernel.cu"
    made = compile_one(CUDA, source)
    code = [path.read_text() for path in (source, *(ROOT / "device").glob("*.cuh")) if path.exists()]
    demands = {pattern: opcodes.split() for pattern, opcodes in _DEMAND.findall("\n".join(code[:1]))}
    kernels = list(_kernels(made))
    return Card(op, kernels, demands, [*_faults(kernels, demands)])


def _faults(kernels: list[Kernel], demands: dict[str, list[str]]) -> Iterator[str]:
    for kernel in kernels:
        if kernel.local or kernel.instructions.get("LDL") or kernel.instructions.get("STL"):
            yield f"{kernel.name} on {kernel.architecture} uses local memory"
    for pattern, opcodes in demands.items():
        found = _asked(kernels, pattern)
        if not found:
            yield f"no kernel is called {pattern}"
        for kernel in found:
            for opcode in opcodes:
                if not any(name.startswith(opcode) for name in kernel.instructions):
                    yield f"{kernel.name} on {kernel.architecture} has no {opcode}"


def _asked(kernels: list[Kernel], demand: str) -> list[Kernel]:
    """The kernels that `demand`, NAME or NAME on ARCHITECTURE, speaks of."""
    name, _, architecture = demand.partition(" on ")
    return [k for k in kernels if re.search(name, k.name) and architecture in ("", k.architecture)]


def _kernels(made: Path) -> Iterator[Kernel]:
    usage = {(arch, name): numbers for arch, name, numbers in _usage(made)}
    for (architecture, mangled), instructions in _instructions(made).items():
        registers, stack, shared, local = usage[architecture, mangled]
        name = _demangled(mangled)
        yield Kernel(name, architecture, registers, shared, stack + local, instructions)


def _usage(made: Path) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    text = _run(_tool("cuobjdump"), "-res-usage", str(made))
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        for name, *numbers in _USAGE.findall(part):
            registers, stack, shared, local = map(int, numbers)
            yield part.split()[0], name, (registers, stack, shared, local)


def _instructions(made: Path) -> dict[tuple[str, str], dict[str, int]]:
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture, counts = "", {}
    for line in _run(_tool("cuobjdump"), "-sass", str(made)).splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif "Function : " in line:
            counts = found[architecture, line.split()[-1]] = {}
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            counts[match[1]] = counts.get(match[1], 0) + 1
    return found


def _demangled(name: str) -> str:
    """Without the return type and the arguments: norm_forward<float, float, false, 1, 4>."""
    text = _run("c++filt", name).strip()
    return re.sub(r"^void ", "", text).partition("(")[0]


def _tool(name: str) -> str:
    """From PATH, or from the package nvidia-cuda-cuobjdump."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for path in [Path(found)] if found else [path for place in places for path in place.glob(f"*/bin/{name}")]:
        return str(path)
    raise BuildError(f"no {name} was found: pip install nvidia-cuda-{name} nvidia-cuda-nvdisasm")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

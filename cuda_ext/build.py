"""The build of the kernels: `python -m cuda_ext build` makes the library for GPUs, if nvcc is there.

One object an op and one of the binding, two at a time, kept under a hash of sources and flags; then one library. The
emulator's library (the same sources by a C++ compiler) is made when something asks for it, for tests and for
`launch/kernel`. Left out: torch's own builder of extensions, which wants a CUDA build of torch and minutes an op.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent
BUILT = ROOT / "built"
_USUAL = Path("/usr/local/cuda")
_LOSS = "Potential Performance Loss"  # ptxas only mentions that it makes one wgmma wait for another
_CHATTER = re.compile(r"ptxas info|    \d+ bytes stack frame, .* 0 bytes spill loads")  # of -v
TARGET = (2, 11)  # the oldest torch whose stable ABI the binding speaks
ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "PTX": "arch=compute_80,code=compute_80",  # all that is newer than 8.0 and not 9.0
}
STRICT = ["-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warning-as-error"]


class BuildError(Exception):
    """A compiler that is not there, or that refused: its own words."""


@dataclass(frozen=True)
class Kind:
    """A way to compile all kernels. Example: EMULATOR"""

    name: str
    compiler: str
    flags: tuple[str, ...]
    link: tuple[str, ...] = ()


_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
_PLAIN = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-DEMULATOR", "-x", "c++", *_WARNINGS)
EMULATOR = Kind("emulator", "g++", ("-O1", *_PLAIN))
_SANITIZED = "-fsanitize=address,undefined"
ADDRESS = Kind("address", "g++", ("-O1", "-g1", _SANITIZED, "-fno-sanitize-recover=undefined", *_PLAIN), (_SANITIZED,))
CUDA = Kind(
    "cuda",
    "nvcc",
    ("-std=c++17", "-O3", "-Xcompiler=-fPIC", *(f"-gencode={words}" for words in ARCHITECTURES.values()), *STRICT),
    ("-cudart", "static"),
)
KINDS = {kind.name: kind for kind in (EMULATOR, ADDRESS, CUDA)}


def kernels() -> list[str]:
    """The ops that have a kernel, by name."""
    return sorted(path.parent.name for path in ROOT.glob("*/kernel.cu"))


def compiler(kind: Kind) -> str:
    """Its path; BuildError if there is none."""
    found = shutil.which(kind.compiler)
    if found is None and kind is CUDA and (_USUAL / "bin/nvcc").exists():
        found = str(_USUAL / "bin/nvcc")
    if found is None:
        raise BuildError(f"no {kind.compiler} was found: the {kind.name} kernels need it")
    return found


def build(kind: Kind, folder: Path = BUILT, sources: Sequence[Path] | None = None) -> Path:
    """The library of all kernels (or of these `sources`), made unless it is there."""
    files = _all_sources() if sources is None else list(sources)
    library = library_path(kind, folder, files)
    if not library.exists():
        compiler(kind), _torch_folder()  # refused before minutes of compiling
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            binding = pool.submit(_binding, kind, folder)
            objects = list(pool.map(functools.partial(compile_one, kind, folder=folder), files))
        _link(kind, [binding.result(), *objects], library)
    return library


def library_path(kind: Kind, folder: Path = BUILT, sources: Sequence[Path] | None = None) -> Path:
    """Where the library of these sources is or would be."""
    return folder / f"{kind.name}-{_hash(kind, *(_all_sources() if sources is None else sources))}.so"


def compile_one(kind: Kind, source: Path, folder: Path = BUILT) -> Path:
    """The object of one kernel."""
    made = folder / f"{kind.name}-{source.parent.name}-{_hash(kind, source)}.o"
    return made if made.exists() else _make(made, [compiler(kind), *kind.flags, *_includes(kind), "-c", str(source)])


def run(command: Sequence[str]) -> str:
    """What a compiler printed; BuildError if it refused."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or _LOSS in done.stderr:
        lines = [li for li in (done.stdout + done.stderr).splitlines() if _LOSS in li or not _CHATTER.match(li)]
        raise BuildError("\n".join([" ".join(command), *lines]))
    return done.stdout + done.stderr


def newest(kind: Kind, folder: Path = BUILT) -> Path | None:
    """The library that was made last, whatever its sources were."""
    return max(folder.glob(f"{kind.name}-*.so"), key=lambda path: path.stat().st_mtime, default=None)


def _all_sources() -> list[Path]:
    return [ROOT / op / "kernel.cu" for op in kernels()]


def _make(made: Path, command: list[str]) -> Path:
    """Its output appears whole or not at all: two builds at once do no harm."""
    made.parent.mkdir(parents=True, exist_ok=True)
    part = made.with_name(f"{made.name}.{os.getpid()}")
    try:
        run([*command, "-o", str(part)])
        part.replace(made)
    finally:
        part.unlink(missing_ok=True)
    return made


def _binding(kind: Kind, folder: Path) -> Path:
    source = ROOT / "binding/binding.cpp"
    torch = _torch_folder()
    version = f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"
    words = ["-std=c++17", "-O1", "-fPIC", f"-isystem{torch / 'include'}", version, f"-I{ROOT}"]
    words += [flag for flag in kind.flags if flag == "-DEMULATOR" or flag.startswith("-fsanitize")]
    made = folder / f"{kind.name}-binding-{_hash(kind, source)}.o"
    return made if made.exists() else _make(made, [compiler(EMULATOR), *words, "-c", str(source)])


def _link(kind: Kind, objects: list[Path], library: Path) -> None:
    torch = f"-L{_torch_folder() / 'lib'}"
    _make(library, [compiler(kind), "-shared", *map(str, objects), *kind.link, torch, "-ltorch_cpu", "-lc10", "-ldl"])


def _includes(kind: Kind) -> list[str]:
    """nvcc knows CUDA's own headers; their 16-bit types compile with any C++ compiler."""
    return [f"-I{ROOT}"] if kind is CUDA else [f"-I{ROOT}", f"-isystem{toolkit() / 'include'}"]


def toolkit() -> Path:
    """Where CUDA's headers stand: $CUDA_HOME, beside nvcc, or the usual place."""
    named = os.environ.get("CUDA_HOME")
    homes = [*([Path(named)] if named else []), Path(compiler(CUDA)).resolve().parents[1], _USUAL]
    for home in homes:
        if (home / "include/cuda_bf16.h").exists():
            return home
    raise BuildError(f"no include/cuda_bf16.h under {' or '.join(map(str, homes))}: set CUDA_HOME")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed here: pip install --no-build-isolation lets a build see it")
    return Path(spec.origin).parent


def _hash(kind: Kind, *sources: Path) -> str:
    """Of sources, of all headers, of the words to the compiler."""
    digest = hashlib.sha256(repr((kind, TARGET)).encode())
    headers = [path for room in ("device", "emulator", "binding") for path in (ROOT / room).iterdir()]
    headers += [path for source in sources for path in source.parent.glob("*.cuh")]
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]

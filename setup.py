"""The build: pure Python, and the kernels' library where nvcc is and torch can be seen (pip's --no-build-isolation).

CUDA_EXT_BUILD=0 leaves the kernels out, =1 makes their absence an error. `recipes/` travels inside the wheel as
`framework/recipes`, so the command runs anywhere.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
_SHIPPED = [str(p.relative_to("recipes")) for p in Path("recipes").rglob("*") if p.is_file()]


class BuildWithKernels(build_py):
    """Python files, then the library beside them: in the wheel, or in the checkout of an editable install."""

    def run(self) -> None:
        super().run()
        library = _library()
        if library and not self.editable_mode:
            target = Path(self.build_lib) / "cuda_ext/built"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)


class WheelWithKernels(bdist_wheel):
    """For one platform if it holds the library, for any Python all the same."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = _library() is None

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform)"""
        return ("py3", "none", super().get_tag()[2])


def _library() -> Path | None:
    from cuda_ext.build import CUDA, BuildError, build

    wish = os.environ.get("CUDA_EXT_BUILD", "auto")
    try:
        return None if wish == "0" else build(CUDA)
    except BuildError as error:
        if wish == "1":
            raise
        print(f"cuda_ext: without kernels: {str(error).splitlines()[0]}")
        return None


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
    packages=[*find_packages(include=["framework*", "cuda_ext*"]), "framework.recipes"],
    package_dir={"framework.recipes": "recipes"},
    package_data={
        "framework.recipes": _SHIPPED,
        "cuda_ext": ["*/README.md", "*/kernel.cu", "*/*.cuh", "device/*", "emulator/*", "binding/*"],
        "framework.tracking": ["*.html", "*.css"],
    },
)

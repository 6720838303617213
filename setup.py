"""The build: pure Python. `recipes/` travels inside the wheel as `framework/recipes`, so the command runs anywhere."""

from pathlib import Path

from setuptools import find_packages, setup

_SHIPPED = [str(p.relative_to("recipes")) for p in Path("recipes").rglob("*") if p.is_file()]

setup(
    packages=[*find_packages(include=["framework*", "cuda_ext*"]), "framework.recipes"],
    package_dir={"framework.recipes": "recipes"},
    package_data={
        "framework.recipes": _SHIPPED,
        "cuda_ext": ["*/README.md"],
        "framework.tracking": ["*.html", "*.css"],
    },
)

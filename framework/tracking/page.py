"""The pages that people look at: one HTML file each, which needs no network and runs no code."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from framework.tracking.atomic import replace_text
from framework.tracking.chart import number
from framework.tracking.status import duration


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill a template of this folder and put the page in place of `path`."""
    environment = Environment(
        loader=PackageLoader("framework.tracking", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration}
    page = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path

"""One page from a template: no script, no resource of elsewhere, and names that come from outside are escaped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hjepa.report import charts, tables
from hjepa.words import in_bytes


def fill(template: str, view: Mapping[str, Any]) -> str:
    """The page of a template of this folder; a name that ``view`` lacks is an error."""
    style = Markup(_source("report.css"))  # our own file, not a user's text
    return _environment().get_template(template).render(style=style, **view)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": tables.short, "percent": charts.percent, "bytes": in_bytes}
    return environment


def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")

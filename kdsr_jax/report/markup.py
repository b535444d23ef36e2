"""What all pages are made with: templates that escape everything, one style, and a policy that allows nothing besides."""

import base64
import functools
import hashlib
import pathlib
from typing import Any

import jinja2
import markupsafe

from kdsr_jax.report import charts
from kdsr_jax.report.text import clean

_HERE = pathlib.Path(__file__).parent
STYLE = charts.CSS + (_HERE / "report.css").read_text(encoding="utf-8")  # of all pages


def render_page(template: str, **values: Any) -> str:
    """Return a self-contained page: no scripts, no network, and a policy under which neither would work.

    Args:
        template: name of a template of this folder that extends base.html.j2.
        values: what it reads.
    """
    hashed = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{hashed}'; img-src data:; base-uri 'none'; form-action 'none'"
    return _environment().get_template(template).render(style=STYLE, policy=policy, **values)


@functools.cache
def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, markupsafe.Markup) else clean(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["short"] = _short
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "−")
    return environment


def _short(text, most=90):
    text = str(text)
    return text if len(text) <= most else text[: most - 1] + "…"

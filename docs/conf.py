"""Builds the pages under docs/ and the API's index: ``sphinx-build -W docs out/docs``."""

import re
from typing import Any

import fastddim

project = "fastddim"
author = "The fastddim authors"
copyright = "2026, The fastddim authors"
version = release = fastddim.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.programoutput",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Without these names a signature shows the types that they stand for, over many lines.
_ALIASES = ("Float32", "Prediction", "PredictionSynonym", "Spacing", "npt.ArrayLike")
autodoc_type_aliases = {name: name for name in _ALIASES}
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"fastddim {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def _keep_equations(*arguments: Any) -> None:
    """Shows an indented block as it stands: it holds equations or code, which Sphinx would wrap."""
    *_, lines = arguments
    made: list[str] = []
    outer = ""
    for line in lines:
        begins = line.startswith("    ") and made and not made[-1].strip()
        if begins and outer and not outer.startswith((" ", "-")) and not outer.endswith("::"):
            made += ["::", ""]
        if line.strip():
            outer = line
        made.append(line)
    lines[:] = made


def _name_aliases(*arguments: Any) -> tuple[str | None, str | None]:
    """Shows an alias by its name alone in a union too, where autodoc shows its stand-in."""
    signature, returns = (
        text and re.sub(r"TypeAliasForwardRef\('(.*?)'\)", r"\1", text) for text in arguments[-2:]
    )
    return signature, returns


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", _name_aliases)
    app.connect("autodoc-process-docstring", _keep_equations, priority=400)

"""Builds the pages under docs/ and the API's index: ``sphinx-build -W docs out/docs``."""

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
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"fastddim {version}"

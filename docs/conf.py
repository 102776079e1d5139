"""Sphinx configuration: Markdown by MyST, API reference from docstrings, theme furo. The build needs no network."""

from __future__ import annotations

import fastlstm

project = "fastlstm"
author = "fastlstm contributors"
copyright = "fastlstm contributors, BSD-3-Clause"
version = release = fastlstm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_static"]
# myst.xref_missing: links to Markdown files outside of docs/ (tests/README.md), which become plain text below.
# tests/tools/test_docs.py checks every link and anchor.
suppress_warnings = ["config.cache", "myst.xref_missing"]

highlight_language = "text"  # of blocks that name none: diagrams, command lines
smartquotes = False
default_role = "py:obj"  # docstrings use single backticks
myst_enable_extensions = ["tasklist"]
myst_heading_anchors = 4

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes and dtypes, which signatures do not

html_theme = "furo"
html_title = f"fastlstm {release}"
html_static_path = ["_static"]
html_css_files = ["fastlstm.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def remove_dead_links(app, doctree, name) -> None:
    """Replace links to Markdown files that are not pages by their text."""
    for link in list(doctree.findall(lambda node: node.tagname == "reference")):
        target = link.get("refuri", "") or link.get("refid", "")
        if target.endswith(".md") and "://" not in target:
            link.replace_self(link.children)


def setup(app) -> None:
    app.connect("doctree-resolved", remove_dead_links)

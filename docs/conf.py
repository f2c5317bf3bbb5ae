"""Sphinx's options, and what it is told beyond them. Its sources are the files of the repository, under their paths."""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pages
import public
import reference
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

project = html_title = "fm_jax"
project_copyright = "The fm_jax authors, Apache-2.0"
language = "en-GB"
extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_codeautolink"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "experiments/README.md",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "site", "runs"]
nitpicky = True
suppress_warnings = ["codeautolink"]  # names in code that cannot be linked stay as they are

# Markdown and notebooks. Their outputs are stored: nothing runs here.
highlight_language = "text"
smartquotes_action = "D"  # dashes only: quotation marks in docstrings are Python's
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "fieldlist", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4

# The reference.
add_module_names = False
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
codeautolink_concat_default = True

# MathJax from a Python package, so that the pages need no network; SVG, so that they need no fonts.
mathjax_path = "tex-svg-full.js"
MATHJAX = next(file for file in metadata.files("sphinx-mathjax-offline") or () if file.name == mathjax_path)
mathjax3_config = {"svg": {"fontCache": "global", "scale": 0.95}, "options": {"enableMenu": False}}

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["_static", str(MATHJAX.locate())]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/mark.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_exclude = ".linenos, .gp, .go"


def rewrite(app: Sphinx, name: str, source: list[str]) -> None:
    """Gives a page the text that it has on the site."""
    source[0] = reference.described(pages.page(str(app.env.doc2path(name, base=False)), source[0]))


def resolve_type(app: Sphinx, env: Any, node: addnodes.pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Types of ours in signatures get their link; those of other libraries stay plain text."""
    if node.get("refdomain") != "py" or node["reftarget"].startswith("fm_jax."):
        return None
    path = public.find(node["reftarget"], node.get("py:module", "")) or ""
    resolve = env.domains.python_domain.resolve_xref
    return resolve(env, node["refdoc"], app.builder, "obj", path, node, contnode) or contnode


def alias_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """From a file's source, viewcode links back as if all of it were imported from where the first object of it is."""
    for signature in doctree.findall(addnodes.desc_signature):
        package, _, file = (signature.get("module") or "").rpartition(".")
        if file and package.startswith("fm_jax."):
            signature["ids"].append(f"{package}.{signature['fullname']}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", rewrite)
    app.connect("doctree-read", alias_anchors)
    app.connect("missing-reference", resolve_type)

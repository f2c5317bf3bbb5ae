"""Sphinx's options. The site is built by docs/build.py, which collects its sources first."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fm_jax

project = "fm_jax"
author = "The fm_jax authors"
project_copyright = "The fm_jax authors, Apache-2.0"
version = release = fm_jax.__version__
language = "en-GB"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_codeautolink",
    "hooks",
]
nitpicky = True
suppress_warnings = ["codeautolink"]  # names in code that cannot be linked stay as they are

# Markdown and notebooks. Their outputs are stored: nothing runs here.
smartquotes_action = "D"  # dashes only: quotation marks in docstrings are Python's
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# The reference.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
codeautolink_concat_default = True
codeautolink_autodoc_inject = False

# MathJax from a Python package, so that the pages need no network; SVG, so that they need no fonts.
MATHJAX = next(f for f in metadata.files("sphinx-mathjax-offline") or () if f.name == "tex-svg-full.js").locate()
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"svg": {"fontCache": "global", "scale": 0.95}, "options": {"enableMenu": False}}

html_theme = "furo"
html_title = "fm_jax"
pygments_dark_style = "github-dark"
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/mark.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

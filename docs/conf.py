"""Sphinx's settings. ``sphinx-build -W -b html docs docs/_build/html`` builds the site; nothing is downloaded.

``-t reference`` builds the API pages alone, in seconds.
"""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import command_help
import make_gallery
import public_names

sys.modules["torchvision"] = None  # missing to transformers, whose import breaks where it was built for another torch

project = "cwfast"
author = "the cwfast authors"
release = metadata.version("cwfast")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "_gallery", "jupyter_execute"]
default_role = "py:obj"  # a name in single backticks is a link

html_theme = "furo"
html_title = f"cwfast {release}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["tables.css"]

if tags.has("reference"):  # noqa: F821  (Sphinx defines it)
    root_doc = "api/index"
    include_patterns = ["api/**"]
else:
    make_gallery.make_where_missing()
    html_extra_path = ["_gallery/pages"]

myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|collections|matplotlib|os|pathlib|types|typing)\..*|Figure"),  # documented elsewhere
    (r"py:class", r"cwfast\..*"),  # annotations: not every type has a public name
]


def setup(app):
    app.add_directive("command-help", command_help.CommandHelp)
    app.connect("autodoc-process-docstring", public_names.readable, priority=400)  # before napoleon's
    app.connect("autodoc-process-signature", public_names.signature)
    app.connect("autodoc-skip-member", public_names.skipped)
    app.connect("missing-reference", public_names.resolved)
    app.connect("env-check-consistency", public_names.complete)

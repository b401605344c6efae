"""How the documentation is built: ``make docs``, strictly, into docs/_build/html.

Pages in concepts/, howto/ and tutorials/ join by being there. The references are made from the code at each build.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import references  # noqa: E402

import stackwise  # noqa: E402

project = "StackWise"
author = "The StackWise authors"
copyright = "2026, The StackWise authors"
version = release = stackwise.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"StackWise {version}"
html_extra_path = ["llms.txt"]
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
# Types of other packages have no page here.
nitpick_ignore_regex = [("py:.*", ".*")]

references.write(HERE / "reference")

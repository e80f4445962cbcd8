"""The documentation site: ``make docs`` builds it, and a warning is an error."""

import ka_attention.hf
from ka_attention import KAAttention

project = "KA-attention"
author = copyright = "the KA-attention contributors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "results/*/results.json"]

html_theme = "furo"
html_title = "KA-attention"
html_static_path = ["_static"]
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

autodoc_typehints = "none"  # signatures carry them
autodoc_member_order = "bysource"
napoleon_custom_sections = []

# The modules are imported above, so that a docstring that cannot be found is an error here and not a silent gap.
documented = [KAAttention, *(getattr(ka_attention.hf, name) for name in ka_attention.hf.__all__)]

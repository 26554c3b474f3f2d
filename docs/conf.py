"""Configuration of the documentation, built by ``make docs``."""

import importlib.metadata

project = "optax-cautious"
author = "The optax-cautious authors"
copyright = f"2026, {author}"
release = version = importlib.metadata.version(project)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

pygments_style = "default"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme = "furo"
html_title = project

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

# Signatures show the defaults as they are written, one argument per line.
autodoc_preserve_defaults = True
autodoc_typehints = "none"
maximum_signature_line_length = 60
napoleon_google_docstring = True
napoleon_use_rtype = False
add_module_names = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Every reference within the site must resolve; those to JAX and Optax are not checked.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(jax|optax)\..*")]

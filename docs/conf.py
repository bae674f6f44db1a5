"""The site: the course as a book, from the committed outputs. ``make site`` calls it; no network.

``docs/site.py`` lays the sources out as they lie in the repository, so that links hold.
"""

project = "Lethe"
author = "the authors of Lethe"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
root_doc = "index"
suppress_warnings = ["myst.header"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # nothing is fetched: a widget's picture is its plain output
html_theme = "sphinx_book_theme"
html_title = "Lethe"
html_copy_source = False
html_show_sphinx = False
mathjax_path = "mathjax/tex-chtml.js"
html_theme_options = {
    "repository_url": "https://github.com/lethe-course/lethe",
    "repository_branch": "main",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": False,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}

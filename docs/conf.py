"""The site that `make docs` builds: README and these pages as they stand, with navigation and search (Sphinx)."""

from importlib.metadata import version as installed
from pathlib import Path

project = "slm_exp"
version = release = installed("slm_exp")
html_title = f"slm_exp {version}"
html_theme = "furo"
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source = html_show_copyright = False
extensions = ["myst_parser"]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3  # links such as recovery.md#measured, as GitHub has them
suppress_warnings = ["myst.header"]  # a table's page starts as it does where it is pasted in: with a heading of level 2
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/results/*.md", "examples/*.md"]

PAGES = ["your_own", "runs", "commands", "python", "plugins", "models", "methods", "evaluation", "claims", "recovery",
         "sweeps", "tables", "reproduce", "results/README", "handover", "reliability", "scale", "speed", "log"]
TABLES = sorted(page.stem for page in Path(__file__).parent.glob("results/[a-z]*.md"))


def contents(*pages):
    """As MyST writes them; not in the pages themselves, where GitHub would show a block of code."""
    return "\n".join(["", "```{toctree}", ":hidden:", *pages, "```", ""])


def setup(app):
    added = {root_doc: contents(*(f"docs/{page}" for page in PAGES), "examples/README", "CONTRIBUTING", "CHANGELOG"),
             "docs/results/README": contents(*(f"{table} <{table}>" for table in TABLES))}  # fmt: skip

    def add(_, page, text):
        text[0] += added.get(page, "")

    app.connect("source-read", add)

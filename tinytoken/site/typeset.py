"""What Sphinx is told: its settings, the styles that are added, and as its extension two hooks."""
import functools
import re
from typing import Any

from .. import __version__

STYLE = """\
article table { display: block; overflow-x: auto; max-width: 100%; }
article img { background: #fff; }  /* pictures are drawn on white */
.downloads a { display: inline-block; padding: .2rem .7rem; margin: 0 .3rem .3rem 0; border: 1px solid;
  border-radius: .3rem; }
.formula { overflow-x: auto; overflow-y: hidden; padding: .2rem 0; }
mtable.cases mtd { text-align: left; }
mtable.ams-align { math-style: normal; }
mtable.ams-align mtd { padding: .2em 0; text-align: right; text-align: -webkit-right; }  /* Chromium's */
mtable.ams-align mtd:nth-child(even) { text-align: left; }
mtable.ams-align mtd:nth-child(odd):not(:first-child) { padding-left: 2em; }
"""
SETTINGS: dict[str, Any] = {  # of Sphinx
    "project": "tinytoken", "release": __version__, "html_title": "tinytoken", "html_theme": "furo",
    "extensions": ["myst_parser", "sphinx.ext.autodoc", "tinytoken.site.typeset"],
    "html_domain_indices": False, "html_use_index": False,
    "suppress_warnings": ["myst.header"],  # an assignment goes from its title to its exercises
    "html_static_path": ["_static"], "html_css_files": ["tinytoken.css"], "html_extra_path": ["extra"],
    "exclude_patterns": ["extra"], "html_copy_source": False,
    "html_show_copyright": False, "html_math_renderer": "mathml",
    "html_theme_options": {"navigation_with_keys": True}, "pygments_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark", "highlight_language": "text",
    "myst_enable_extensions": ["dollarmath"], "myst_heading_anchors": 3, "myst_dmath_double_inline": True,
    "autodoc_typehints_format": "short", "autodoc_member_order": "bysource",
    "python_maximum_signature_line_length": 100,
    "autodoc_default_options": {"members": True, "show-inheritance": True}}


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's hook: formulas as MathML, and docstrings that are plain text."""
    def show(block, self, node):
        from docutils.utils.math.latex2mathml import tex2mathml
        made = str(tex2mathml(node.astext(), as_block=block))
        self.body.append(f'<div class="formula">{made}</div>' if block else made)
        raise nodes.SkipNode
    from docutils import nodes
    app.add_html_math_renderer("mathml", (functools.partial(show, False), None),
                               (functools.partial(show, True), None))
    app.connect("autodoc-process-docstring", plain_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def plain_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """autodoc's hook: make reStructuredText, in place, of a docstring in plain text.

    A paragraph that is indented stays as it is written. In any other, a line with others indented under it
    begins an item of a list, as the arguments do."""
    made: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        own = paragraph.splitlines()
        if all(line.startswith("  ") for line in own):
            made += ["::", "", *(f"  {line}" for line in own), ""]
            continue
        listed = any(line.startswith(" ") for line in own)
        for line in own:
            text = re.sub(r"([\\*|_])", r"\\\1", line.strip()).replace("`", "``")
            begins = listed and not line.startswith(" ")
            made.append(f"- {text.removeprefix('- ')}" if begins else "  " * listed + text)
        made.append("")
    lines[:] = made

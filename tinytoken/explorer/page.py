"""The page as one text of HTML: page.html with its styles and its script inside."""
import base64
import hashlib
import json
import pathlib
import re
from typing import Any

HERE = pathlib.Path(__file__).parent
SCRIPTS = ("page.js", "page_input.js")


def html(**form: Any) -> str:
    """The page. form: what its script is to know of how it is used, see the top of page.js."""
    text = (HERE / "page.html").read_text(encoding="utf-8")
    setup = json.dumps(form).replace("<", "\\u003c")
    parts = {"styles": (HERE / "page.css").read_text(encoding="utf-8"),
             "script": "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
             "form": setup}
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part)
    return text


def policy(page: str) -> str:
    """The Content-Security-Policy of a page with a server of its own: its one script, its own address."""
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None, "the page has a script"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

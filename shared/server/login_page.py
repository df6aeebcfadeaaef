"""The page that stands before the page: a form without any script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from urllib.parse import quote

from starlette.responses import HTMLResponse

from shared.ui import static_files

ICON = static_files.read("icon.svg")
STYLE = static_files.read("login.css")
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ZGP: log in</title>
<link rel="icon" href="data:image/svg+xml,{quote(ICON)}">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>ZGP</h1>
<p>Z-Image for the GPU poor</p>
<form method="post" action="login">
%s
<label for="username">Name</label>
<input id="username" name="username" autocomplete="username" autocapitalize="none" required autofocus>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<button>Log in</button>
</form>
</main>
</body>
</html>
"""


def login_page(
    problem: str = "", status: int = 200, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    """The form, with what went wrong the last time."""
    told = f'<p class="problem" role="alert">{escape(problem)}</p>' if problem else ""
    return HTMLResponse(
        PAGE.replace("%s", told), status, {"Content-Security-Policy": POLICY, **(headers or {})}
    )

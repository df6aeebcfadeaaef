"""Who may come in: names with passwords for people, tokens for programs, read from the flags."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import UserError

TOKEN_VARIABLE = "ZGP_API_TOKEN"
SHORTEST_TOKEN = 16
OWN_USER = "zgp"
_NOBODY = secrets.token_bytes(32)


@dataclass(frozen=True)
class Credentials:
    """Digests of the passwords by user and of the tokens; nobody at all means that no login is needed."""

    users: Mapping[str, bytes] = field(default_factory=dict)
    tokens: tuple[bytes, ...] = ()

    @property
    def needed(self) -> bool:
        return bool(self.users or self.tokens)

    def knows_user(self, name: str, password: str) -> bool:
        """Takes the same time for a wrong name, a wrong password and a right one."""
        right = hmac.compare_digest(digest(password), self.users.get(name, _NOBODY))
        return right and name in self.users

    def knows_token(self, token: str) -> bool:
        given = digest(token)
        return any([hmac.compare_digest(given, one) for one in self.tokens])


def digest(secret: str) -> bytes:
    """Equally long for every secret, so that comparing two tells nothing about their lengths."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def read_credentials(
    auth: Iterable[str], auth_file: Path | None, tokens: Iterable[str], exposed: bool
) -> tuple[Credentials, str]:
    """(who may come in, the password that was made up for OWN_USER or "").

    exposed: other computers reach the page, so somebody must log in. UserError for what cannot be read.
    """
    pairs = [_pair(text, "--auth") for text in auth]
    pairs += _pairs_in(auth_file) if auth_file else []
    digests = tuple(digest(_token(token)) for token in tokens)
    generated_password = ""
    if not pairs and (exposed or digests):
        generated_password = "-".join(secrets.token_hex(3) for _ in range(4))
        pairs = [(OWN_USER, generated_password)]
    return Credentials({name: digest(password) for name, password in pairs}, digests), generated_password


def _pair(text: str, where: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name.strip() and colon and password):
        # what came may be a password: it is not repeated where others can read it
        raise UserError(f"{where} came without a name, a colon or a password; expected user:password.")
    return name.strip(), password


def _pairs_in(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"--auth-file {path} cannot be read ({reason}): name a text file.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    if not numbered:
        raise UserError(f"--auth-file {path} names nobody; expected lines of user:password.")
    return [_pair(line, f"--auth-file {path}, line {number},") for number, line in numbered]


def _token(token: str) -> str:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"--api-token came with {len(token)} characters; expected at least {SHORTEST_TOKEN} letters, "
            "digits or signs without blanks."
        )
    return token

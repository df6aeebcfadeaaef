"""Large downloads begin after a yes, which is given once for each file: on the page, by a flag, or by a
program (jobs/agreements.py keeps it). Whoever starts one asks `check`. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.errors import UserError
from shared.library.model_info import ModelInfo
from shared.library.outlook import Missing, Outlook
from shared.settings.messages import size_text

LARGE = 1_000_000_000  # bytes that come without a question, LoRAs and tokenizers among them


@dataclass(frozen=True)
class Ask:
    """A download that waits for a yes. models: the names of those that it is for. files: what nobody has said
    yes to. kind: how the weights are stored, "" for several or none.
    """

    models: tuple[str, ...]
    files: tuple[Missing, ...]
    kind: str = ""

    @property
    def size(self) -> int:
        """Bytes to come."""
        return sum(one.left for one in self.files)

    @property
    def sources(self) -> list[str]:
        return [one.source for one in self.files]

    @property
    def amount(self) -> str:
        """ "11.6 GB (int8)"."""
        return amount(self.size, self.kind)

    @property
    def mark(self) -> str:
        """Tells these files from any other ones: a yes is for what was shown."""
        return hashlib.sha256(repr(self.sources).encode()).hexdigest()[:16]

    def sentence(self) -> str:
        """What is missing and who can say yes to it."""
        names, verb = " and ".join(self.models), "is" if len(self.models) == 1 else "are"
        return (
            f"{names} {verb} not on this computer: {self.amount} would have to be downloaded first. Say yes "
            "to that with Download in the tab Models, with the flag --download, or with ?download=true."
        )


def amount(size: int, kind: str) -> str:
    """ "11.6 GB (int8)"."""
    return size_text(size) + (f" ({kind})" if kind else "")


class NotAgreed(UserError):
    """A job needs a large download that nobody has said yes to."""

    def __init__(self, ask: Ask):
        super().__init__(ask.sentence())
        self.ask = ask


def asks(info: ModelInfo, found: Outlook, agreed: Collection[str]) -> Ask | None:
    """What has to be asked before this outlook comes true; None for nothing."""
    files = tuple(one for one in found.missing if one.source not in agreed)
    ask = Ask((info.name,), files, found.kind)
    return ask if ask.size > LARGE else None


def check(info: ModelInfo, found: Outlook, agreed: Collection[str]) -> None:
    """NotAgreed when a yes is missing."""
    if ask := asks(info, found, agreed):
        raise NotAgreed(ask)


def together(found: Sequence[Ask]) -> Ask | None:
    """One question for several; a file that models share is fetched once. None for no question."""
    if not found:
        return None
    models = dict.fromkeys(name for ask in found for name in ask.models)
    files = {one.source: one for ask in found for one in ask.files}
    kinds = {ask.kind for ask in found}
    return Ask(tuple(models), tuple(files.values()), kinds.pop() if len(kinds) == 1 else "")

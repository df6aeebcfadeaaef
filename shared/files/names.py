"""Names of files that every system takes. Standard library only."""

from __future__ import annotations

import re

#: characters that some system gives another meaning
UNSAFE_NAME = re.compile(r'[\\/:*?"<>|\x00-\x1f]')

#: what Windows opens a device for, whatever follows a dot (learn.microsoft.com: "Naming Files, Paths, and
#: Namespaces"); it takes superscript digits for digits, and leaves out blanks before the dot
_DEVICE = re.compile(r"(?is)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?")


def is_device(name: str) -> bool:
    """Whether Windows takes a file of that name for a device: "nul", "CON.txt", "com1 .png"."""
    return _DEVICE.fullmatch(name) is not None


def is_plain(name: str) -> bool:
    """Whether every system takes the name, for a file that lists do not hide."""
    unsafe = not name.strip() or name.startswith(".") or UNSAFE_NAME.search(name)
    return not unsafe and not is_device(name)


def without_device(name: str, mark: str = "_") -> str:
    """The name, behind a mark where it would be a device's."""
    return mark + name if is_device(name) else name

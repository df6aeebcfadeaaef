"""What start.py does: sets up, then runs ZGP or its tests.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shared import installing
from shared.cli import testing


def main(arguments: Sequence[str], usage: str) -> int:
    """Do what the arguments ask for and return the exit code. On POSIX a normal start does not return."""
    try:
        first, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
        if first == "--test":
            return testing.test(rest)
        if first == "--setup-only":
            fresh = installing.set_up([installing.REQUIREMENTS])
            print("ZGP is installed." if fresh else "ZGP was installed already.")
            return 0
        if first in ("--help", "-h"):
            print(usage)
            if not installing.is_set_up(installing.REQUIREMENTS):
                print("The flags of wgp.py are shown here once ZGP is installed (--setup-only).")
                return 0
        fresh = installing.set_up([installing.REQUIREMENTS])
        browser = ["--open-browser"] if fresh and installing.opens_page(arguments) else []
        return installing.run_zgp([*arguments, *browser])
    except installing.StartError as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"start.py: {installing.refused(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130

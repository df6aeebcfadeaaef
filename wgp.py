"""The front door: `python wgp.py` opens the page, `python wgp.py --help` lists the flags."""

import sys

from shared.cli import main

if __name__ == "__main__":
    sys.exit(main())

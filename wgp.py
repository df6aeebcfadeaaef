"""The front door: `python wgp.py` opens the page, `python wgp.py --help` lists the flags."""

import sys

from start import main


def page():
    try:
        from shared.cli.main import main as run
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("shared", "models"):
            raise
        text = "wgp.py: the package {} is not installed: start with start.py, which installs it.\n"
        sys.stderr.write(text.format(error.name))
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main("wgp.py", page))

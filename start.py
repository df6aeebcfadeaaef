"""Start ZGP: `python start.py` makes the environment in .venv on the first run, then opens the page.

    python start.py [flags of wgp.py]       set up if need be, then run wgp.py with these flags
    python start.py --setup-only            set up and stop
    python start.py --test [pytest flags]   set up with the tools for tests, then check and test everything

Any Python 3 understands this file, so that one that is too old is told so.
"""

import sys

OLDEST, NEWEST = (3, 10), (3, 13)


def refusal(name, version):
    """Why this Python cannot run ZGP; "" when it can."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return ""
    low, high, this = [".".join(map(str, one[:2])) for one in (OLDEST, NEWEST, version)]
    text = "{}: ZGP needs Python {} to {} and this is {}: start it with one of those.\n"
    return text.format(name, low, high, this)


def speak_utf_8():
    """Begin anew in Python's UTF-8 mode where the locale has another encoding: names of files could not be
    written in it.
    """
    import os

    if sys.getfilesystemencoding().lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable] + sys.orig_argv[1:])


def main(name, load):
    """Run the function that `load` imports, unless this Python is too old or too new for it."""
    said = refusal(name, sys.version_info)
    if said:
        sys.stderr.write(said)
        return 2
    speak_utf_8()
    return load()


def installing():
    from shared.cli.start import main as install_and_run

    return install_and_run(sys.argv[1:], __doc__)


if __name__ == "__main__":
    sys.exit(main("start.py", installing))

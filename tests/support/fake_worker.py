"""The worker of the tests' own family."""

import os
import sys

import pytest

FAKE_WORKER = (sys.executable, "-m", "tests.support.fake_family")
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")

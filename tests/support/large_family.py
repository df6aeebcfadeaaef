"""The tests' own family with a model of 8 GB that has to be downloaded."""

from __future__ import annotations

from shared.worker import worker
from tests.support import fake_family

URL = "https://models.example/large.safetensors"


class Handler(fake_family.Planned):
    """The file of the model "large" has 8 GB."""

    @staticmethod
    def query_download_bytes(base_type, model_def, one, source, folders=None):
        return 8 * 10**9


def handler_for(architecture):
    return Handler


if __name__ == "__main__":
    worker.main(handler_for=handler_for)

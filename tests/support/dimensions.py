"""The published models' dimensions."""

import json

from models.z_image.family import TRANSFORMER_CONFIG
from tests.support.mini import ROOT

DIT = json.loads((ROOT / TRANSFORMER_CONFIG).read_text())

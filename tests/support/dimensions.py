"""The published models' dimensions."""

import json

from models.z_image.z_image_handler import TRANSFORMER_CONFIG
from tests.support.mini import ROOT

DIT = json.loads((ROOT / TRANSFORMER_CONFIG).read_text())

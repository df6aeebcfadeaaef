"""The registry: which family handler serves which architecture. Importing it costs nothing; torch comes with
`load_model`."""

from difflib import get_close_matches

from models.family import Family as Family
from models.z_image.z_image_handler import family_handler as z_image
from shared.errors import UserError

FAMILIES: tuple[Family, ...] = (z_image,)
HANDLERS: dict[str, Family] = {name: family for family in FAMILIES for name in family.query_supported_types()}


def handler_for(architecture: str) -> Family:
    """The handler of an architecture. Raises UserError with the nearest name when there is none."""
    if architecture not in HANDLERS:
        near = get_close_matches(architecture, HANDLERS, n=1, cutoff=0.0)[0]
        raise UserError(f"The architecture '{architecture}' is not known; did you mean '{near}'?")
    return HANDLERS[architecture]

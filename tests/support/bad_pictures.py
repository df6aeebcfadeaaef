"""Pictures that are not what a program hopes for, as users have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def bad_pictures(folder: Path) -> dict[str, Path]:
    """Each 60x40 but for "other"; by what is the matter with it."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 255, (40, 60, 3)).astype(np.uint8))
    names = ("plain", "alpha", "deep", "palette", "black", "white", "other", "broken", "pixel", "large")
    paths = {name: folder / f"{name}.png" for name in names}
    paths |= {"cmyk": folder / "cmyk.jpg", "turned": folder / "turned.jpg", "moving": folder / "moving.gif"}
    plain.save(paths["plain"])
    plain.convert("P").save(paths["palette"])
    Image.new("RGB", (1, 1), "red").save(paths["pixel"])
    Image.new("L", (8000, 5000)).save(paths["large"])
    seen_through = plain.convert("RGBA")
    seen_through.paste((0, 0, 0, 0), (0, 0, 20, 20))
    seen_through.save(paths["alpha"])
    Image.fromarray(rng.integers(0, 65535, (40, 60)).astype(np.uint16)).save(paths["deep"])
    plain.convert("CMYK").save(paths["cmyk"])
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(paths["turned"], exif=exif)
    plain.save(paths["moving"], save_all=True, append_images=[plain.rotate(90), plain.rotate(180)])
    Image.new("L", (60, 40)).save(paths["black"])
    Image.new("L", (60, 40), 255).save(paths["white"])
    Image.new("L", (30, 60), 255).save(paths["other"])
    paths["broken"].write_bytes(paths["deep"].read_bytes()[:-900])
    return paths

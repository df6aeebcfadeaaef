"""Pictures as users hand them in: every format's pitfalls, in files written by Pillow, OpenCV or by hand."""

import random
import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from shared.errors import UserError
from shared.imaging import sources
from shared.imaging.sources import fit, fit_source, load_picture


def noise(width=20, height=12, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(width=64, height=48):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


def encoded(image, fmt="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def with_opencv(values, extension):
    return cv2.imencode(extension, values)[1].tobytes()


def pixels(source):
    assert source.image.mode == "RGB"
    return np.asarray(source.image)


# ---------------------------------------------------------------- what is read as it is


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "BMP", "TIFF"])
def test_a_plain_picture_is_itself_without_notes(fmt, tmp_path):
    data = encoded(Image.fromarray(noise()), fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    path = tmp_path / "a.x"
    path.write_bytes(data)
    for given in (data, path, str(path), Image.open(path)):
        source = load_picture(given)
        assert (pixels(source) == noise()).all() and source.alpha is None and source.notes == []


def test_jpeg_and_avif_are_read():
    for fmt in ("JPEG", "AVIF"):
        source = load_picture(encoded(Image.fromarray(smooth()), fmt, quality=95))
        assert np.abs(pixels(source).astype(int) - smooth()).mean() < 6 and source.notes == []


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_one_pixel_is_a_picture(mode):
    fmt = "TIFF" if mode == "CMYK" else "PNG"
    source = load_picture(encoded(Image.new(mode, (1, 1)), fmt))
    assert source.image.size == (1, 1) and source.image.mode == "RGB"


def test_gray_one_bit_and_palette_pictures_keep_their_colours():
    gray = noise(channels=1)
    assert (pixels(load_picture(encoded(Image.fromarray(gray)))) == gray[..., None]).all()
    bits = Image.fromarray(gray > 127)
    assert bits.mode == "1"
    assert (pixels(load_picture(encoded(bits))) == np.where(gray > 127, 255, 0)[..., None]).all()
    palette = Image.fromarray(noise()).quantize(16)
    assert (pixels(load_picture(encoded(palette))) == np.asarray(palette.convert("RGB"))).all()


# ---------------------------------------------------------------- corrections


def stored_for(upright, orientation):
    """How a camera stores `upright` under this EXIF orientation: the inverse of what the standard shows."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_pictures_are_turned_upright(orientation, fmt):
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(stored_for(noise(), orientation)))
    source = load_picture(encoded(stored, fmt, exif=tags))
    assert (pixels(source) == noise()).all()
    said = orientation > 1 and fmt == "PNG"  # Pillow turns a TIFF while decoding it
    assert source.notes == (["It was turned upright as its EXIF block says"] if said else [])


def test_a_turned_16_bit_picture_with_transparency():
    tags = Image.Exif()
    tags[0x0112] = 6
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 13107
    source = load_picture(encoded(Image.fromarray(values), exif=tags, transparency=0))
    assert (np.asarray(source.alpha) == np.rot90(np.array([[0, 255, 255], [255, 255, 255]]), -1)).all()
    expected = np.rot90(values // 257, -1)
    expected[0, 1] = 255  # the transparent one lies on white
    assert (pixels(source)[..., 0] == expected).all()


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_a_damaged_exif_block_costs_a_note_not_the_picture(fmt):
    source = load_picture(encoded(Image.fromarray(smooth()), fmt, exif=b"Exif\0\0nonsense"))
    assert source.image.size == (64, 48)
    assert source.notes == ["Its EXIF block is damaged; the picture is used as it lies in the file"]


@pytest.mark.parametrize("extension", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_not_clipped(extension, channels):
    ramp = np.linspace(0, 65535, 512).astype(np.uint16).reshape(2, 256)
    data = with_opencv(ramp if channels == 1 else np.stack([ramp] * 3, -1), extension)
    source = load_picture(data)
    assert np.abs(pixels(source) - (ramp / 257)[..., None]).max() <= 1
    assert len(np.unique(pixels(source))) == 256
    assert source.notes == (["Its 16-bit values were scaled to 8 bits"] if channels == 1 else [])


def test_big_endian_16_bit_tiff():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    assert (pixels(load_picture(image))[..., 0] == np.rint(ramp / 257)).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), "Its floating-point values were scaled"),
        (np.linspace(-3, 900, 256, dtype=np.float32), "Its values -3 to 900 were stretched"),
        (np.linspace(0, 65535, 256).astype(np.int32), "Its 16-bit values were scaled"),
        (np.linspace(-70000, 70000, 256).astype(np.int32), "Its values -70000 to 70000 were stretched"),
    ],
)
def test_32_bits_are_scaled_and_said(values, said):
    source = load_picture(encoded(Image.fromarray(values.reshape(16, 16)), "TIFF"))
    assert source.notes[0].startswith(said)
    assert np.abs(pixels(source)[..., 0].ravel() - np.arange(256)).max() <= 1


def test_values_that_are_no_numbers_are_refused():
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(UserError, match="no numbers"):
        load_picture(encoded(Image.fromarray(values), "TIFF"))


def over_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white_and_is_kept(fmt):
    rgba = noise(channels=4)
    data = encoded(Image.fromarray(rgba), fmt, **({"lossless": True, "exact": True} if fmt == "WEBP" else {}))
    source = load_picture(data)
    assert np.abs(pixels(source) - over_white(rgba[..., :3], rgba[..., 3])).max() <= 1
    assert source.alpha.mode == "L" and (np.asarray(source.alpha) == rgba[..., 3]).all()
    assert source.notes == ["Its transparent parts were laid on white"]


def test_gray_with_alpha():
    gray, alpha = noise(channels=1), noise(channels=1, seed=1)
    source = load_picture(encoded(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])))
    assert np.abs(pixels(source) - over_white(np.stack([gray] * 3, -1), alpha)).max() <= 1
    assert (np.asarray(source.alpha) == alpha).all()


def test_an_opaque_alpha_channel_is_no_transparency():
    rgba = np.dstack([noise(), np.full((12, 20), 255, np.uint8)])
    source = load_picture(encoded(Image.fromarray(rgba)))
    assert source.alpha is None and source.notes == [] and (pixels(source) == rgba[..., :3]).all()


def test_a_wholly_transparent_picture_is_said():
    source = load_picture(encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 0))))
    assert (pixels(source) == 255).all() and "wholly transparent" in source.notes[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_of_a_png(mode):
    image = Image.new(mode, (2, 1), 1 if mode == "P" else 0)
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), {"1": 1, "L": 7, "P": 0, "RGB": (7, 8, 9)}[mode])
    transparent = {"1": 0, "L": 0, "P": 1, "RGB": (0, 0, 0)}[mode]
    source = load_picture(encoded(image, transparency=transparent))
    assert np.asarray(source.alpha).tolist() == [[0, 255]]
    shown = {"1": (255,) * 3, "L": (7,) * 3, "P": (10, 20, 30), "RGB": (7, 8, 9)}[mode]
    assert pixels(source).tolist() == [[[255] * 3, list(shown)]]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_and_said(fmt, tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"save_all": True, "append_images": frames[1:], "duration": 50}
    data = encoded(frames[0], fmt, **options, **({"lossless": True} if fmt == "WEBP" else {}))
    (tmp_path / "move.x").write_bytes(data)
    source = load_picture(tmp_path / "move.x")
    assert (pixels(source) == (255, 0, 0)).all()
    assert source.notes == ["move.x holds 3 frames; the first one is used"]


def test_cmyk():
    cmyk = Image.merge("CMYK", [Image.new("L", (4, 4), value) for value in (255, 0, 0, 0)])
    for fmt in ("JPEG", "TIFF"):
        source = load_picture(encoded(cmyk, fmt))
        red, green, blue = pixels(source)[0, 0].astype(int)
        assert red < 10 and green > 245 and blue > 245  # cyan ink takes red away
        assert source.notes == ["It is CMYK without a colour profile; its colours are approximate"]


def curve_profile(gamma_times_256=256, primaries=((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971),
                                                  (0.1431, 0.0606, 0.7141))):  # fmt: skip
    """An ICC v2 matrix profile written by hand: sRGB's primaries (D50), one gamma for all channels."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, gamma_times_256) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none", b"wtpt": xyz((0.9642, 1, 0.8249))}
    for channel, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[channel + b"XYZ"] = xyz(primary)
        tags[channel + b"TRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb_of_linear(values):
    low = values <= 0.0031308
    return 255 * np.where(low, 12.92 * values, 1.055 * np.maximum(values, 1e-9) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("transparent", [False, True])
def test_a_colour_profile_is_converted_to_srgb(transparent):
    linear = smooth()
    image = Image.fromarray(linear)
    if transparent:
        image.putalpha(Image.new("L", image.size, 128))
    source = load_picture(encoded(image, icc_profile=curve_profile()))
    expected = srgb_of_linear(linear / 255)
    expected = over_white(expected, np.full(linear.shape[:2], 128)) if transparent else expected
    assert np.abs(pixels(source) - expected).max() < 5
    assert source.notes[0] == "Its colours were converted from linear to sRGB"


def test_the_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = load_picture(encoded(Image.fromarray(noise()), icc_profile=profile))
    assert (pixels(source) == noise()).all() and source.notes == []


@pytest.mark.parametrize("profile", [b"nonsense", curve_profile()[:200], None])
def test_an_unusable_profile_is_said(profile):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    source = load_picture(encoded(Image.fromarray(noise()), icc_profile=profile or lab))
    assert source.image.size == (20, 12)
    assert source.notes == ["Its colour profile cannot be used; its colours were taken as sRGB"]
    assert (pixels(source) == noise()).all()


# ---------------------------------------------------------------- refusals


def png(width, height, *chunks, bits=8):
    """An RGB PNG by hand: `chunks` of name and body between header and end."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_of_size(width, height):
    """A PNG that claims a size and holds next to nothing."""
    return png(width, height, (b"IDAT", zlib.compress(b"")))


def test_a_transparent_colour_of_16_bits():
    row = zlib.compress(b"\0" + struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000))
    data = png(2, 1, (b"tRNS", struct.pack(">3H", 1000, 2000, 3000)), (b"IDAT", row), bits=16)
    source = load_picture(data)
    assert np.asarray(source.alpha).tolist() == [[0, 255]]
    assert pixels(source).tolist() == [[[255, 255, 255], [156, 195, 234]]]


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on damaged files
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "BMP"])
def test_damaged_files_raise_nothing_but_user_errors(fmt):
    tags = Image.Exif()
    tags[0x0112] = 6
    extra = {} if fmt in ("GIF", "BMP") else {"exif": tags, "icc_profile": curve_profile()}
    good = encoded(Image.fromarray(noise(40, 40)), fmt, **extra)
    chance = random.Random(1)
    for _ in range(60):
        data = bytearray(good if chance.random() < 0.7 else good[: chance.randrange(1, len(good))])
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(min(len(data), 1500))] = chance.randrange(256)
        try:
            source = load_picture(bytes(data))
        except UserError:
            continue
        assert source.image.mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9000, 9000), (10_000, 10_000), (60_000, 60_000)])
def test_bombs_are_refused_before_they_are_decoded(size):
    with pytest.raises(UserError, match="more than 80 megapixels; scale it down"):
        load_picture(png_of_size(*size))


def test_large_pictures_are_scaled_down_and_said(monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIXELS", 1200)
    image = Image.fromarray(smooth())
    image.putalpha(Image.fromarray(smooth()[..., 0]))
    source = load_picture(encoded(image))
    assert source.image.size == source.alpha.size == (40, 30)
    assert source.notes[-1] == "It was scaled down from 64x48 to 40x30, the largest size worked on"


def test_a_40_megapixel_picture():
    source = load_picture(encoded(Image.new("L", (8000, 5000), 77), compress_level=1))
    width, height = source.image.size
    assert 33_000_000 < width * height <= sources.MAX_PIXELS and abs(width / height - 1.6) < 1e-3
    assert source.image.getextrema() == ((77, 77),) * 3 and len(source.notes) == 1


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(20),
             png_of_size(8, 8), b"<svg xmlns='http://www.w3.org/2000/svg'/>"], ids=range(7)
)  # fmt: skip
def test_what_is_no_picture_gets_one_sentence(data, tmp_path):
    path = tmp_path / "thing.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match="^thing.png cannot be read; expected an intact PNG, JPEG"):
        load_picture(path)
    with pytest.raises(UserError, match="^The picture cannot be read"):
        load_picture(data)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="gone.png does not exist"):
        load_picture(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        load_picture(tmp_path)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_files_are_refused(fmt):
    data = encoded(Image.fromarray(noise(64, 64)), fmt)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UserError, match="cannot be read"):
            load_picture(data[: int(len(data) * share)])


def test_a_lazily_opened_damaged_picture_is_refused_too():
    data = encoded(Image.fromarray(noise(64, 64)))
    with pytest.raises(UserError, match="cannot be read"):
        load_picture(Image.open(BytesIO(data[: len(data) // 2])))


def test_a_damaged_png_is_never_a_wrong_picture():
    good = encoded(Image.fromarray(noise(32, 32)))
    chance = random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            source = load_picture(bytes(data))
        except UserError:
            continue
        assert (pixels(source) == noise(32, 32)).all()


# ---------------------------------------------------------------- sizes


def test_a_picture_of_the_size_asked_for_is_unchanged():
    image = Image.fromarray(noise())
    for how in ("cover", "contain", "stretch"):
        fitted = fit(image, 20, 12, how)
        assert fitted.image.tobytes() == image.tobytes()
        assert fitted.box == (0, 0, 20, 12) and fitted.notes == []


def test_cover_cuts_evenly():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :15], wide[:, 25:] = 255, 255  # only the black middle fits a square
    fitted = fit(Image.fromarray(wide), 10, 10)
    assert fitted.image.size == (10, 10) and np.asarray(fitted.image).max() == 0
    assert fitted.notes == ["75% of the picture was cut off to fit 10x10"]


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (7, 13)])
def test_cover_is_an_exact_crop_resized(size):
    image = Image.fromarray(smooth(60, 60))
    ratio = size[0] / size[1]
    kept = (60 * min(1, ratio), 60 * min(1, 1 / ratio))
    box = (30 - kept[0] / 2, 30 - kept[1] / 2, 30 + kept[0] / 2, 30 + kept[1] / 2)
    expected = image.resize(size, Image.Resampling.LANCZOS, box=box)
    difference = np.asarray(fit(image, *size).image).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


def test_contain_shows_all_between_bars():
    fitted = fit(Image.new("RGB", (40, 10), "red"), 20, 20, "contain", fill=(1, 2, 3))
    got = np.asarray(fitted.image)
    assert fitted.box == (0, 7, 20, 12)
    assert (got[7:12] == (255, 0, 0)).all()
    assert (got[:7] == (1, 2, 3)).all() and (got[12:] == (1, 2, 3)).all()
    assert fitted.notes == ["Bars were added to fit 20x20"]


def test_stretch_distorts_and_says_so():
    fitted = fit(Image.fromarray(smooth(40, 10)), 20, 20, "stretch")
    assert fitted.image.size == (20, 20)
    assert fitted.notes == [
        "The picture was distorted by 300% to fit 20x20",
        "It was enlarged 2.0 times, so it is soft",
    ]


def test_shrinking_averages_instead_of_picking_pixels():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    got = np.asarray(fit(Image.fromarray(board.astype(np.uint8)), 8, 8).image)
    assert abs(got.mean() - 127.5) < 2 and got.std() < 8


def test_masks_are_fitted_without_new_values():
    mask = Image.fromarray(np.where(noise(channels=1) > 127, 255, 0).astype(np.uint8))
    for how in ("cover", "contain", "stretch"):
        fitted = fit(mask, 33, 47, how, resample=sources.NEAREST)
        assert set(np.unique(np.asarray(fitted.image))) <= {0, 255} and fitted.image.mode == "L"


@pytest.mark.parametrize("how", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (16, 512), (512, 16)])
def test_one_pixel_can_be_fitted(how, size):
    fitted = fit(Image.new("RGB", (1, 1), "red"), *size, how)
    assert fitted.image.size == size


def test_alpha_goes_the_same_way():
    rgba = np.dstack([smooth(), smooth()[..., 0]])
    source = load_picture(Image.fromarray(rgba))
    for how in ("cover", "contain", "stretch"):
        fitted = fit_source(source, 32, 32, how)
        assert fitted.image.size == fitted.alpha.size == (32, 32)
    opaque = load_picture(Image.fromarray(smooth()))
    assert fit_source(opaque, 32, 32).alpha is None
    bars = fit_source(opaque, 32, 32, "contain")
    assert np.asarray(bars.alpha)[:4].max() == 0 and np.asarray(bars.alpha)[4:28].min() == 255
    assert (pixels(bars)[:4] == 255).all() and bars.notes == ["Bars were added to fit 32x32"]


def test_an_unknown_way_and_no_size_are_refused():
    image = Image.new("RGB", (4, 4))
    with pytest.raises(UserError, match="fitted by cover, contain, stretch, not by 'zoom'"):
        fit(image, 8, 8, "zoom")
    with pytest.raises(UserError, match="0x8; expected at least 1x1"):
        fit(image, 0, 8)

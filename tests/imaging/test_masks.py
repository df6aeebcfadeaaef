"""Masks and joined pictures against brute force: distances counted pixel by pixel, random pictures."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared.errors import UserError
from shared.imaging import masks
from shared.imaging.masks import Box


def noise(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blobs(width=40, height=30, seed=0, count=4):
    """A random mask of pixels and rectangles, some of them at the border."""
    chance = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(count):
        x, y = chance.integers(width), chance.integers(height)
        mask[y : y + chance.integers(1, 8), x : x + chance.integers(1, 8)] = 255
    return Image.fromarray(mask)


def values(image):
    return np.asarray(image)


def within_by_hand(painted, pixels):
    """Every pixel that has a painted one at most `pixels` away, by trying all offsets."""
    height, width = painted.shape
    found = np.zeros_like(painted)
    for y, x in np.argwhere(painted):
        ys, xs = np.mgrid[:height, :width]
        found |= (ys - y) ** 2 + (xs - x) ** 2 <= pixels**2
    return found


# ---------------------------------------------------------------- where masks come from


def test_an_uploaded_mask_is_black_and_white():
    gray = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    mask, notes = masks.from_upload(gray, (4, 1))
    assert mask.mode == "L" and values(mask).tolist() == [[0, 0, 255, 255]]
    assert notes == ["50% of the mask is gray; the lighter half of it counts as white"]
    coloured, notes = masks.from_upload(Image.new("RGB", (4, 4), "white"), (4, 4))
    assert masks.coverage(coloured) == 1 and notes == []


def test_an_uploaded_mask_with_transparent_parts_is_a_drawing():
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (2, 3, 5, 6))  # black strokes: still what the user drew
    mask, notes = masks.from_upload(drawn, (8, 8))
    expected = np.zeros((8, 8), np.uint8)
    expected[3:6, 2:5] = 255
    assert (values(mask) == expected).all()
    assert notes == [
        "The mask has transparent parts: what is drawn is repainted, what is transparent is kept"
    ]


def test_an_editors_layer():
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((10, 200, 30, 255), (0, 0, 2, 2))
    layer.paste((10, 200, 30, 100), (4, 4, 6, 6))  # the faint border of a stroke
    assert masks.coverage(masks.from_layer(layer)) == 4 / 64
    with pytest.raises(UserError, match="came in mode RGB; expected RGBA"):
        masks.from_layer(Image.new("RGB", (8, 8)))


def test_holes_are_repainted():
    alpha = Image.fromarray(np.array([[0, 100, 200, 255]], np.uint8))
    assert values(masks.from_alpha(alpha)).tolist() == [[255, 255, 0, 0]]


def test_a_mask_of_the_pictures_shape_is_resized_and_said():
    small = blobs(20, 15)
    mask, notes = masks.from_upload(small, (40, 30))
    assert (values(mask) == values(small).repeat(2, 0).repeat(2, 1)).all()
    assert notes == ["The mask was resized from 20x15 to 40x30"]
    assert masks.of_size(Image.new("L", (512, 341)), (1536, 1024))[0].size == (
        1536,
        1024,
    )  # rounded once before


@pytest.mark.parametrize("size", [(15, 20), (20, 20), (40, 33), (16, 15)])
def test_a_mask_of_another_shape_is_refused(size):
    with pytest.raises(UserError, match=f"mask is {size[0]}x{size[1]}, its picture 40x30"):
        masks.from_upload(blobs(*size), (40, 30))


def test_black_and_white_masks_are_told():
    with pytest.raises(UserError, match="all black: nothing would be repainted"):
        masks.checked(Image.new("L", (4, 4), 0))
    assert masks.checked(Image.new("L", (4, 4), 255)) == [
        "The mask is all white: the whole picture is repainted"
    ]
    assert masks.checked(blobs()) == []


# ---------------------------------------------------------------- reshaping


@pytest.mark.parametrize("size", [(40, 30), (64, 56), (16, 8)])
def test_resizing_picks_the_nearest_pixel(size):
    mask = blobs()
    x = ((np.arange(size[0]) + 0.5) * 40 / size[0]).astype(int)
    y = ((np.arange(size[1]) + 0.5) * 30 / size[1]).astype(int)
    assert (values(masks.resize(mask, size)) == values(mask)[y][:, x]).all()


def test_inverting_twice_is_nothing():
    mask = blobs()
    assert (values(masks.invert(mask)) == 255 - values(mask)).all()
    assert masks.invert(masks.invert(mask)).tobytes() == mask.tobytes()


@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(3))
def test_growing_is_round_and_exact(pixels, seed):
    mask = blobs(seed=seed)
    assert (values(masks.grow(mask, pixels)) == within_by_hand(values(mask) > 0, pixels) * 255).all()


@pytest.mark.parametrize("pixels", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_shrinking_is_growing_the_rest(pixels, seed):
    mask = blobs(seed=seed)
    assert (
        values(masks.grow(mask, -pixels)) == ~within_by_hand(values(mask) == 0, pixels) * np.uint8(255)
    ).all()


def test_the_border_does_not_eat_the_mask():
    full, empty = Image.new("L", (9, 9), 255), Image.new("L", (9, 9), 0)
    for pixels in (-5, -1, 0, 5):
        assert masks.coverage(masks.grow(full, pixels)) == 1
        assert masks.coverage(masks.grow(empty, pixels)) == 0


def gaussian(sigma, size=61):
    x = np.arange(size) - size // 2
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


@pytest.mark.parametrize("sigma", [1.0, 2.5, 4.0])
def test_feathering_is_a_gaussian(sigma):
    mask = np.zeros((61, 61), np.uint8)
    mask[:, 30:] = 255
    got = values(masks.feather(Image.fromarray(mask), sigma))
    expected = np.convolve(np.pad(mask[0], 60, mode="edge"), gaussian(sigma), "same")[60:-60]
    assert np.abs(got - expected).max() < 2.5
    dot = np.zeros((61, 61), np.uint8)
    dot[26:35, 26:35] = 255
    blurred = values(masks.feather(Image.fromarray(dot), sigma)).astype(int)
    assert (blurred == blurred.T).all() and (blurred == blurred[::-1]).all()
    assert abs(blurred.sum() / dot.sum() - 1) < 0.02
    assert masks.feather(blobs(), 0).tobytes() == blobs().tobytes()


# ---------------------------------------------------------------- joining


@pytest.mark.parametrize("feather", [0, 1, 3, 8, 50])
@pytest.mark.parametrize("seed", range(5))
def test_unpainted_pixels_stay_exactly_what_they_were(feather, seed):
    original, generated, mask = noise(seed=seed), noise(seed=seed + 100), blobs(seed=seed)
    joined = values(masks.composite(original, generated, mask, feather))
    kept = values(mask) == 0
    assert (joined[kept] == values(original)[kept]).all()
    painted = ~kept
    low, high = (
        np.minimum(values(original), values(generated)),
        np.maximum(values(original), values(generated)),
    )
    assert ((joined >= low) & (joined <= high))[painted].all()
    if feather <= 1:
        assert (joined[painted] == values(generated)[painted]).all()


def test_the_new_picture_fades_in_inwards():
    original, generated = Image.new("RGB", (60, 40)), Image.new("RGB", (60, 40), "white")
    mask = Image.new("L", (60, 40))
    mask.paste(255, (20, 0, 60, 40))  # touches the border: no edge there
    row = values(masks.composite(original, generated, mask, 10))[20, :, 0].astype(int)
    assert (row[:20] == 0).all() and (row[29:] == 255).all()
    assert (np.diff(row[19:30]) > 0).all() and 1 <= row[20] < 30
    assert abs(row[24] - 127) < 2  # half way


def test_thin_strokes_reach_full_strength():
    original, generated = Image.new("RGB", (60, 40)), Image.new("RGB", (60, 40), "white")
    mask = Image.new("L", (60, 40))
    mask.paste(255, (5, 10, 8, 30))  # three pixels wide
    mask.paste(255, (20, 2, 58, 38))
    joined = values(masks.composite(original, generated, mask, 12))[..., 0]
    assert (joined[12:28, 6] == 255).all() and 0 < joined[20, 5] < 255
    assert joined[20, 39] == 255 and 0 < joined[20, 25] < 255


def test_a_soft_mask_mixes():
    original, generated = noise(), noise(seed=1)
    mask = masks.feather(blobs(), 2)
    weight = values(mask)[..., None] / 255
    expected = values(original) * (1 - weight) + values(generated) * weight
    assert np.abs(values(masks.composite(original, generated, mask)) - expected).max() <= 1


def test_full_and_empty_masks():
    original, generated = noise(), noise(seed=1)
    for feather in (0, 9):
        full = masks.composite(original, generated, Image.new("L", (40, 30), 255), feather)
        assert full.tobytes() == generated.tobytes()
        empty = masks.composite(original, generated, Image.new("L", (40, 30), 0), feather)
        assert empty.tobytes() == original.tobytes()


def test_sizes_that_differ_are_refused():
    with pytest.raises(UserError, match="are 40x30, 40x30, 41x30; expected one size for all"):
        masks.composite(noise(), noise(), blobs(41, 30))


# ---------------------------------------------------------------- only the masked part


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("picture", [(400, 300), (333, 517), (100, 90), (64, 700)])
def test_a_box_holds_the_mask_and_its_margin(seed, picture):
    mask = blobs(*picture, seed=seed, count=1 + seed % 3)
    box = masks.crop_around(mask, 10, min_size=64, max_size=256)
    ys, xs = np.nonzero(values(mask))
    assert (
        0 <= box.left <= max(0, xs.min() - 10) and min(picture[0], xs.max() + 11) <= box.right <= picture[0]
    )
    assert (
        0 <= box.top <= max(0, ys.min() - 10) and min(picture[1], ys.max() + 11) <= box.bottom <= picture[1]
    )
    for side, painted, whole in (
        (box.right - box.left, box.width, picture[0]),
        (box.bottom - box.top, box.height, picture[1]),
    ):
        assert painted % 16 == 0 and painted <= 256
        assert side >= min(64, whole) and (side % 16 == 0 or side == whole)
    if max(box.right - box.left, box.bottom - box.top) <= 256:  # pixel for pixel, but for the multiple
        assert 0 <= box.width - (box.right - box.left) < 16 and 0 <= box.height - (box.bottom - box.top) < 16


def test_boxes_by_hand():
    mask = Image.new("L", (1000, 800))
    mask.paste(255, (500, 400, 510, 420))
    assert masks.crop_around(mask, 32, min_size=64) == Box(465, 362, 545, 458, 80, 96)
    assert masks.crop_around(mask, 32, min_size=256) == Box(377, 282, 633, 538, 256, 256)
    corner = Image.new("L", (1000, 800))
    corner.paste(255, (990, 0, 1000, 10))
    assert masks.crop_around(corner, 32, min_size=128) == Box(872, 0, 1000, 128, 128, 128)
    everything = Image.new("L", (1000, 800), 255)
    assert masks.crop_around(everything, 32) == Box(0, 0, 1000, 800, 1008, 800)
    assert masks.crop_around(everything, 0, max_size=500) == Box(0, 0, 1000, 800, 496, 400)
    assert masks.crop_around(Image.new("L", (5, 3), 255), 9) == Box(0, 0, 5, 3, 16, 16)
    with pytest.raises(UserError, match="all black"):
        masks.crop_around(Image.new("L", (5, 3)), 9)


@pytest.mark.parametrize("max_size", [48, 256])
def test_a_part_put_back_changes_only_what_is_white(max_size):
    original = noise(123, 77)
    mask = Image.new("L", original.size)
    ImageDraw.Draw(mask).ellipse((60, 20, 100, 50), fill=255)
    box = masks.crop_around(mask, 8, min_size=32, max_size=max_size)
    part = box.cut(original)
    assert part.size == (box.width, box.height)
    assert box.cut(mask, masks.NEAREST).getextrema() == (0, 255)
    generated = noise(*part.size, seed=5)
    joined = values(box.put_back(original, generated, mask))
    white = values(mask) > 0
    assert (joined[~white] == values(original)[~white]).all()
    assert (joined[white] != values(original)[white]).any(axis=1).mean() > 0.95
    if max_size == 256:  # pixel for pixel
        placed = np.zeros_like(joined)
        placed[box.top : box.bottom, box.left : box.right] = values(generated)
        assert (joined[white] == placed[white]).all()
        assert values(box.put_back(original, part, mask)).tobytes() == original.tobytes()


# ---------------------------------------------------------------- beyond the border


@pytest.mark.parametrize(
    "amounts", [(16, 0, 0, 0), (0, 32, 0, 48), (10, 20, 30, 40), (0, 0, 1, 0), (300, 9, 0, 0)]
)
@pytest.mark.parametrize("size", [(64, 48), (50, 33)])
def test_the_original_is_unchanged_and_the_rest_is_masked(amounts, size):
    original = noise(*size)
    extended = masks.extend(original, *amounts)
    left, top, right, bottom = extended.box
    assert (right - left, bottom - top) == size
    assert extended.image.crop(extended.box).tobytes() == original.tobytes()
    assert extended.image.width % 16 == 0 == extended.image.height % 16
    assert extended.image.size == extended.mask.size
    white = values(extended.mask) == 255
    assert not white[top:bottom, left:right].any() and white.sum() == white.size - size[0] * size[1]
    got = (left, top, extended.image.width - right, extended.image.height - bottom)
    assert all(wanted <= given < wanted + 16 for wanted, given in zip(amounts, got, strict=True))
    assert bool(extended.notes) == (got != amounts)


def test_the_rounding_is_said_and_goes_where_the_picture_grows():
    extended = masks.extend(noise(50, 32), 100, 0, 0, 0)
    assert extended.box == (110, 0, 160, 32)
    assert extended.notes == [
        "It is extended by 110, 0, 0 and 0 pixels (left, top, right, bottom) instead of 100, 0, 0, 0, so "
        "that 160x32 are multiples of 16"
    ]


def test_the_new_part_continues_the_edge():
    halves = Image.new("RGB", (64, 64), "red")
    halves.paste((0, 0, 255), (32, 0, 64, 64))
    canvas = values(masks.extend(halves, 32, 32, 32, 0).image).astype(int)
    assert (canvas[:, :4] == (255, 0, 0)).all() and (canvas[:, -4:] == (0, 0, 255)).all()
    assert (canvas[0, 64] > 60)[[0, 2]].all()  # above the border between the halves: both, blurred
    assert np.abs(np.diff(canvas[8, :, 0])).max() < 40


def test_extending_by_nothing_or_less_is_refused():
    for amounts in ((0, 0, 0, 0), (16, -16, 0, 0)):
        with pytest.raises(UserError, match="expected one above 0, none below"):
            masks.extend(noise(), *amounts)
    with pytest.raises(UserError, match="would be 10048x10032; extend it by less"):
        masks.extend(noise(), 10_000, 10_000, 0, 0)

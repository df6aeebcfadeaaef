"""Control maps against OpenCV called here, known shapes, transformers' processor and mmpose's formulas."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared.errors import UserError
from shared.imaging import preprocess
from shared.imaging.preprocess import PREPROCESSORS, control_map, depth, pose

ROOT = Path(__file__).parents[2]
FREE = [name for name, preprocessor in PREPROCESSORS.items() if preprocessor.extra is None]
SQUARE = (60, 60, 190, 190)  # first and last pixel of the white square


def square():
    image = Image.new("RGB", (256, 256), (20, 20, 20))
    ImageDraw.Draw(image).rectangle(SQUARE, fill=(240, 240, 240))
    return image


def scene():
    """Shapes of several contrasts and sizes, slanted lines, a ramp and a little noise."""
    image = Image.fromarray(np.tile(np.linspace(90, 150, 256).astype(np.uint8), (192, 1))).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 90, 90), fill=(200, 40, 40))
    draw.ellipse((120, 30, 200, 110), fill=(60, 90, 130))
    draw.line((10, 180, 240, 120), fill=(250, 250, 250), width=3)
    draw.line((100, 150, 112, 156), fill=(0, 0, 0), width=2)
    draw.rectangle((150, 140, 157, 147), fill=(150, 150, 150))
    noise = np.random.default_rng(0).integers(-6, 7, (192, 256, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def values(image):
    return np.asarray(image)


def luminance(image):
    """ITU-R 601, by hand."""
    return values(image).astype(float) @ (0.299, 0.587, 0.114)


def outline_distance():
    """[256, 256]: each pixel's distance to the square's outline (behind its border pixels)."""
    y, x = np.mgrid[:256, :256]
    low, high = SQUARE[0] - 0.5, SQUARE[2] + 0.5
    outside = np.hypot(
        np.maximum(0, np.maximum(low - x, x - high)), np.maximum(0, np.maximum(low - y, y - high))
    )
    inside = np.minimum(np.minimum(x - low, high - x), np.minimum(y - low, high - y))
    return np.where(inside > 0, inside, outside)


# ---------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("size", [(64, 48), (48, 80), (16, 16)])
def test_maps_are_rgb_of_the_size_asked_for(name, size):
    made = control_map(name, scene(), *size)
    assert made.mode == "RGB" and made.size == size
    assert control_map(name, scene(), *size).tobytes() == made.tobytes()


@pytest.mark.parametrize("name", FREE)
def test_one_pixel_and_one_colour_are_no_problem(name):
    control_map(name, Image.new("RGB", (1, 1)), 16, 16)
    made = values(control_map(name, Image.new("RGB", (64, 64), (120, 120, 120)), 64, 64))
    if name in ("canny", "lines", "scribble"):
        assert made.max() == 0
    else:
        assert (made == 120).all()


OTHER_VALUES = {
    ("as_it_is", "invert"): [True],
    ("canny", "low"): [40], ("canny", "high"): [120, 500],
    ("lines", "length"): [10, 30], ("lines", "certainty"): [100],
    ("scribble", "coarseness"): [1, 12], ("scribble", "threshold"): [10, 200],
    ("scribble", "thickness"): [1, 15],
    ("tile", "factor"): [1, 2, 16],
}  # fmt: skip


def test_every_parameter_is_tried_below():
    parameters = {(name, setting.name) for name in FREE for setting in PREPROCESSORS[name].parameters}
    assert parameters == OTHER_VALUES.keys()


@pytest.mark.parametrize(("name", "parameter"), OTHER_VALUES)
def test_every_parameter_changes_the_map(name, parameter):
    maps = [control_map(name, scene(), 256, 192).tobytes()]
    maps += [control_map(name, scene(), 256, 192, {parameter: value}).tobytes()
             for value in OTHER_VALUES[name, parameter]]  # fmt: skip
    assert len(set(maps)) == len(maps)


def test_the_table_describes_itself():
    for name, preprocessor in PREPROCESSORS.items():
        assert preprocessor.name == name and preprocessor.label and preprocessor.help.endswith(".")
        checked = preprocess.checked(preprocessor, {})
        for setting in preprocessor.parameters:
            assert setting.help.endswith(".") and checked[setting.name] == setting.default
            if setting.kind is not bool:
                for edge in (setting.minimum, setting.maximum):
                    assert preprocess.checked(preprocessor, {setting.name: edge})[setting.name] == edge


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"low": -1}, "low came as -1; expected a whole number from 0 to 1000"),
        ({"low": 2.5}, "low came as 2.5; expected a whole number"),
        ({"high": "200"}, "high came as '200'; expected a whole number"),
        ({"high": float("nan")}, "high came as nan"),
        ({"high": True}, "high came as True"),
        ({"strength": 3}, "canny has no parameter 'strength'; it has low, high"),
        ({"low": 300}, "low is 300 and high is 200; expected low to be at most high"),
    ],
)
def test_unusable_values_get_one_sentence(values, said):
    with pytest.raises(UserError, match=said):
        control_map("canny", square(), 64, 64, values)


def test_unknown_names_and_flags():
    with pytest.raises(UserError, match="no control preprocessor 'hed'; choose one of as_it_is, canny"):
        control_map("hed", square(), 64, 64)
    with pytest.raises(UserError, match="invert came as 1; expected true or false"):
        control_map("as_it_is", square(), 64, 64, {"invert": 1})


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'onnxruntime'}"
    code = f"import sys, shared.imaging.preprocess; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# ---------------------------------------------------------------- maps without a model


def test_as_it_is_and_inverted():
    assert control_map("as_it_is", scene(), 256, 192).tobytes() == scene().tobytes()
    inverted = control_map("as_it_is", scene(), 256, 192, {"invert": True})
    assert (values(inverted) == 255 - values(scene())).all()


@pytest.mark.parametrize(("low", "high"), [(100, 200), (30, 60), (0, 1000)])
def test_canny_is_opencvs(low, high):
    for picture, seen in ((scene(), values(scene())), (scene().convert("L"), values(scene().convert("L")))):
        made = values(control_map("canny", picture, 256, 192, {"low": low, "high": high}))
        assert (made == cv2.Canny(seen, low, high)[..., None]).all() and set(np.unique(made)) <= {0, 255}


@pytest.mark.parametrize("name", ["canny", "lines", "scribble"])
def test_the_outline_of_a_square_is_found_white_on_black(name):
    drawn = values(control_map(name, square(), 256, 256, {"thickness": 1} if name == "scribble" else {}))
    assert (drawn[..., 0] == drawn[..., 1]).all() and (drawn[..., 0] == drawn[..., 2]).all()
    distance = outline_distance()
    strong = drawn[..., 0] > 127
    reach = 3 if name == "scribble" else 1.5  # smoothing rounds the corners off
    assert strong.any() and distance[strong].max() <= reach
    y, x = np.nonzero(strong)
    for along, across in ((x, y), (y, x)):
        for side in (SQUARE[0], SQUARE[2]):  # each of the four sides, nearly from end to end
            near = np.abs(across - side) <= 1.5
            assert len(set(along[near])) >= 110


@pytest.mark.parametrize("name", ["canny", "scribble"])
def test_colours_of_one_brightness_have_edges_too(name):
    image = Image.new("RGB", (128, 128), (98, 98, 98))
    image.paste((220, 40, 78), (40, 40, 90, 90))
    assert np.ptp(luminance(image)) < 1
    drawn = values(control_map(name, image, 128, 128))[..., 0]
    for side in (40, 90):
        assert drawn[65, side - 4 : side + 4].max() > 200 and drawn[side - 4 : side + 4, 65].max() > 200


def test_more_threshold_is_fewer_lines():
    for name, parameter, settings in (
        ("canny", "high", (120, 300, 600)),
        ("lines", "length", (0, 10, 30)),
        ("lines", "certainty", (0, 60, 150)),
        ("scribble", "threshold", (10, 60, 200)),
    ):
        drawn = [
            values(control_map(name, scene(), 256, 192, {parameter: value})).mean() for value in settings
        ]
        assert drawn == sorted(drawn, reverse=True) and drawn[0] > drawn[-1], (name, parameter, drawn)


def test_straight_lines_are_the_straight_ones():
    image = Image.new("RGB", (256, 256))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 60, 60), fill="white")
    draw.line((100, 40, 220, 200), fill="white", width=4)
    drawn = values(control_map("lines", image, 256, 256, {"length": 20}))[..., 0] > 0
    y, x = np.nonzero(drawn)
    direction = np.array([120, 160]) / 200
    across = np.abs((x - 100) * direction[1] - (y - 40) * direction[0])
    assert len(x) > 250 and across.max() < 4  # both borders of the line, nothing of the circle


def test_scribbles_are_thick_and_soft():
    thin, thick = (
        values(control_map("scribble", square(), 256, 256, {"thickness": thickness}))[..., 0].astype(float)
        for thickness in (3, 11)
    )
    row = thick[125]
    assert row[45:75].max() > 220 and 9 <= (row[40:80] > 127).sum() <= 13
    assert ((row > 20) & (row < 230)).sum() >= 4  # soft borders
    assert thick.sum() > 2.5 * thin.sum()


def test_scribbles_follow_outlines_not_fine_detail():
    image = square()
    cells = (np.indices((40, 40)) // 4).sum(0) % 2 * 200
    image.paste(Image.fromarray(cells.astype(np.uint8)), (5, 5))
    fine, coarse = (
        values(control_map("scribble", image, 256, 256, {"coarseness": coarseness}))[..., 0]
        for coarseness in (0.5, 6)
    )
    assert fine[15:35, 15:35].mean() > 50 and coarse[15:35, 15:35].max() == 0
    assert coarse[125, 55:65].max() > 200


def test_gray_is_luminance_three_times():
    made = values(control_map("gray", scene(), 256, 192)).astype(float)
    assert np.abs(made - luminance(scene())[..., None]).max() <= 1


def test_tile_loses_detail_and_keeps_colours():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    flat = values(control_map("tile", Image.fromarray(board).convert("RGB"), 64, 64, {"factor": 4}))
    assert np.abs(flat - 127.5).max() <= 1
    blocks = values(scene()).reshape(48, 4, 64, 4, 3).mean((1, 3))
    tiled = values(control_map("tile", scene(), 256, 192, {"factor": 4}))
    small = np.asarray(Image.fromarray(tiled).reduce(4), float)
    assert np.abs(small - blocks).mean() < 3
    assert control_map("tile", scene(), 256, 192, {"factor": 1}).tobytes() == scene().tobytes()


# ---------------------------------------------------------------- extras


def ready(monkeypatch, *packages):
    """As if these packages were installed."""
    find = preprocess.importlib.util.find_spec
    monkeypatch.setattr(preprocess.importlib.util, "find_spec", lambda name: name in packages or find(name))


@pytest.mark.parametrize("name", ["depth", "pose"])
def test_extras_say_what_they_need(name, monkeypatch, tmp_path):
    extra = PREPROCESSORS[name].extra
    assert extra.licence == "Apache-2.0" and extra.size == {"depth": "99 MB", "pose": "351 MB"}[name]
    with monkeypatch.context() as patch:
        patch.setattr(preprocess.importlib.util, "find_spec", lambda package: None)
        assert preprocess.missing(name, tmp_path).endswith(f"pip install {extra.package}")
    ready(monkeypatch, extra.package)
    said = preprocess.missing(name, tmp_path)
    assert all(file.url in said and str(tmp_path / file.path) in said for file in extra.files)
    with pytest.raises(UserError, match="needs files"):
        control_map(name, scene(), 64, 64, folder=tmp_path)
    for file in extra.files:
        assert not preprocess.available(name, tmp_path)
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).touch()
    assert preprocess.available(name, tmp_path) and preprocess.missing(name, tmp_path) == ""


def test_the_others_need_nothing(tmp_path):
    assert all(preprocess.available(name, tmp_path) for name in FREE)


# ---------------------------------------------------------------- depth


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    """A model of Depth Anything's class with random weights, as a folder that from_pretrained reads."""
    torch = pytest.importorskip("torch")
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=56,
                            patch_size=14, out_features=["stage1", "stage2"],
                            reshape_hidden_states=False)  # fmt: skip
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16,
                                 reassemble_factors=[2, 1], neck_hidden_sizes=[8, 8], fusion_hidden_size=8,
                                 head_hidden_size=8)  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("ckpts")
    model.save_pretrained(folder / depth.FOLDER)
    return folder


def processor(detail):
    """transformers' own processor with the published settings of Depth-Anything-V2-Small-hf."""
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    return DPTImageProcessorPil(
        size={"height": detail, "width": detail}, ensure_multiple_of=14, keep_aspect_ratio=True, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip


@pytest.mark.parametrize("size", [(256, 192), (90, 333), (640, 64), (700, 560)])
@pytest.mark.parametrize("detail", [252, 266])
def test_the_depth_models_input_is_transformers(size, detail):
    pytest.importorskip("torch")
    picture = scene().resize(size)
    expected = processor(detail)(images=picture, return_tensors="pt")["pixel_values"]
    got = depth.pixel_values(values(picture), detail)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5


def test_a_depth_map_is_the_models_output_normalized(depth_folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForDepthEstimation

    model = AutoModelForDepthEstimation.from_pretrained(depth_folder / depth.FOLDER).eval()
    with torch.no_grad():
        output = model(**processor(252)(images=scene(), return_tensors="pt")).predicted_depth
    large = torch.nn.functional.interpolate(
        output[None], size=(192, 256), mode="bicubic", align_corners=False
    )[0, 0]
    expected = ((large - large.min()) / (large.max() - large.min()) * 255).numpy()
    made = values(control_map("depth", scene(), 256, 192, {"detail": 252}, folder=depth_folder)).astype(float)
    assert np.abs(made - expected[..., None]).max() <= 1.01 and made.min() == 0 and made.max() >= 254
    other = control_map("depth", scene(), 256, 192, {"detail": 280}, folder=depth_folder)
    assert (values(other) != made).any()


def test_near_is_bright_for_metric_models_too():
    torch = pytest.importorskip("torch")

    class Stub:
        device, dtype = "cpu", torch.float32

        def __init__(self, kind):
            self.config = type("Config", (), {"depth_estimation_type": kind})

        def __call__(self, pixel_values):
            return type("Output", (), {"predicted_depth": torch.tensor([[[1.0, 4.0]]])})

    pixels = torch.zeros(1, 3, 14, 28)
    assert depth.predict(Stub("relative"), pixels).tolist() == [[1, 4]]
    assert depth.predict(Stub("metric"), pixels).tolist() == [[1, 0.25]]
    assert (
        depth.shown(np.ones((2, 2), np.float32), 4, 4).max() == 0
    )  # one distance everywhere: no division by 0


def test_a_damaged_depth_model_gets_one_sentence(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / depth.FOLDER).mkdir()
    (tmp_path / depth.FOLDER / "config.json").write_text("{}")
    (tmp_path / depth.FOLDER / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="depth model in .* cannot be read"):
        control_map("depth", scene(), 64, 64, folder=tmp_path)


# ---------------------------------------------------------------- pose: people


def yolox_output(people, side=64):
    """YOLOX's raw output [1, cells, 85] of `people`: (stride, left, top, right, bottom, score, class)."""
    rows = []
    for stride in (8, 16, 32):
        for cell_y in range(side // stride):
            for cell_x in range(side // stride):
                row = np.zeros(85, np.float32)
                for at, left, top, right, bottom, score, kind in people:
                    centre = (left + right) / 2, (top + bottom) / 2
                    if at == stride and (cell_x, cell_y) == tuple(int(c // stride) for c in centre):
                        row[:2] = centre[0] / stride - cell_x, centre[1] / stride - cell_y
                        row[2:4] = np.log((right - left) / stride), np.log((bottom - top) / stride)
                        row[4], row[5 + kind] = 1, score
                rows.append(row)
    return np.stack(rows)[None]


def test_people_are_found_once_and_nothing_else():
    seen = []

    def run(pixels):
        seen.append(pixels)
        return [yolox_output([
            (8, 4, 8, 20, 40, 0.9, 0), (16, 5, 8, 21, 40, 0.8, 0),  # one person, seen twice
            (16, 30, 10, 50, 44, 0.5, 0), (32, 40, 4, 60, 20, 0.95, 16),  # another one; a dog
            (8, 2, 40, 10, 46, 0.1, 0),  # too unsure
        ])]  # fmt: skip

    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    boxes = pose.find_people(picture, pose.Model(run, 64, 64), 0.3)
    assert np.abs(boxes - [[8, 16, 40, 80], [60, 20, 100, 88]]).max() < 1e-3  # the picture is twice as large
    (pixels,) = seen
    assert pixels.shape == (1, 3, 64, 64) and pixels.dtype == np.float32
    half = cv2.resize(picture, (64, 48), interpolation=cv2.INTER_LINEAR)
    assert (pixels[0, :, :48] == half[..., ::-1].transpose(2, 0, 1)).all() and (
        pixels[0, :, 48:] == 114
    ).all()
    more = pose.find_people(picture, pose.Model(run, 64, 64), 0.05)
    assert len(more) == 3


def test_without_a_box_the_whole_picture_is_the_person():
    model = pose.Model(lambda pixels: [yolox_output([])], 64, 64)
    assert pose.find_people(np.zeros((96, 128, 3), np.uint8), model, 0.3).tolist() == [[0, 0, 128, 96]]


# ---------------------------------------------------------------- pose: joints


def mmpose_warp(box, size):
    """mmpose's bbox_xyxy2cs (padding 1.25), aspect ratio and get_warp_matrix: points to the picture's."""
    left, top, right, bottom = box
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    scale = np.array([right - left, bottom - top]) * 1.25
    aspect = size[0] / size[1]
    scale = np.array([max(scale[0], scale[1] * aspect), max(scale[1], scale[0] / aspect)])
    return lambda points: np.asarray(points) / size * scale + centre - scale / 2


@pytest.mark.parametrize("box", [(10, 20, 60, 90), (40, 10, 140, 40), (-5, -5, 30, 150)])
def test_the_part_shown_to_the_pose_model_is_mmposes(box):
    picture = cv2.GaussianBlur(
        np.random.default_rng(1).integers(0, 256, (120, 160, 3), dtype=np.uint8), (0, 0), 3
    )
    pixels, left, top, scale = pose.cut_out(picture, np.array(box), 36, 48)
    to_picture = mmpose_warp(box, (36, 48))
    y, x = np.mgrid[:48, :36]
    places = to_picture(np.stack([x, y], -1).reshape(-1, 2)).reshape(48, 36, 2).astype(np.float32)
    assert np.allclose(places, np.stack([x, y], -1) * scale + (left, top), atol=1e-3)
    sampled = cv2.remap(picture.astype(np.float32), places[..., 0], places[..., 1], cv2.INTER_LINEAR)
    expected = (sampled - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    assert pixels.shape == (1, 3, 48, 36) and pixels.dtype == np.float32
    assert np.abs(pixels[0].transpose(1, 2, 0) - expected).max() < 0.1


def mmpose_simcc_maximum(simcc_x, simcc_y):
    """get_simcc_maximum of mmpose/codecs/utils/post_processing.py, transcribed for one person."""
    x_locs, y_locs = np.argmax(simcc_x, axis=1), np.argmax(simcc_y, axis=1)
    locs = np.stack((x_locs, y_locs), axis=-1).astype(np.float32)
    max_val_x, max_val_y = np.amax(simcc_x, axis=1), np.amax(simcc_y, axis=1)
    mask = max_val_x > max_val_y
    max_val_x[mask] = max_val_y[mask]
    return locs, max_val_x


def simcc(points, scores, size):
    """Logits [1, K, 2 side] per axis with a Gaussian bump of height `scores` at twice the `points`."""
    axes = []
    for axis in (0, 1):
        bins = np.arange(2 * size[axis])
        bumps = np.exp(-((bins - 2 * points[:, axis : axis + 1]) ** 2) / 50)
        axes.append((bumps * scores[:, None]).astype(np.float32)[None])
    return axes


def test_simcc_is_decoded_as_mmpose_does():
    chance = np.random.default_rng(2)
    across = chance.normal(size=(133, 576)).astype(np.float32)
    down = chance.normal(size=(133, 768)).astype(np.float32)
    points, scores = pose.decode_simcc(across, down)
    locations, expected = mmpose_simcc_maximum(across.copy(), down.copy())
    assert (points == locations / 2).all() and (scores == expected).all()


def test_keypoints_return_to_their_places_in_the_picture():
    chance = np.random.default_rng(3)
    size, box = (36, 48), np.array([30, 10, 90, 110])
    inside = chance.uniform(0, 1, (133, 2)) * (35, 47)
    expected_scores = chance.uniform(0.1, 0.9, 133)
    model = pose.Model(lambda pixels: simcc(inside, expected_scores, size), *size)
    points, scores = pose.find_keypoints(np.zeros((120, 160, 3), np.uint8), box, model)
    expected = mmpose_warp(box, size)(inside)
    pixel = 1.25 * 100 / 48
    assert np.abs(points - expected).max() <= 0.25 * pixel + 1e-3  # half a bin
    assert np.abs(scores - expected_scores).max() < 0.02


def test_openposes_joints_are_taken_from_cocos():
    chance = np.random.default_rng(4)
    keypoints, scores = chance.uniform(0, 99, (133, 2)), chance.uniform(0, 1, 133)
    info = np.concatenate([keypoints, scores[:, None]], axis=1)[
        None
    ]  # transcribed from DWPose's wholebody.py
    neck = np.mean(info[:, [5, 6]], axis=1)
    neck[:, 2] = np.minimum(info[:, 5, 2], info[:, 6, 2])
    new = np.insert(info, 17, neck, axis=1)
    mmpose_idx = [17, 6, 8, 10, 7, 9, 12, 14, 16, 13, 15, 2, 1, 4, 3]
    openpose_idx = [1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    new[:, openpose_idx] = new[:, mmpose_idx]
    body, body_scores = pose.openpose_body(keypoints, scores)
    assert np.allclose(body, new[0, :18, :2]) and np.allclose(body_scores, new[0, :18, 2])


# ---------------------------------------------------------------- pose: drawing

# OpenPose's COCO model, joints counted from 1, as its documentation numbers them.
LIMBS = [[2, 3], [2, 6], [3, 4], [4, 5], [6, 7], [7, 8], [2, 9], [9, 10], [10, 11],
         [2, 12], [12, 13], [13, 14], [2, 1], [1, 15], [15, 17], [1, 16], [16, 18]]  # fmt: skip


def standing(width=256, height=256):
    """A person whose 133 keypoints lie apart: body in COCO's order, then feet, face and hands on grids."""
    body = [(128, 40), (138, 30), (118, 30), (156, 52), (100, 52), (160, 70), (96, 70), (180, 110), (76, 110),
            (190, 150), (66, 150), (146, 150), (110, 150), (150, 190), (106, 190), (152, 235),
            (104, 235)]  # fmt: skip
    feet = [(150 + 4 * i, 250) for i in range(6)]
    face = [(2 + 3 * (i % 34), 4 + 6 * (i // 34)) for i in range(68)]
    left = [(200 + 8 * (i % 6), 160 + 12 * (i // 6)) for i in range(21)]
    right = [(6 + 8 * (i % 6), 160 + 12 * (i // 6)) for i in range(21)]
    return np.array(body + feet + face + left + right, float) * (width / 256, height / 256), np.full(133, 0.9)


def test_limbs_and_joints_have_openposes_colours():
    points, scores = standing()
    canvas = pose.draw([(points, scores)], 256, 256, 0.3, False, 2)
    joints, _ = pose.openpose_body(points, scores)
    for (x, y), colour in zip(joints.astype(int), pose.COLOURS, strict=True):
        assert tuple(canvas[y, x]) == colour
    for (start, end), colour in zip(LIMBS, pose.COLOURS, strict=False):
        middle = (joints[start - 1] + joints[end - 1]) / 2
        x, y = middle.astype(int)
        assert tuple(canvas[y, x]) == tuple(int(part * 0.6) for part in colour)
    assert (pose.COLOURS[0], pose.COLOURS[9], pose.COLOURS[17]) == ((255, 0, 0), (0, 255, 255), (255, 0, 85))
    assert (canvas.reshape(-1, 3).max(1) > 0).mean() < 0.1  # the rest is black


def test_hands_and_faces_are_drawn_when_wanted():
    points, scores = standing()
    without = pose.draw([(points, scores)], 256, 256, 0.3, False, 2)
    canvas = pose.draw([(points, scores)], 256, 256, 0.3, True, 2)
    for number, point in enumerate(points.astype(int)):
        colour = tuple(canvas[point[1], point[0]])
        if 23 <= number < 91:
            assert colour == (255, 255, 255)
        if number >= 91:
            assert colour == (0, 0, 255) and without[point[1], point[0]].max() == 0


def test_unsure_joints_and_their_limbs_are_left_out():
    points, scores = standing()
    scores[9] = 0.2  # the left wrist
    canvas = pose.draw([(points, scores)], 256, 256, 0.3, False, 2)
    x, y = points[9].astype(int)
    assert canvas[y - 3 : y + 4, x - 3 : x + 4].max() == 0
    elbow = points[7].astype(int)
    assert canvas[elbow[1], elbow[0]].max() == 255
    scores[6] = 0.2  # without a shoulder there is no neck
    canvas = pose.draw([(points, scores)], 256, 256, 0.3, False, 2)
    x, y = points[[5, 6]].mean(0).astype(int)
    assert canvas[y, x].max() == 0


# ---------------------------------------------------------------- pose: all of it


@pytest.fixture
def pose_folder(tmp_path, monkeypatch):
    """As if DWPose were there: models that always see the same two people."""
    ready(monkeypatch, "onnxruntime")
    (tmp_path / pose.FOLDER).mkdir()
    for name in (pose.DETECTOR, pose.KEYPOINTS):
        (tmp_path / pose.FOLDER / name).touch()
    points, _ = standing(36, 48)
    scores = np.where(np.arange(133) % 3 == 0, 0.4, 0.9)
    models = {
        pose.DETECTOR: pose.Model(
            lambda pixels: [yolox_output([(8, 4, 8, 28, 56, 0.9, 0), (16, 36, 8, 60, 56, 0.4, 0)])], 64, 64
        ),
        pose.KEYPOINTS: pose.Model(lambda pixels: simcc(points, scores, (36, 48)), 36, 48),
    }
    monkeypatch.setattr(pose, "open_model", lambda path, default_size: models[path.name])
    return tmp_path


def test_a_pose_map(pose_folder):
    made = values(control_map("pose", scene(), 256, 256, folder=pose_folder))
    assert made.shape == (256, 256, 3) and (made.reshape(-1, 3).max(1) == 0).mean() > 0.5
    box = np.array([4, 8, 28, 56]) * 4
    points = mmpose_warp(box, (36, 48))(standing(36, 48)[0])
    x, y = points[15].astype(int)  # the left ankle: colour 13
    window = made[y - 4 : y + 5, x - 4 : x + 5].reshape(-1, 3)
    assert (window == pose.COLOURS[13]).all(1).any()


@pytest.mark.parametrize(
    "change", [{"person": 0.6}, {"confidence": 0.7}, {"hands_and_face": False}, {"thickness": 8}], ids=str
)
def test_every_parameter_changes_the_pose(pose_folder, change):
    usual = control_map("pose", scene(), 256, 256, folder=pose_folder)
    assert control_map("pose", scene(), 256, 256, change, folder=pose_folder).tobytes() != usual.tobytes()
    assert change.keys() <= {setting.name for setting in PREPROCESSORS["pose"].parameters}


def test_a_picture_without_people_is_said(pose_folder):
    with pytest.raises(UserError, match="No person was found in the control picture"):
        control_map("pose", scene(), 256, 256, {"confidence": 0.95}, folder=pose_folder)


def test_real_onnx_files(tmp_path):
    """onnxruntime itself: its input's size is read, and a file that is no model gets one sentence."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "a.onnx"
    for shape, size in (([1, 3, 48, 36], (36, 48)), ([1, 3, "h", "w"], (64, 32))):
        ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Neg", ["x"], ["y"])], "g", ports[:1], ports[1:]
        )
        opset = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
        model = pose.open_model(path, (64, 32))
        assert (model.width, model.height) == size
        pixels = np.ones((1, 3, size[1], size[0]), np.float32)
        assert (model.run(pixels)[0] == -1).all()
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.onnx cannot be read"):
        pose.open_model(path, (64, 32))

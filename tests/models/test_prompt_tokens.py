"""The token counter of the page against the pipeline's own tokenizer, and the line that it makes."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from models.z_image.text_encoder import text_encoding
from models.z_image.z_image_handler import family_handler
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.library.catalog import catalog
from shared.ui.create.prompt import Prompts, as_typed, line_html, offer_html, tokens_text, words_html
from shared.weights.files import Folders
from tests.support import mini

WORDS = [
    "a", "red", "circle", "红色的圆", "，", "狐狸", "🔴", "👩‍🚀", "naïve", "Straße", "\n", "  ", "<|im_end|>",
    "<think>", "{", "}", "don't", "1024x768", "…", "é", "\t", "الليل", "<|im_start|>user", "</tool_call>",
]  # fmt: skip


@pytest.fixture(scope="module")
def count():
    return family_handler.query_prompt_tokens("z_image", mini.model_def("z_image_mini"))


def test_it_counts_as_the_pipeline_does(count):
    numbers, tokenizer = random.Random(1), mini.load()[1].tokenizer
    prompts = [" ".join(numbers.choices(WORDS, k=numbers.randrange(60))) for _ in range(200)]
    for prompt in ["", *prompts, "word " * 700]:
        ids, dropped = text_encoding.tokenize(tokenizer, prompt, 512)
        assert count(prompt) == len(ids) + dropped, prompt


def test_a_tokenizer_is_found_where_the_models_files_are(tmp_path):
    data = Path(mini.ROOT / "models/z_image/mini/text_encoder/tokenizer.json").read_bytes()
    folders = Folders(tmp_path, tmp_path / "ckpts", (tmp_path / "own",))
    assert family_handler.query_prompt_tokens("z_image", {"URLs": ["x"]}, folders) is None
    place = tmp_path / "own" / "Qwen3"
    place.mkdir(parents=True)
    (place / "qwen3_bf16.safetensors").touch()
    (place / "tokenizer.json").write_bytes(data)
    assert family_handler.query_prompt_tokens("z_image", {"URLs": ["x"]}, folders)("a") > 5
    (place / "tokenizer.json").write_bytes(data[:100])
    with pytest.raises(UserError, match="is damaged"):
        family_handler.query_prompt_tokens("z_image", {"URLs": ["x"]}, folders)


def test_counting_needs_no_torch():
    heavy = ("torch", "transformers")
    code = (
        "import sys, json; from models.z_image.z_image_handler import family_handler as f;"
        "m = json.load(open('defaults/z_image_mini.json'))['model'];"
        f"print(f.query_prompt_tokens('z_image', m)('a'), [x for x in {heavy} if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=mini.ROOT, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["[]"], done.stderr


def test_what_is_cut_is_told():
    _, pipe = mini.load()
    beginning = " ".join(["a red circle"] * 3)
    ids, _ = text_encoding.tokenize(pipe.tokenizer, beginning, 512)
    prompt = f"{beginning} and a blue star"
    assert text_encoding.cut(pipe.tokenizer, prompt, len(ids) - 5) == '"and a blue star"'
    notes = pipe(prompt, height=64, width=64, num_inference_steps=1, max_sequence_length=len(ids) - 5).notes
    assert any("tokens longer than the" in note and '"and a blue star"' in note for note in notes)
    assert len(text_encoding.cut(pipe.tokenizer, "word " * 900, 40)) < 220


@pytest.fixture
def said(tmp_path):
    database = tmp_path / ".zgp" / "zgp.sqlite3"
    engine = Engine(EngineConfig.at(mini.ROOT, output_dir=tmp_path, database=database))
    prompts = Prompts(engine)

    def say(prompt, **changes):
        given = {
            "prompt": prompt, "negative_prompt": None, "multi_prompts_gen_type": "FG", "batch_size": 1,
            "seed": -1, "model_type": "z_image_mini",
        }  # fmt: skip
        return prompts._said({**given, **changes})

    return say


def test_the_line_says_what_will_be_made(said, count):
    assert f">{count('a red circle')} of 512 tokens<" in said("a red circle")
    assert "the end is not seen" in said("word " * 700)
    assert "makes 4 jobs" in said("a {red|blue} cat", batch_size=4)
    assert "makes 2 jobs" in said("a\nb", multi_prompts_gen_type="G", batch_size=4)
    assert "makes" not in said("a\nb") and "makes" not in said("a cat", batch_size=4)
    assert 'role="alert"' in said("__nothing__") and "no wildcard file" in said("__nothing__")
    assert "one prompt of all lines" in said('! {A}="1","2"\n{A}')
    assert "<i>" not in said("<i>{<b>|<b>}") and "&lt;i&gt;&lt;b&gt;" in said("<i>{<b>|<b>}")
    absent = [m for m in catalog(mini.ROOT, mini.ROOT / "ckpts").models.values() if not m.available]
    if absent:
        assert "once the model is on disk" in said("a cat", model_type=absent[0].id)


def test_texts_of_files_and_prompts_are_escaped():
    assert "<b>" not in line_html(["<b>"], "<b>") + line_html([], problem="<b>") + offer_html(["<b>"])
    assert "<b>" not in words_html(["<b>"]) and words_html([]) == offer_html(["", ""]) == ""
    assert tokens_text(612, 512) == "612 of 512 tokens: the end is not seen"


def test_a_drawn_prompt_stands_in_the_box_for_itself():
    drawn = {"prompt": "{a|b}", "prompt_template": "\\{a|b\\}", "negative_prompt": "{a|b}"}
    assert as_typed(drawn) == {**drawn, "prompt": "\\{a\\|b\\}"}

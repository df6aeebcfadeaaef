"""The prompt language: several prompts, macros, choices, wildcards; and the jobs that come of them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.task_file import read_tasks
from shared.library.catalog import catalog
from shared.prompts import jobs
from shared.prompts.choices import MAX_DRAWS, draw, escape, is_random, parse
from shared.prompts.lines import units
from shared.prompts.remarks import remarks, without_tags
from shared.prompts.wildcards import Wildcards
from shared.settings.table import SETTINGS, SettingsError
from shared.settings.validation import validate
from tests.support.fake_family import handler_for, make_root
from tests.support.mini import ROOT


@pytest.fixture
def wildcards(tmp_path):
    def write(name, text):
        path = tmp_path / "wildcards" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    write("animals/birds", "# big ones\ncrane\n\nheron\n")
    write("animals/all", "{cat|dog}\na __animals/birds__\n")
    write("round/a", "__round/b__")
    write("round/b", "__round/a__")
    write("flood", " ".join(["__animals/birds__"] * 100))
    write("floods", " ".join(["__flood__"] * 100))
    write("empty", "# nothing\n")
    write("colours-warm", "red\norange\n")
    write("colours-cold", "blue\n")
    write("coat", "a ${c:grey} coat\n")
    table = "clothing: [T-shirt, '{wool|silk} scarf']\nartists:\n  dutch: [Piet, Jan]\n  flurp: 12345\n"
    (tmp_path / "wildcards" / "table.yaml").write_text(table)
    (tmp_path / "wildcards" / "more.json").write_text('{"sizes": {"big": ["huge"]}}')
    (tmp_path / "wildcards" / "bomb.yaml").write_text("a: &a [x, x]\nb: [*a, *a]\n")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "wildcards" / "latin.txt").write_bytes(b"caf\xe9")
    return Wildcards(tmp_path / "wildcards")


# ---------------------------------------------------------------- lines and macros

MACRO = '! {A}="cat","dog" : {B}="forest","city","boat"\na {A} in a {B}\n'


@pytest.mark.parametrize(
    "text, mode, expected",
    [
        ("a\n\n  b \nc", "FG", ["a\nb\nc"]),
        ("a\n\n  b \nc", "G", ["a", "b", "c"]),
        ("a\n\n\n  b \r\nc", "PG", ["a", "b\nc"]),
        ("# note\na\n  # note\nb", "G", ["a", "b"]),
        ("a\n# no gap\nb", "PG", ["a\nb"]),
        ("# only\n\n", "FG", []),
        ("!enhanced!\na fox", "FG", ["a fox"]),
        (MACRO, "G", ["a cat in a forest", "a dog in a city", "a cat in a boat"]),
        (MACRO, "FG", ["a cat in a forest\na dog in a city\na cat in a boat"]),
        (MACRO + "\n", "PG", ["a cat in a forest\na dog in a city\na cat in a boat"]),
        (f"{MACRO}# x\nand {{B}}", "G",
         ["a cat in a forest", "and forest", "a dog in a city", "and city", "a cat in a boat", "and boat"]),
        ('one\n! {A}="1","2"\n\n{A}\n\n! {A}="3"\n{A}', "PG", ["one", "1", "2", "3"]),
        ('! {A}="1","2"\n{A}\n! {B}="x: y, z"\n{B}', "G", ["1", "2", "x: y, z"]),
        ('! Subject {A}="1"\n{A}', "G", ["1"]),
        ("!important\n! wow", "G", ["!important", "! wow"]),
        ('{"json": {"a": 1}}', "G", ['{"json": {"a": 1}}']),
        ('! {A}="x"\n${v={a|b}} ${v} {A}', "G", ["${v={a|b}} ${v} x"]),
    ],
)  # fmt: skip
def test_a_box_becomes_prompts(text, mode, expected):
    assert units(text, mode) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        ('! {Animal}="cat"\nan {Animals}', "did you mean '{Animal}'"),
        ("! {A} cat", "cannot be read: expected the form"),
        ('! {A}="cat" "dog"\n{A}', "cannot be read"),
        ('! {A}="cat\n{A}', "cannot be read"),
    ],
)
def test_a_macro_that_cannot_be_read_is_one_sentence(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        units(text, "G")


# ---------------------------------------------------------------- choices


def drawn(text, wildcards, count=200):
    template = parse(text)
    return [draw(template, str(seed), wildcards) for seed in range(count)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|b{c|d}}", {"a", "bc", "bd"}),
        ("{very |}big", {"very big", "big"}),
        ("{2$$a|b|c}", {"a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{0::a|b}", {"b"}),
        ("x } y | z", {"x } y | z"}),
        ('{"a": {"b": [1]}}', {'{"a": {"b": [1]}}'}),
        ("a { b", {"a { b"}),
        (r"\{a|b\} \| \__x__ \# \n", {r"{a|b} | __x__ \# \n"}),
        ("\\#a\n\\!b", {"#a\n!b"}),
        ("{a\\|b|c}", {"a|b", "c"}),
        ("{𝒳|红色}", {"𝒳", "红色"}),
        ("__animals/all__!", {"cat!", "dog!", "a crane!", "a heron!"}),
        ("{__animals/birds__|owl}", {"crane", "heron", "owl"}),
        ("__../secret__", {"__../secret__"}),
        ("snake_case and __ or ____", {"snake_case and __ or ____"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{-2$$a|b|c}", {"a", "b", "c", "a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}),
        ("{1-$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{1-9$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$ + $$a|b}", {"a", "b", "a + b", "b + a"}),
        ("{2$$$$a|b}", {"ab", "ba"}),
        ("{2$$__animals/birds__}", {"crane, heron", "heron, crane"}),
        ("{3$$__animals/birds__}", {"crane, heron", "heron, crane"}),
        ("__colours*__", {"red", "orange", "blue"}),
        ("__colours-*m__", {"red", "orange"}),
        ("__artists/*__", {"Piet", "Jan"}),
        ("__~animals/birds__ {~a|b}", {"crane a", "crane b", "heron a", "heron b"}),
        ("${v={a|b}}${v}${v}", {"aa", "ab", "ba", "bb"}),
        ("${v=!{a|b}}${v}${v}", {"aa", "bb"}),
        ("${v:c} ${v:{d|e}}", {"c d", "c e"}),
        ("${v=__animals/birds__}a ${v}", {"a crane", "a heron"}),
        ("__coat(c=red)__, __coat__", {"a red coat, a red coat"}),
        ("__coat__", {"a grey coat"}),
        (r"$\{v}", {"${v}"}),
        ("$5 ${", {"$5 ${"}),
        ("{{a|b} on {c|d}}", {"a on c", "a on d", "b on c", "b on d"}),
        ("__clothing__", {"T-shirt", "wool scarf", "silk scarf"}),
        ("__artists/dutch__ __sizes/big__", {"Piet huge", "Jan huge"}),
        ('{"subject": "a heart | big", "a": {"b": [1, {"c": "x"}]}}',
         {'{"subject": "a heart | big", "a": {"b": [1, {"c": "x"}]}}'}),
        ('[{"a": "{x|y}"}, "{ | __"]', {'[{"a": "x"}, "{ | __"]', '[{"a": "y"}, "{ | __"]'}),
    ],
)
def test_all_that_can_be_drawn_is_drawn_and_nothing_else(text, expected, wildcards):
    assert set(drawn(text, wildcards)) == expected


def test_weights_are_shares(wildcards):
    counts = Counter(drawn("{3::a|b|0.5::c}", wildcards, 9000))
    for option, share in {"a": 3 / 4.5, "b": 1 / 4.5, "c": 0.5 / 4.5}.items():
        assert counts[option] / 9000 == pytest.approx(share, abs=0.02)


def test_a_seed_draws_the_same_everywhere_and_for_ever(wildcards):
    template = parse("{a|b|c|d|e|f|g|h} {1|2|3|4|5|6|7|8}")
    numbers = random.Random("prompt 5")
    expected = "abcdefgh"[int(numbers.random() * 8)] + " " + "12345678"[int(numbers.random() * 8)]
    assert draw(template, "prompt 5", wildcards) == draw(template, "prompt 5", wildcards) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        ("a {red|blue cat", "'{red|blue cat' is not closed"),
        ("__bird__", "There is no wildcard file for __bird__: did you mean __animals/birds__?"),
        ("__animals/../../secret__", "There is no wildcard"),
        ("__empty__", "has no entries"),
        ("__latin__", "is not UTF-8"),
        ("__round/a__", "round/a > round/b > round/a"),
        ("__floods__", f"more than {MAX_DRAWS} times"),
        ("{4$$a|b}", "asks for 4 of 2"),
        ("{4-5$$a|b}", "asks for 4 of 2"),
        ("{2-1$$a|b|c}", "asks for 2 of 3"),
        ("{!a|b}", "asks for every combination, which is not here: leave out the !"),
        ("{@a|b}", "asks for one after the other"),
        ("__@flood__", "one after the other, which is not here: leave out the @"),
        ("__nothing*__", "No wildcard file is called like __nothing*__"),
        ("a __init__ b", "Where the underscores are meant, write \\__init\\__."),
        ("${season}", "The variable ${season} has no value: set it before"),
        ("${a=${a}}${a}", "lead on and on (${a} > ${a})"),
        ("${a={b|c", "is not closed"),
        ("__bomb__", "cannot be read (it has aliases"),
        ("{0::a|0::b}", "asks for 1 of 2"),
        ("{" * 5000 + "a|b" + "}" * 5000, "braces within each other"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_one_sentence(text, said, wildcards):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        drawn(text, wildcards, 1)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_link_does_not_lead_out_of_the_folder(wildcards):
    (wildcards.folder / "link.txt").symlink_to(wildcards.folder.parent / "secret.txt")
    assert "link" not in wildcards.names() and "animals/birds" in wildcards.names()


def test_without_a_folder_nothing_is_lost(tmp_path):
    assert Wildcards(tmp_path / "none").names() == []
    with pytest.raises(UserError, match="put birds.txt into"):
        draw(parse("__birds__"), "1", Wildcards(tmp_path / "none"))


def test_escaped_texts_stand_for_themselves(wildcards):
    numbers = random.Random(3)
    for _ in range(3000):
        lines = ["".join(numbers.choices("ab{}|\\_#! 红$:2", k=numbers.randrange(1, 12))) for _ in range(2)]
        text = "\n".join(line.strip() for line in lines if line.strip())
        if text:
            [unit] = units(escape(text), "FG")
            assert not is_random(parse(unit)) and draw(parse(unit), "1", wildcards) == text


# ---------------------------------------------------------------- what comes from other programs


@pytest.mark.parametrize(
    "text, said",
    [
        ("a fox", []),
        ("## Scene\na fox", ["Taken for a comment: 1 line that begins with # (## Scene)."]),
        ("# a\n  # b\nx", ["2 lines that begin with # (# a)."]),
        ("\\# a", []),
        ("a (red:1.2) fox", ["(word:1.2)."]),
        ("a fox BREAK a cat AND a dog", ["BREAK, AND."]),
        ("STOP AND GO, a sign", []),
        ("[cat|dog] [a:b:0.5]", ["[a|b], [a:b:0.5]."]),
        ("<wildcard:a> <random:a,b> 3#__a__", ["<wildcard:a> (here: __a__), <random:a,b>"]),
        ('{"a": ["x|y", "b: 3"], "t": "9:30 (at 8:15)"}', []),
        ("# (a:1.2)\nx", ["Taken for"]),
    ],
)
def test_what_a_prompt_has_of_other_programs_is_said_once(text, said):
    found = remarks(text)
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


@pytest.mark.parametrize("text", ["(" * 100_000, "[a|" * 30_000, "<lora:" * 20_000, "# " * 50_000])
def test_hostile_prompts_are_remarked_upon_quickly(text):
    assert len(" ".join(remarks(text))) < 400 and without_tags(text)[1] == []


LORA = "mini/mini_outlines.safetensors"


@pytest.mark.parametrize(
    "given, prompt, loras, strengths, notes",
    [
        ({"prompt": "a cat <lora:Mini_Outlines:0.5>, red"}, "a cat, red", [LORA], "0.5", ["act: " + LORA]),
        ({"prompt": "a cat <lora:gone:0.5><lora:mini_outlines>"}, "a cat", [LORA], "1",
         ["no file is called so: gone.", "act: "]),
        ({"prompt": "a cat<lora:mini_outlines:.7>", "activated_loras": [LORA] * 2, "loras_multipliers": ".3"},
         "a cat", [LORA] * 3, ".3 1 .7", ["act: "]),
        ({"prompt": "a {cat|cat} <lora:mini_outlines:0.2:lbw=x>"}, "a cat", [LORA], "0.2", ["act: "]),
        ({"prompt": "# note\na (cat:1.3)"}, "a (cat:1.3)", [], "", ["Taken for", "Means nothing here"]),
    ],
)  # fmt: skip
def test_lora_tags_act_and_the_rest_is_noted(given, prompt, loras, strengths, notes):
    models = catalog(ROOT, ROOT / "ckpts")
    [job] = models.validate_all({"model_type": "z_image_mini", "seed": 1, **given})
    assert job.settings["prompt"] == prompt
    assert (job.settings["activated_loras"], job.settings["loras_multipliers"]) == (loras, strengths)
    assert len(job.notes) == len(notes) and all(part in x for part, x in zip(notes, job.notes, strict=True))
    [again] = models.validate_all(job.settings)
    assert (again.settings["prompt"], again.settings["activated_loras"]) == (prompt, loras)


# ---------------------------------------------------------------- jobs


def expanded(wildcards, **values):
    capabilities = {"negative_prompt": True}
    settings = validate({"seed": 7, **values}, {}, capabilities).settings
    return jobs.expand(settings, wildcards)


def test_each_line_is_a_job_with_the_seed_that_was_asked_for(wildcards):
    made = expanded(wildcards, prompt="a\nb", multi_prompts_gen_type="G", batch_size=3)
    assert [(job["prompt"], job["seed"], job["batch_size"]) for job in made] == [("a", 7, 3), ("b", 7, 3)]
    assert all(job["prompt_template"] == "" for job in made)
    drawn = expanded(wildcards, prompt="a\nb", multi_prompts_gen_type="G", seed=-1)
    assert drawn[0]["seed"] != drawn[1]["seed"] and min(job["seed"] for job in drawn) >= 0


def test_each_image_has_its_own_draw_and_can_be_made_alone(wildcards):
    text = {"prompt": "{a|b|c|d|e|f} cat", "negative_prompt": "{x|y|z|u|v|w}"}
    batch = expanded(wildcards, batch_size=16, **text)
    assert [(job["seed"], job["batch_size"]) for job in batch] == [(7 + k, 1) for k in range(16)]
    assert len({job["prompt"] for job in batch}) > 3 and len({job["negative_prompt"] for job in batch}) > 3
    assert any(job["prompt"][0] != "abcdef"["xyzuvw".index(job["negative_prompt"])] for job in batch)
    for k, job in enumerate(batch):
        assert expanded(wildcards, **{**text, "seed": 7 + k}) == [job]
        assert expanded(wildcards, **job) == [job]  # from its picture
        again = {**job, "prompt": job["prompt_template"], "negative_prompt": job["negative_prompt_template"]}
        again |= {"prompt_template": "", "negative_prompt_template": ""}
        assert expanded(wildcards, **again) == [job]


def test_drawn_texts_are_not_expanded_again(wildcards):
    [job] = expanded(wildcards, prompt=r"\{a|b\} \__x__ {y|y}")
    assert job["prompt"] == "{a|b} __x__ y"
    assert expanded(wildcards, **job) == [job]


def test_too_many_jobs_are_one_sentence(wildcards):
    lines = "\n".join(f"{{a|b}} {i}" for i in range(40))
    with pytest.raises(UserError, match="stands for 640 jobs; expected at most 500"):
        expanded(wildcards, prompt=lines, multi_prompts_gen_type="G", batch_size=16)
    with pytest.raises(UserError, match="only comments"):
        expanded(wildcards, prompt="# nothing")


@pytest.mark.parametrize(
    "theirs, ours",
    [("G", "G"), ("PG", "PG"), ("FG", "FG"), (0, "G"), (1, "G"), (2, "FG"), ("", "FG"), ("PW", "PG")],
)  # fmt: skip
def test_wan2gp_files_say_what_a_box_is(theirs, ours):
    given = {"prompt": "a", "multi_prompts_gen_type": theirs}
    assert validate(given, {}, {}).settings["multi_prompts_gen_type"] == ours
    assert SETTINGS["multi_prompts_gen_type"].default == "FG"
    with pytest.raises(SettingsError, match="multi_prompts_gen_type"):
        validate({"prompt": "a", "multi_prompts_gen_type": "X"}, {}, {})


@pytest.fixture
def engine(tmp_path):
    root = make_root(tmp_path / "project")
    return Engine(EngineConfig.at(root, warm=False), handler_for)


def test_a_job_is_not_edited_into_several(engine):
    """Else all but the first would be lost without a word."""
    job_id, _ = engine.submit({"model_type": "fake", "prompt": "a cat"})
    with pytest.raises(SettingsError, match="stands for 2 jobs"):
        engine.edit(job_id, {"model_type": "fake", "multi_prompts_gen_type": "G", "prompt": "a dog\na fox"})
    assert engine.store.job(job_id).settings["prompt"] == "a cat"


def test_all_jobs_of_a_prompt_are_queued_or_none(engine, monkeypatch):
    values = {"model_type": "fake", "multi_prompts_gen_type": "G", "seed": 3}
    queued = engine.submit_all({**values, "prompt": "a {red|blue} cat\na dog", "batch_size": 2})
    stored = [engine.store.job(job_id).settings for job_id, _ in queued]
    assert [validated.settings for _, validated in queued] == stored
    assert [(s["prompt"][-3:], s["seed"], s["batch_size"]) for s in stored] == [
        ("cat", 3, 1), ("cat", 4, 1), ("dog", 3, 2),
    ]  # fmt: skip
    assert stored[0]["prompt_template"] == "a {red|blue} cat" and stored[2]["prompt_template"] == ""
    with pytest.raises(SettingsError, match="draws no dragons"):
        engine.submit_all({**values, "prompt": "a cat\na dragon"})
    with pytest.raises(SettingsError, match="no wildcard file"):
        engine.submit_all({**values, "prompt": "a cat\na __unknown__"})
    submit, calls = engine.store.submit, iter(range(2))

    def fails(*args, **options):
        if next(calls):
            raise OSError("disk full")
        return submit(*args, **options)

    monkeypatch.setattr(engine.store, "submit", fails)
    with pytest.raises(OSError):
        engine.submit_all({**values, "prompt": "a cat\na dog"})
    assert len(engine.store.jobs()) == 3


def test_a_list_of_prompts_may_have_macros_and_comments(tmp_path):
    (tmp_path / "list.txt").write_text(f"# list\n{MACRO}a {{x|y}}\n".replace("a {x|y}", "a fox"))
    prompts = [task.values["prompt"] for task in read_tasks(tmp_path / "list.txt", tmp_path)]
    assert prompts[::2] == ["a cat in a forest", "a dog in a city", "a cat in a boat"]
    assert prompts[1::2] == ["a fox"] * 3


def test_a_file_of_tasks_is_expanded_before_anything_runs(tmp_path):
    (tmp_path / "list.txt").write_text("a {red|blue} circle\na __mini/shape__\nan __unknown__\n")
    result = subprocess.run(
        [sys.executable, "wgp.py", "--process", str(tmp_path / "list.txt"), "--dry-run", "--json",
         "--output-dir", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and "no wildcard file for __unknown__" in result.stderr
    made = r'"prompt": "a (red|blue) circle".*"prompt_template": "a \{red\|blue\} circle"'
    assert re.search(made, result.stdout)


def test_the_examples_of_the_built_in_models_are_there():
    names = Wildcards(catalog(ROOT, ROOT / "ckpts").wildcards).names()
    assert {"mini/colour", "mini/shape"} <= set(names)

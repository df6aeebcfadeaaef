"""The strengths' grammar against what Wan2GP's parser was seen to give, and against its refusals."""

import pytest

from shared.errors import UserError
from shared.loras.strengths import merge_profile, parse, split_profile


def schedule(text: str, count: int, steps: int = 8, phases: int = 1, switches: tuple[int, ...] = ()) -> list:
    """The strength of each LoRA over the steps."""
    found = parse(text, count, phases)
    return [
        list(one) for one in zip(*(found.at(step, steps, switches) for step in range(steps)), strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("1.2 0.8", 2, [[1.2] * 8, [0.8] * 8]),
        ("1.2\n0.8", 2, [[1.2] * 8, [0.8] * 8]),
        ("1.2\n# between\r\n0.8", 2, [[1.2] * 8, [0.8] * 8]),
        ("1,0.5", 1, [[1] * 4 + [0.5] * 4]),
        ("1,0.5,0", 1, [[1] * 3 + [0.5] * 3 + [0] * 2]),
        ("1,2,3,4,5,6,7,8,9", 1, [[1, 2, 3, 4, 5, 6, 7, 8]]),
        ("0.5", 3, [[0.5] * 8, [1] * 8, [1] * 8]),
        ("", 2, [[1] * 8, [1] * 8]),
        ("1 0.5 0.3", 2, [[1] * 8, [0.5] * 8]),
        ("-0.5 1e-1", 2, [[-0.5] * 8, [0.1] * 8]),
        ("0.9|0.5", 2, [[0.9] * 8, [0.5] * 8]),
        ("0.9|", 2, [[0.9] * 8, [1] * 8]),
        # Wan2GP refuses what follows
        ("1.2  0.8", 2, [[1.2] * 8, [0.8] * 8]),
        ("\t1.2\t 0.8  ", 2, [[1.2] * 8, [0.8] * 8]),
        ("0.9 | 0.5", 2, [[0.9] * 8, [0.5] * 8]),
        ("0.9 # first 7 | 8\n0.5", 2, [[0.9] * 8, [0.5] * 8]),
        ("   \n ", 1, [[1] * 8]),
        ("+.5 1.", 2, [[0.5] * 8, [1] * 8]),
    ],
)
def test_one_phase(text: str, count: int, expected: list) -> None:
    assert schedule(text, count) == expected


@pytest.mark.parametrize(
    ("text", "phases", "switches", "expected"),
    [
        ("0;1", 2, (3,), [0, 0, 0, 1, 1, 1, 1, 1]),
        ("1,0.5;0", 2, (4,), [1, 1, 0.5, 0.5, 0, 0, 0, 0]),
        ("0;1", 3, (2, 5), [0, 0, 1, 1, 1, 1, 1, 1]),
        ("0.7", 3, (2, 5), [0.7] * 8),
        ("0;1;2", 3, (0, 8), [1] * 8),  # an empty first phase, and a last one that is never reached
    ],
)
def test_phases(text: str, phases: int, switches: tuple[int, ...], expected: list) -> None:
    assert schedule(text, 1, 8, phases, switches) == [expected]


def test_schedules_follow_the_real_number_of_steps() -> None:
    assert schedule("1,0.5", 1, 3) == [[1, 1, 0.5]]
    assert schedule("1,0.5", 1, 1) == [[1]]
    assert schedule("1,0", 1, 20) == [[1] * 10 + [0] * 10]


def test_what_is_known_beside_the_numbers() -> None:
    found = parse("0.9 1|0.5 3 4", 3)
    assert (found.boundary, found.surplus, found.constant) == (2, 2, True)
    assert parse("1", 1).boundary is None
    assert (
        not parse("1,0.5", 1).constant and not parse("1;0", 1, 2).constant and parse("1,1;1", 1, 2).constant
    )
    assert parse("1 2", 0).tokens == () and parse("", 0).at(0, 4) == ()


@pytest.mark.parametrize(
    ("text", "phases", "sentence"),
    [
        (
            "1 abc 2",
            1,
            'line 1, column 3: "abc" is not a number; expected one such as 0.8, at the ^ in: 1 ^abc 2',
        ),
        ("1\n# x\n0.5 0.1,nan", 1, 'line 3, column 9: "nan" is not a number'),
        ("inf", 1, 'column 1: "inf" is not'),
        ("1e999", 1, 'column 1: "1e999" is not'),
        ("1,,0.5", 1, "column 3: a number is missing, at the ^ in: 1,^,0.5"),
        ("1,", 1, "column 3: a number is missing"),
        (";1", 2, "column 1: a number is missing"),
        ("0;1", 1, 'column 2: "0;1" has 2 phases; expected at most 1 for this model, at the ^ in: 0^;1'),
        ("1|2|3", 1, 'column 4: a second "|"; expected one at most, at the ^ in: 1|2^|3'),
        ("1:2", 1, '"1:2" is not a number'),
        ("1_0", 1, '"1_0" is not a number'),
        ("٣", 1, "is not a number"),
        ("0.5 " * 20 + "x" + " 0.5" * 20, 1, "at the ^ in: 0.5 0.5 0.5 ^x 0.5 0.5 0."),
    ],
)
def test_mistakes_are_shown_in_their_place(text: str, phases: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text, 3, phases)
    assert str(error.value).startswith("LoRA multipliers, line ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_profiles_go_before_the_bar() -> None:
    assert merge_profile("0.7", "1") == "1|0.7"
    assert merge_profile("1|0.7", "0.5 0.5") == "0.5 0.5|0.7"
    assert merge_profile("1|0.7", "") == "0.7"
    assert split_profile("1|0.7 # half | whole") == ("1", "0.7 # half | whole")
    assert split_profile("0.7 # a | b") == ("", "0.7 # a | b")
    assert parse(merge_profile("0.7", "1 # fast"), 2).at(0, 1) == (1, 0.7)

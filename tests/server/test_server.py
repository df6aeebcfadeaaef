"""The parts of the server on their own: who may come in, how slow guessing is, what is too much."""

import json
import socket
from types import SimpleNamespace

import pytest

from shared.cli import main
from shared.cli.flags import build_parser
from shared.errors import UserError
from shared.server.credentials import OWN_USER, TOKEN_VARIABLE
from shared.server.limits import MAX_DEPTH, is_shallow
from shared.server.origin import host_name, is_loopback
from shared.server.schemas import setting_schema, settings_schema
from shared.server.throttle import FORGOTTEN_AFTER, FREE_TRIES, LONGEST_WAIT, LoginThrottle
from shared.settings.table import SETTINGS

TOKEN = "0123456789abcdef"


# ---------------------------------------------------------------- who may come in


def access(*flags: str):
    options = build_parser().parse_args(flags)
    return main.page_access(options, main.page_address(options)[0])


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("SERVER_NAME", "SERVER_PORT", TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("flags", [[], ["--server-name", "localhost"], ["--server-name", "127.0.0.5"]])
def test_nobody_logs_in_on_this_computer(flags):
    found, generated_password = access(*flags)
    assert not found.needed and generated_password == ""


@pytest.mark.parametrize(
    "flags",
    [["--listen"], ["--share"], ["--server-name", "0.0.0.0"], ["--server-name", "studio.lan"],
     ["--server-name", "::"], ["--api-token", TOKEN]],
)  # fmt: skip
def test_a_page_for_others_makes_up_a_password(flags):
    found, generated_password = access(*flags)
    assert len(generated_password) >= 20 and found.knows_user(OWN_USER, generated_password)
    assert generated_password != access(*flags)[1]


def test_the_variable_for_the_address_needs_a_login_too(monkeypatch):
    monkeypatch.setenv("SERVER_NAME", "0.0.0.0")
    assert access()[0].needed


def test_users_come_from_flags_and_a_file(tmp_path):
    file = tmp_path / "users.txt"
    file.write_text("\ufeff# people\nann:a:b c\n\n bob :pässword\n", encoding="utf-8")
    flags = ("--listen", "--auth", "me:x", "--auth", "you:y", "--auth-file", str(file))
    found, generated_password = access(*flags)
    assert generated_password == "" and set(found.users) == {"me", "you", "ann", "bob"}
    for name, password in (("me", "x"), ("ann", "a:b c"), ("bob", "pässword")):
        assert found.knows_user(name, password) and not found.knows_user(name, password + " ")
    assert not found.knows_user("nobody", "x") and not found.knows_user("", "")


def test_tokens_come_from_flags_and_a_variable(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN + "2")
    found, _ = access("--api-token", TOKEN, "--auth", "me:x")
    assert found.knows_token(TOKEN) and found.knows_token(TOKEN + "2")
    assert not found.knows_token("") and not found.knows_token(TOKEN + "3")


@pytest.mark.parametrize("text", ["", "me", "me:", ":secret", "  :secret"])
def test_a_malformed_auth_is_a_sentence_without_the_password(text):
    with pytest.raises(UserError, match="expected user:password") as error:
        access("--auth", text)
    assert "secret" not in str(error.value)


def test_a_file_of_users_that_cannot_be_used_is_a_sentence(tmp_path):
    file = tmp_path / "users.txt"
    for content, said in (
        (b"# nobody\n", "names nobody"),
        (b"a:b\nsecret\n", "line 2"),
        (b"\xff\xfe", "UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            access("--auth-file", str(file))
        assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        access("--auth-file", str(tmp_path / "missing"))


@pytest.mark.parametrize("token", ["short", "with blanks in between", "übelerregende-zeichen"])
def test_a_token_that_is_too_weak_is_a_sentence(token):
    with pytest.raises(UserError, match="at least 16") as error:
        access("--api-token", token)
    assert token not in str(error.value)


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "*", "a b", ""])
def test_an_allowed_host_is_a_bare_name(name):
    with pytest.raises(UserError, match="studio.example.org"):
        host_name(name)
    assert host_name("A.example") == "a.example"


def test_what_is_this_computer_alone():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "localhost.example", "")))


# ---------------------------------------------------------------- how slow guessing is


def test_waits_double_up_to_a_limit_and_are_forgotten():
    now = [0.0]
    slow = LoginThrottle(lambda: now[0])
    waits = []
    for _ in range(FREE_TRIES + 9):
        slow.record_failure("10.0.0.1")
        waits.append(slow.retry_after("10.0.0.1"))
    assert FREE_TRIES == 4 and waits[:7] == [0, 0, 0, 1, 2, 4, 8]
    assert waits[-1] == LONGEST_WAIT and slow.retry_after("10.0.0.2") == 0
    now[0] += LONGEST_WAIT - 1
    assert slow.retry_after("10.0.0.1") == 1
    now[0] += FORGOTTEN_AFTER
    assert slow.retry_after("10.0.0.1") == 0
    slow.record_failure("10.0.0.1")
    assert slow.retry_after("10.0.0.1") == 0
    for _ in range(9):
        slow.record_failure("10.0.0.1")
    slow.reset("10.0.0.1")
    assert slow.retry_after("10.0.0.1") == 0


# ---------------------------------------------------------------- what is too much


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_counts_brackets_outside_of_texts(opening, closing):
    at_most = opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH
    assert is_shallow(at_most) and not is_shallow(opening + at_most + closing)
    assert is_shallow(json.dumps(["[" * 1000, '\\"{' * 1000]).encode())
    assert is_shallow(b"[" + b"[],{}," * 1000 + b"1]")


# ---------------------------------------------------------------- what programs are told


def test_schemas_agree_with_what_is_accepted():
    """The same judgement by JSON schema's rules as written here, and by the settings themselves."""
    schema = settings_schema()
    assert set(schema["properties"]) == set(SETTINGS) and schema["required"] == ["prompt"]
    steps = setting_schema(SETTINGS["num_inference_steps"])
    assert (steps["type"], steps["minimum"], steps["maximum"]) == ("integer", 1, 100)
    assert setting_schema(SETTINGS["image_format"])["enum"] == ["png", "jpeg", "webp"]
    assert setting_schema(SETTINGS["activated_loras"])["items"] == {"type": "string"}
    assert setting_schema(SETTINGS["prompt"])["maxLength"] == 100_000


# ---------------------------------------------------------------- the start


def test_the_greeting_says_where_and_how():
    from shared.server.launch import greeting

    assert greeting("127.0.0.1", 7860) == "ZGP is at http://127.0.0.1:7860/"
    assert greeting("::1", 7860) == "ZGP is at http://[::1]:7860/"
    said = greeting("0.0.0.0", 7861, "abc-def")
    assert (
        "http://127.0.0.1:7861/" in said and "as zgp with the password abc-def" in said and "--auth" in said
    )


def test_a_tunnel_is_named_and_answered_to_or_the_page_stays(monkeypatch, capsys):
    from shared.server import launch
    from shared.server.origin import HostOriginCheck

    asked = []

    def tunnel(*arguments):
        asked.append(arguments)
        return "http://abc123.gradio.live"

    hosts = HostOriginCheck()
    monkeypatch.setattr(launch, "setup_tunnel", tunnel)
    launch._share("0.0.0.0", 7860, hosts)
    assert asked[0][:2] == ("127.0.0.1", 7860) and len(asked[0][2]) >= 32
    assert "https://abc123.gradio.live/" in capsys.readouterr().out
    origin = (b"origin", b"https://abc123.gradio.live")
    hosts.checked({"headers": [(b"host", b"abc123.gradio.live"), origin]})

    def broken(*arguments):
        raise RuntimeError("no network")

    monkeypatch.setattr(launch, "setup_tunnel", broken)
    launch._share("127.0.0.1", 7860, hosts)
    assert "no network" in capsys.readouterr().err


def test_a_socket_is_bound_once():
    from shared.server.launch import listening

    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port}.*--server-port"):
            listening("127.0.0.1", port)


def test_a_start_for_others_says_the_password_once(monkeypatch, capsys, tmp_path):
    """The whole way from the flags to a server that asks for the login, without its page."""
    import uvicorn

    from shared.server import launch

    engine = SimpleNamespace(
        config=SimpleNamespace(output_dir=tmp_path), start=lambda: None, stop=lambda: None
    )
    monkeypatch.setattr("shared.engine.engine.Engine", lambda *arguments: engine)
    monkeypatch.setattr(launch, "build", lambda engine, login: f"a page, login {login}")
    made = []
    monkeypatch.setattr(launch, "make_app", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: made.append(sockets[0].getsockname()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = build_parser().parse_args(["--listen", "--server-port", str(port)])
    assert main.serve(SimpleNamespace(database=tmp_path / "queue"), None, options) == 0
    (_, page, _, _, doors, _), address = made
    said = capsys.readouterr().out
    password = said.partition("password ")[2].split()[0]
    assert doors.credentials.knows_user("zgp", password) and page == "a page, login True"
    assert address == ("0.0.0.0", port)

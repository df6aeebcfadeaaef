"""What strangers, foreign web pages and damaged programs may try, and what they get: a table of attacks.

The server is the real one (guard, REST, Gradio with the whole page), asked without a network in between.
"""

from __future__ import annotations

import ast
import asyncio
import http.server
import io
import json
import re
import threading
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from PIL import Image

from shared.engine.configuration import EngineConfig
from shared.engine.engine import MAX_WAITING, Engine
from shared.jobs.records import Counts
from shared.server.credentials import read_credentials
from shared.server.limits import MAX_BODY, MAX_UPLOAD
from shared.ui.components.viewer import Pictures
from tests.support.asgi import HOST, Answer, ask

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"the-secret-of-this-computer"
PASSWORD = "correct horse"
TOKEN = "token-of-a-program-0123456789"
EVIL = "<img src=x onerror=alert(1)>"
JSON = ("Content-Type", "application/json")
BEARER = ("Authorization", f"Bearer {TOKEN}")
FILE = "/gradio_api/file="


@pytest.fixture(scope="module")
def canary():
    """A server on this computer that nobody may be made to ask; `asked` counts."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SECRET)

        do_HEAD = do_POST = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(port=server.server_port, asked=asked)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two servers on one engine without a worker: `open` for everybody here, `closed` with a login."""
    from shared.server.app import make_app
    from shared.server.login import LoginSessions
    from shared.server.origin import HostOriginCheck
    from shared.ui.app import build

    folder = tmp_path_factory.mktemp("house")
    outputs, uploads = folder / "outputs", folder / "uploads"
    config = EngineConfig.at(ROOT, output_dir=outputs, database=outputs / ".zgp" / "zgp.sqlite3")
    engine = Engine(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        known = furnish(folder, engine)
        access, _ = read_credentials([f"me:{PASSWORD}"], None, [TOKEN], exposed=False)
        nobody, _ = read_credentials([], None, [], exposed=False)
        origins = HostOriginCheck(listens=True)
        closed = make_app(engine, build(engine, login=True), uploads, origins, LoginSessions(access))
        opened = make_app(engine, build(engine), uploads, HostOriginCheck(), LoginSessions(nobody))
        yield SimpleNamespace(
            engine=engine,
            outputs=outputs,
            uploads=uploads,
            folder=folder,
            known=known,
            open=opened,
            closed=closed,
        )


def furnish(folder: Path, engine: Engine) -> Path:
    """A known picture and, around it, what must not be read."""
    outputs, uploads = folder / "outputs", folder / "uploads"
    day = outputs / "2026-01-01"
    for place in (day, outputs / ".thumbnails", outputs / ".hidden", uploads / "abc"):
        place.mkdir(parents=True)
    (folder / "secret.txt").write_bytes(SECRET)
    (folder / "secret.png").write_bytes(SECRET)
    for private in (".zgp/zgp.log", "notes.txt", "2026-01-01/stranger.png", ".hidden/a.png", "con.png"):
        (outputs / private).write_bytes(SECRET)
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    for good in (day / "known.png", outputs / ".thumbnails" / "small.webp", uploads / "abc" / "mine.png"):
        good.write_bytes(picture.getvalue())
    (day / "link.png").symlink_to(folder / "secret.png")
    job = engine.store.submit({"prompt": EVIL, "model_type": "z_image_mini"})
    meta = {"prompt": EVIL, "model_type": EVIL, "resolution": EVIL, "zgp": {"notes": [EVIL]}}
    for name in ("2026-01-01/known.png", "2026-01-01/link.png", ".hidden/a.png", "../secret.png", "con.png"):
        engine.store.add_image(
            job, index=0, path=str(outputs / name), seed=1, width=16, height=16, metadata=meta
        )
    engine.cancel(job)
    return day / "known.png"


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Attack:
    """`target` and `body` may hold {outputs}, {uploads}, {folder}, {port} (of the canary).

    closed: try it on the server with a login, without one.
    """

    name: str
    status: int
    method: str = "GET"
    target: str = "/"
    headers: tuple[tuple[str, str], ...] = HOST
    body: bytes | list[bytes] = b""
    closed: bool = False
    says: str = ""


def read(name: str, path: str, status: int = 403) -> Attack:
    return Attack(f"file: {name}", status, target=FILE + path)


def settings(name: str, says: str = "", **values: object) -> Attack:
    body = json.dumps({"prompt": "a", **values}).encode()
    return Attack(f"settings: {name}", 400, "POST", "/api/v1/jobs", (*HOST, JSON), body, says=says)


def post(name: str, status: int, body: bytes | list[bytes], *headers: tuple[str, str], **others) -> Attack:
    others = {"target": "/api/v1/jobs", **others}
    return Attack(f"body: {name}", status, "POST", headers=(*HOST, JSON, *headers), body=body, **others)


def foreign(
    name: str, *headers: tuple[str, str], method: str = "GET", target: str = "/api/v1/jobs"
) -> Attack:
    return Attack(f"page: {name}", 403, method, target, (*HOST, *headers))


def host(name: str, *values: str, status: int = 403) -> Attack:
    return Attack(f"host: {name}", status, headers=tuple(("Host", value) for value in values))


def outside(name: str, target: str, method: str = "GET", status: int = 404) -> Attack:
    return Attack(f"gradio: {name}", status, method, target)


def door(name: str, status: int, body: str = "", *headers: tuple[str, str], **others) -> Attack:
    return Attack(
        f"login: {name}", status, headers=(*HOST, *headers), body=body.encode(), closed=True, **others
    )


FORM = {"method": "POST", "target": "/login"}
UPLOAD = {"target": "/api/v1/uploads"}
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000

ATTACKS = [
    read("absolute", "/etc/passwd"),
    read("relative", "../../../../etc/passwd"),
    read("escaped", "%2e%2e%2f%2e%2e%2fetc%2fpasswd"),
    read("escaped twice", "%252e%252e%252fetc%252fpasswd"),
    read("up from the outputs", "{outputs}/../secret.txt"),
    read("up from the uploads", "{uploads}/../secret.txt"),
    read("up from the thumbnails", "{outputs}/.thumbnails/../.zgp/zgp.sqlite3"),
    read("the queue", "{outputs}/.zgp/zgp.sqlite3"),
    read("the queue in capitals", "{outputs}/.ZGP/zgp.sqlite3"),
    read("the log", "{outputs}/.zgp/zgp.log"),
    read("a text in the outputs", "{outputs}/notes.txt"),
    read("a picture that was not made here", "{outputs}/2026-01-01/stranger.png"),
    read("a known picture in a hidden folder", "{outputs}/.hidden/a.png"),
    read("a known picture outside", "{folder}/secret.png"),
    read("a link that leads out", "{outputs}/2026-01-01/link.png"),
    read("a stream of NTFS", "{outputs}/2026-01-01/known.png::$DATA"),
    read("a name cut by a zero", "{outputs}/2026-01-01/known.png%00.txt", 400),
    read("a dot at the end", "{outputs}/2026-01-01/known.png."),
    read("a blank at the end", "{outputs}/2026-01-01/known.png%20"),
    read("a share", "%5C%5Cevil%5Cshare%5Cx.png"),
    read("a share with slashes", "//evil/share/x.png"),
    read("a drive", "C:/Windows/win.ini"),
    read("a device", "{outputs}/con.png"),
    read("a device of Windows", "C:/a/NUL"),
    read("a folder", "{outputs}"),
    read("a file of the program", str(ROOT / "wgp.py")),
    read("a web address", "http://127.0.0.1:{port}/x.png"),
    read("a file address", "file:///etc/passwd"),
    outside("the old form of file", "/gradio_api/file/etc/passwd"),
    outside("up from its static files", "/static/../../../../etc/passwd"),
    outside("up from its assets, escaped", "/assets/..%2f..%2f..%2fpackage.json"),
    outside("a backslash in its assets", "/assets/..%5c..%5cpackage.json"),
    outside("its proxy", "/gradio_api/proxy=http://127.0.0.1:{port}/x"),
    outside("its component files", "/gradio_api/custom_component/a/client/component/..%2f..%2fx"),
    outside("calls past the queue", "/gradio_api/run/generate", "POST"),
    outside("its editor of code", "/gradio_api/vibe-edit", "POST"),
    outside("its view of the code", "/gradio_api/vibe-code"),
    outside("recordings", "/gradio_api/process_recording", "POST"),
    outside("links to states", "/gradio_api/deep_link?session_hash=a"),
    outside("runs", "/gradio_api/runs"),
    outside("monitoring", "/monitoring/summary"),
    outside("the token", "/gradio_api/token"),
    outside("MCP", "/gradio_api/mcp/sse"),
    outside("API pages", "/docs"),
    outside("another method", "/api/v1/jobs", "TRACE"),
    outside("an open redirect", "//evil.example/%2e%2e"),
    host("a foreign name", "evil.example"),
    host("none"),
    host("an empty one", ""),
    host("ours as part of another", "localhost.evil.example"),
    host("an address as part of another", "127.0.0.1.evil.example"),
    host("a user before it", "localhost@evil.example"),
    host("any address", "0.0.0.0:7860"),
    host("of another computer, while only this one may ask", "192.168.1.5:7860"),
    host("two of them", "localhost", "evil.example", status=400),
    Attack("host: forwarded", 403, headers=(*HOST, ("X-Forwarded-Host", "evil.example"))),
    foreign("of another name", ("Origin", "https://evil.example"), method="POST"),
    foreign("of another port", ("Origin", "http://localhost:3000"), method="POST"),
    foreign("of no place", ("Origin", "null"), method="POST"),
    foreign("that deletes", ("Origin", "https://evil.example"), method="DELETE", target="/api/v1/jobs/1"),
    foreign("that listens", ("Origin", "https://evil.example"), target="/api/v1/jobs/1/events"),
    foreign("that joins the queue", ("Origin", "https://evil.example"), method="POST",
            target="/gradio_api/queue/join"),
    foreign("that asks beforehand", ("Origin", "https://evil.example"),
            ("Credentials-Control-Request-Method", "POST"), method="OPTIONS"),
    foreign("that shows a picture", ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "no-cors"),
            target="/api/v1/images/1"),
    foreign("that frames", ("Sec-Fetch-Site", "same-site"), ("Sec-Fetch-Mode", "navigate"),
            ("Sec-Fetch-Dest", "iframe"), target="/"),
    door("the page", 401),
    door("the page in a browser", 303, "", ("Accept", "text/html")),
    door("the queue", 401, target="/gradio_api/queue/data?session_hash=a"),
    door("a picture", 401, target=FILE + "{outputs}/2026-01-01/known.png"),
    door("an upload", 401, method="POST", target="/gradio_api/upload"),
    door("REST", 401, target="/api/v1/jobs"),
    door("OpenAPI", 401, target="/api/v1/openapi.json"),
    door("OpenAI's", 401, target="/v1/models", says="Log in first"),
    door("a name that does not exist", 401, target="/nothing"),
    door("a wrong token", 401, "", ("Authorization", f"Bearer {TOKEN}x"), target="/api/v1/jobs"),
    door("a token in the address", 401, target=f"/api/v1/jobs?token={TOKEN}"),
    door("the password as Basic", 401, "", ("Authorization", "Basic bWU6Y29ycmVjdCBob3JzZQ=="), target="/"),
    door("a session of one's own", 401, "", ("Cookie", "zgp_session=chosen"), target="/config"),
    door("a wrong password", 401, "username=me&password=x", **FORM),
    door("a wrong name", 401, f"username=you&password={PASSWORD}", **FORM),
    door("no password", 401, "username=me", **FORM),
    door("an endless password", 413, "username=me&password=" + "x" * 10_000, **FORM),
    door("from a foreign page", 403, f"username=me&password={PASSWORD}", ("Origin", "https://a.example"),
         **FORM),
    door("another method", 200, method="PUT", target="/login", says="Log in"),
    post("too large, as it says", 413, b"", ("Content-Length", str(MAX_BODY + 1))),
    post("too large, in chunks", 413, [b" " * (1 << 20)] * (MAX_BODY // (1 << 20) + 1)),
    post("a length below zero", 400, b"", ("Content-Length", "-5")),
    post("two lengths", 400, b"", ("Content-Length", "5"), ("Content-Length", "6")),
    post("a length and chunks", 400, [b"{}"], ("Content-Length", "2")),
    post("an upload without a length", 411, [b"x"], target="/gradio_api/upload"),
    post("an upload too large", 413, b"", ("Content-Length", str(MAX_UPLOAD + 1)),
         target="/gradio_api/upload"),
    post("too deep", 400, DEEP, says="levels deep"),
    post("too deep for Gradio", 400, DEEP, target="/gradio_api/queue/join", says="levels deep"),
    post("no JSON", 400, b"{prompt: a}"),
    post("nothing", 400, b""),
    post("a text", 400, b'"a"'),
    post("a list of lists", 400, b"[[]]"),
    post("too many jobs", 400, json.dumps([{"prompt": "a"}] * 101).encode()),
    post("one wrong among many", 400, json.dumps([{"prompt": "a"}] * 3 + [{"prompt": ""}]).encode()),
    post("a number of 10,000 digits", 400, b'{"prompt":"a","seed":1' + b"0" * 10_000 + b"}"),
    post("an infinite number", 400, b'{"prompt":"a","seed":1e999}'),
    post("no number", 400, b'{"prompt":"a","seed":NaN}'),
    post("half a character", 400, b'{"prompt":"\\ud800"}', says="half of a character"),
    post("half a character for Gradio", 400, b'{"fn_index":1,"data":["\\uDFFF"]}',
         target="/gradio_api/queue/join", says="half of a character"),
    settings("a picture of this computer", "upload it first", image_start="/etc/passwd"),
    settings("a picture up from the outputs", "upload it first", image_start="{outputs}/../secret.png"),
    settings("a picture at a web address", "upload it first", image_start="http://127.0.0.1:{port}/x.png"),
    settings("the queue as a picture", image_start="{outputs}/.zgp/zgp.sqlite3"),
    settings("a model by a path", model_type="../../etc/passwd"),
    settings("a LoRA from above", activated_loras=["../../secret.safetensors"]),
    settings("a LoRA from anywhere", activated_loras=["/etc/passwd"]),
    settings("a LoRA without https", activated_loras=["http://example.com/a.safetensors"]),
    *(
        settings(f"a LoRA at {name}", "internet", activated_loras=[f"https://{name}/a.safetensors"])
        for name in (
            "127.0.0.1:{port}", "localhost:{port}", "[::1]", "2130706433", "0x7f.1", "10.0.0.1",
            "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[fe80::1]",
        )
    ),
    settings("enormous pictures", resolution="1000000x1000000"),
    settings("too many pictures", batch_size=10**6),
    settings("a prompt of a megabyte", prompt="a" * (1 << 20)),
    Attack("address: an enormous number", 400, target="/api/v1/jobs/" + "9" * 30),
    Attack("address: a number below zero", 400, target="/api/v1/images/-1"),
    Attack("address: an endless one", 414, target="/" + "a" * 100_000),
    Attack("address: a database in it", 400, target="/api/v1/jobs/1%20OR%201=1"),
    Attack("address: a limit", 400, target="/api/v1/images?limit=100000000"),
    Attack("picture: known, and led out", 404, target="/api/v1/images/2"),
    Attack("picture: known, and hidden", 404, target="/api/v1/images/3"),
    Attack("picture: known, and outside", 404, target="/api/v1/images/4"),
    post("a script as a picture", 400, b"<svg onload='alert(1)'/>", **UPLOAD),
    post("a text as a picture", 400, SECRET, **UPLOAD),
]  # fmt: skip


def test_the_table_is_long_and_every_row_has_a_name():
    assert len(ATTACKS) >= 40 and len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack(attack, house, canary):
    places = {"outputs": house.outputs, "uploads": house.uploads, "folder": house.folder, "port": canary.port}
    body = attack.body
    if isinstance(body, bytes):
        body = fill(body.decode(), places).encode()
    waiting = house.engine.store.counts().queued
    app = house.closed if attack.closed else house.open
    client = f"10.9.0.{ATTACKS.index(attack)}"  # its failures make nobody else wait
    answer = ask(app, attack.method, fill(attack.target, places), attack.headers, body, client)
    assert answer.status == attack.status, answer.body
    check_nothing_leaked(answer, house)
    assert attack.says in answer.body.decode()
    assert house.engine.store.counts().queued == waiting and canary.asked == []


def fill(text: str, places: dict[str, object]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def check_nothing_leaked(answer: Answer, house) -> None:
    for secret in (SECRET, b"SQLite format", b"root:x:", PASSWORD.encode(), TOKEN.encode(), b"Traceback"):
        assert secret not in answer.everything
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Credentials-Control-Allow-Origin") == "" and "zgp_session=" not in answer.header(
        "Set-Cookie"
    )
    assert "evil.example" not in answer.header("Location")
    if answer.status >= 400 and "html" not in answer.header("Content-Type"):
        assert str(house.folder).encode() not in answer.body.replace(b"'" + str(house.folder).encode(), b"")
        told = answer.json
        assert told.get("detail") or told["error"]["message"]


# ---------------------------------------------------------------- what must go on to work


def test_what_is_open_is_open(house):
    for target in (FILE + quote(str(house.known)), FILE + str(house.outputs / ".thumbnails" / "small.webp"),
                   FILE + str(house.uploads / "abc" / "mine.png"), "/api/v1/images/1"):  # fmt: skip
        answer = ask(house.open, "GET", target)
        assert answer.status == 200 and answer.body == house.known.read_bytes()
        assert "sandbox" in answer.header("Content-Security-Policy")
    for name in ("localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:9000"):
        page = ask(house.open, "GET", "/", [("Host", name)])
        assert page.status == 200 and "frame-ancestors 'self'" in page.header("Content-Security-Policy")
    own = [*HOST, JSON, ("Origin", "http://localhost:7860"), ("Sec-Fetch-Site", "same-origin")]
    assert ask(house.open, "POST", "/api/v1/jobs", own, b'{"prompt":"a"}').status == 201
    assert ask(house.closed, "GET", "/", [("Host", "192.168.1.5"), BEARER], client="10.8.0.1").status == 200
    assert ask(house.open, "GET", "/login").status == 303  # nobody has to log in


def test_the_description_for_code_generators_is_whole(house):
    text = ask(house.open, "GET", "/api/v1/openapi.json").body.decode()
    described = json.loads(text)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert {"Settings", "Problem", "JobResponse"} <= references <= set(described["components"]["schemas"])
    documented = set(
        re.findall(r"`(?:GET|POST|DELETE) (/[^`?]+)`", (ROOT / "docs" / "api.md").read_text("utf-8"))
    )
    named = {re.sub(r"{\w+}", "{id}", path) for path in described["paths"]}
    assert documented <= named == documented | {"/v1/models"}


def test_a_page_that_listens_knows_its_names(house, monkeypatch):
    import socket

    from shared.server.errors import ApiError
    from shared.server.origin import HostOriginCheck

    monkeypatch.setattr(socket, "gethostname", lambda: "Studio")
    monkeypatch.setattr(socket, "getfqdn", lambda: "studio.lan")
    hosts = HostOriginCheck(listens=True, allowed=["pictures.example.org"])

    def judged(*headers):
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
        return dict(hosts.checked({"headers": encoded})["headers"])[b"host"]

    for name in ("studio", "studio.local:7860", "studio.lan", "192.168.1.5:7860", "pictures.example.org"):
        assert judged(("Host", name)) == name.encode()
    forwarded = [("Host", "127.0.0.1:7860"), ("X-Forwarded-Host", "pictures.example.org")]
    assert judged(*forwarded, ("Origin", "https://pictures.example.org")) == b"pictures.example.org"
    with pytest.raises(ApiError):
        judged(("Host", "other.lan"))


@pytest.mark.parametrize(
    "path",
    ["a.png", "/a/../b.png", "/a//b.png", "/a/b.png.", "/a/b.png ", "/a/b.png::$DATA", "/a/b:c.png",
     "//h/s/a.png", "\\\\h\\s\\a.png", "/\\h\\a.png", "/a/nul", "/a/COM1.png",
     "/a/con/b.png", "C:a.png", "C:/a/..\\b.png"],
)  # fmt: skip
def test_a_path_that_means_something_else_on_some_system_is_not_plain(path):
    """What a Linux would take for a usual name, too."""
    from shared.server.file_access import _is_plain

    assert not _is_plain(path)
    assert all(
        map(
            _is_plain, ("/a/b c.png", "/a/.thumbnails/b.webp", "C:/a/b.png", "C:\\a\\b.png", "/a/console.png")
        )
    )


# ---------------------------------------------------------------- the login


@pytest.fixture
def doors(house, monkeypatch):
    """The closed server with fresh sessions and failures, on a clock of the test."""
    from shared.server.throttle import LoginThrottle

    now = [1000.0]
    guard = house.closed._sessions
    monkeypatch.setattr(guard, "_throttle", LoginThrottle(lambda: now[0]))
    return SimpleNamespace(app=house.closed, now=now, slow=guard._throttle)


def login(
    app, password: str, client: str = "10.0.0.1", *headers: tuple[str, str], scheme: str = "http"
) -> Answer:
    form = f"username=me&password={quote(password)}".encode()
    return ask(app, "POST", "/login", [*HOST, *headers], form, client, scheme)


def test_a_login_opens_and_a_logout_closes(doors):
    chosen = ("Cookie", "zgp_session=chosen-by-somebody-else")
    answer = login(doors.app, PASSWORD, "10.0.0.1", ("Accept", "text/html"), chosen)
    cookie = answer.header("Set-Cookie")
    assert (answer.status, answer.header("Location")) == (303, "./")
    assert "chosen" not in cookie and {"HttpOnly", "SameSite=lax"} <= set(re.split("; ", cookie))
    assert "Secure" in login(doors.app, PASSWORD, scheme="https").header("Set-Cookie")
    inside = [*HOST, ("Cookie", cookie.partition(";")[0])]
    assert ask(doors.app, "GET", "/api/v1/jobs", inside).status == 200
    assert ask(doors.app, "GET", "/api/v1/jobs", [*HOST, chosen]).status == 401
    assert b"Log out" in ask(doors.app, "GET", "/config", inside).body
    assert ask(doors.app, "GET", "/logout", inside).status == 404  # a link cannot log anybody out
    assert ask(doors.app, "POST", "/logout", inside).status == 303
    assert ask(doors.app, "GET", "/api/v1/jobs", inside).status == 401


def test_guessing_gets_slower_and_locks_out_nobody_else(doors):
    statuses = [login(doors.app, f"guess {number}").status for number in range(8)]
    assert statuses == [401] * 4 + [429] * 4
    answer = login(doors.app, PASSWORD)  # not even the right one, now
    assert answer.status == 429 and int(answer.header("Retry-After")) >= 1
    assert login(doors.app, PASSWORD, client="10.0.0.2").status == 200
    doors.now[0] += 2
    assert login(doors.app, "guess 9").status == 401
    assert login(doors.app, PASSWORD).status == 429  # the wait has doubled
    doors.now[0] += 3
    assert login(doors.app, PASSWORD).status == 200
    wrong = [*HOST, ("Authorization", "Bearer guess")]
    statuses = [ask(doors.app, "GET", "/", wrong, client="10.0.0.3").status for _ in range(5)]
    assert statuses == [401] * 4 + [429]


def test_who_is_in_is_not_kept_waiting_by_others_behind_the_same_address(doors):
    """As behind a NAT or a reverse proxy."""
    cookie = login(doors.app, PASSWORD).header("Set-Cookie").partition(";")[0]
    for number in range(8):
        login(doors.app, f"guess {number}")
    assert login(doors.app, "guess 9").status == 429
    for header in (BEARER, ("Cookie", cookie)):
        assert ask(doors.app, "GET", "/api/v1/jobs", [*HOST, header], client="10.0.0.1").status == 200
    wrong = [*HOST, ("Authorization", "Bearer guess")]
    assert ask(doors.app, "GET", "/", wrong, client="10.0.0.1").status == 429


def test_many_failures_slow_everybody_a_little(doors):
    for number in range(60):
        doors.slow.record_failure(f"10.1.0.{number}")
    assert doors.slow.delay() == 3.0 and doors.slow.retry_after("10.2.0.1") == 0
    doors.now[0] += 61
    assert doors.slow.delay() == 0
    for number in range(6):
        doors.slow.record_failure(f"2001:db8::{number}")  # one subscriber with many addresses
    assert doors.slow.retry_after("2001:db8::99") > 0 and doors.slow.retry_after("2001:db8:0:1::1") == 0


def test_the_login_page_repeats_nothing_that_was_typed(doors):
    form = f"username={quote(EVIL)}&password=x".encode()
    answer = ask(doors.app, "POST", "/login", [*HOST, ("Accept", "text/html")], form)
    assert answer.status == 401 and b"onerror" not in answer.body and b"<script" not in answer.body
    assert "default-src 'none'" in answer.header("Content-Security-Policy")


def test_nothing_answers_before_the_login(house):
    """Whatever Gradio's next version brings stands behind the login, too."""
    paths = set(addresses(house.closed._app))
    assert len(paths) > 60
    for path in paths - {"/login", "/login/"}:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            answer = ask(house.closed, method, path)
            assert answer.status == 401, (method, path)


def addresses(app) -> list[str]:
    found = []
    for route in app.routes:
        below = getattr(route, "original_router", None) or getattr(route, "app", None)
        found += addresses(below) if hasattr(below, "routes") else []
        found.append(re.sub(r"{[^}]*}", "1", getattr(route, "path", "") or "/"))
    return found


def test_no_websocket_is_opened(house):
    said = []

    async def send(message):
        said.append(message)

    scope = {"type": "websocket", "path": "/gradio_api/queue/join", "headers": []}
    asyncio.run(house.open(scope, None, send))
    assert said == [{"type": "websocket.close", "code": 1008}]


# ---------------------------------------------------------------- what comes in


def test_a_queue_that_is_full_takes_no_more(house, monkeypatch):
    store = house.engine.store
    monkeypatch.setattr(store, "counts", lambda: Counts(queued=MAX_WAITING))
    answer = ask(house.open, "POST", "/api/v1/jobs", [*HOST, JSON], b'{"prompt":"a"}')
    assert answer.status == 429 and answer.header("Retry-After") and str(MAX_WAITING) in answer.json["detail"]
    openai = ask(house.open, "POST", "/v1/images/generations", [*HOST, JSON], b'{"prompt":"a"}')
    assert openai.status == 429 and openai.json["error"]["type"] == "rate_limit_error"


def test_a_list_that_fills_the_queue_queues_nothing(house, monkeypatch):
    store = house.engine.store
    before, real = store.counts().queued, store.counts
    full = MAX_WAITING - 2 - before
    monkeypatch.setattr(store, "counts", lambda: replace(real(), queued=full + real().queued))
    body = json.dumps([{"prompt": "a"}] * 5).encode()
    assert ask(house.open, "POST", "/api/v1/jobs", [*HOST, JSON], body).status == 429
    assert real().queued == before


def test_a_picture_made_to_burst_is_refused(house):
    """A PNG of 30,000 x 30,000 pixels is 3 MB of zeros, and 900 MB once it is decoded."""
    bomb = png(30_000, 30_000, zlib.compress(bytes(1000)))
    answer = ask(house.open, "POST", "/api/v1/uploads", HOST, bomb)
    assert answer.status == 400 and "megapixels" in answer.json["detail"]


def png(width: int, height: int, data: bytes) -> bytes:
    """A gray PNG as the format has it: its signature, then length, type, data and CRC of each chunk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + crc.to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_an_uploaded_script_is_never_shown_as_a_page(house):
    for name in ("evil.svg", "evil.html"):
        (house.uploads / "abc" / name).write_text("<svg onload='alert(1)'/>", encoding="utf-8")
        answer = ask(house.open, "GET", FILE + str(house.uploads / "abc" / name))
        assert answer.header("Content-Disposition").startswith("attachment")
        assert "svg" not in answer.header("Content-Type") and "html" not in answer.header("Content-Type")


def test_texts_of_pictures_are_shown_as_texts(house):
    pictures = Pictures(house.engine)
    for html in (pictures.viewer(1), pictures.recent()):
        assert EVIL not in html and "&lt;img src=x" in html
    answer = ask(house.open, "GET", "/api/v1/images")
    assert answer.header("Content-Type") == "application/json" and answer.status == 200


def test_no_path_of_this_computer_is_told(house):
    for target in ("/api/v1/images", "/api/v1/jobs", "/api/v1/jobs/1", "/api/v1/models", "/v1/models"):
        answer = ask(house.open, "GET", target)
        assert answer.status == 200 and str(house.folder).encode() not in answer.body
        assert str(ROOT).encode() not in answer.body


# ---------------------------------------------------------------- what goes out


def test_lora_addresses_are_judged_where_they_lead(monkeypatch):
    import socket

    import httpx

    from shared.errors import UserError
    from shared.files.public_urls import check_public, check_request

    def looked_up(name, *others, **more):
        address = {"inside.example": "10.0.0.7", "outside.example": "93.184.216.34"}[name]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    check_public("https://outside.example/a.safetensors")
    with pytest.raises(UserError, match="inside.example is not an address on the internet"):
        check_public("https://inside.example/a.safetensors")

    def redirect(request):
        return httpx.Response(302, headers={"Location": "https://inside.example/a"})

    for first in ("https://outside.example/a", "https://inside.example/a"):
        client = httpx.Client(
            transport=httpx.MockTransport(redirect),
            follow_redirects=True,
            event_hooks={"request": [check_request]},
        )
        with client, pytest.raises(UserError, match="inside.example"):
            client.get(first)


def test_the_loras_of_users_are_fetched_with_that_check(tmp_path, monkeypatch, canary):
    from shared.errors import UserError
    from shared.loras.library import Library

    library = Library(tmp_path, None)  # its names are asked only of files that came
    with pytest.raises(UserError, match="not an address on the internet"):
        library.ensure(f"https://127.0.0.1:{canary.port}/a.safetensors")
    assert canary.asked == []


# ---------------------------------------------------------------- the code itself

SOURCES = [path for room in ("shared", "models") for path in (ROOT / room).rglob("*.py")] + [ROOT / "wgp.py"]
CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
METHODS = {("torch", "load"), ("os", "system"), ("os", "popen"), ("np", "load"), ("numpy", "load")}


def risks(source: str) -> list[str]:
    """What of a program would run what a file or a page says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = node.func
            if isinstance(name, ast.Name) and name.id in CALLS:
                found.append(name.id)
            if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
                found += [name.attr] if (name.value.id, name.attr) in METHODS else []
            found += [
                str(word.arg)
                for word in node.keywords
                if word.arg in ("shell", "trust_remote_code", "allow_pickle")
                and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            ]
    return found


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load('a')", "eval('1')", "run('a', shell=True)",
     "load('a', trust_remote_code=True)", "os.system('a')", "np.load('a', allow_pickle=flag)"],
)  # fmt: skip
def test_the_search_finds(line):
    assert risks(line)


def test_no_file_and_no_page_can_say_what_runs():
    assert len(SOURCES) > 80
    found = {str(path.relative_to(ROOT)): risks(path.read_text("utf-8")) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}

"""The server as a user starts it, with a login: what docs/api.md says, a browser, requests on the wire."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request

import pytest
from PIL import Image

from tests.support.browser import ROOT, chromium, serve
from tests.support.waiting import LIMIT

USER, PASSWORD, TOKEN = "me", "correct-horse", "0123456789-my-own-token"
DOCUMENT = (ROOT / "docs" / "api.md").read_text("utf-8")
SERVE = f"""
import sys
from pathlib import Path
from shared.cli.main import main
folder = Path(sys.argv[1])
flags = ["--auth", "{USER}:{PASSWORD}", "--api-token", "{TOKEN}", "--server-port", sys.argv[2]]
sys.exit(main(flags, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
"""

pytestmark = pytest.mark.browser  # one server for all of them


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("api"), SERVE) as running:
        yield running
        stream = ask(running, "gradio_api/heartbeat/somebody")  # an open page has one
    stream.close()
    assert "ASGI application" not in (running.folder / "server.log").read_text()


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def here(text: str, server) -> str:
    assert "http://127.0.0.1:7860" in text
    return text.replace("http://127.0.0.1:7860", server.url.rstrip("/"))


def ask(server, path, body=None, **headers):
    request = urllib.request.Request(
        server.url + path,
        body,
        {"Authorization": f"Bearer {TOKEN}", **headers},
        method=headers.pop("method", None),
    )
    return urllib.request.urlopen(request, timeout=LIMIT)


def test_curl_does_what_the_document_says(server, tmp_path):
    if not (shutil.which("curl") and shutil.which("bash")):
        pytest.skip("there is no curl or no bash on this computer")
    [script] = examples("bash")
    done = subprocess.run(["bash", "-ec", here(script, server)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and '{"jobs":[{"id":1,' in done.stdout and "event: done" in done.stdout
    assert Image.open(tmp_path / "circle.png").size == (128, 128)


def test_python_does_what_the_document_says(server, tmp_path, monkeypatch):
    client, _ = examples("python")
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(here(client, server), "api.md", "exec"), {})
    assert "Denoising" in said.getvalue() and said.getvalue().splitlines()[-1].startswith("done ")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_an_openai_client_gets_its_pictures(server):
    """The request that the package `openai` sends for the document's example."""
    values = {"model": "z_image_mini", "prompt": "a green heart", "n": 2, "size": "128x128", "seed": 7}
    answer = json.load(ask(server, "v1/images/generations", json.dumps(values).encode()))
    assert [datum["seed"] for datum in answer["data"]] == [7, 8]
    import base64

    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert picture.size == (128, 128) and answer["zgp"]["ignored"] == {}
    values |= {"n": 1, "response_format": "url", "quality": "hd", "size": "auto"}
    answer = json.load(ask(server, "v1/images/generations", json.dumps(values).encode()))
    with ask(server, answer["data"][0]["url"].removeprefix(server.url)) as file:
        assert file.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(base64.b64decode(json.load(ask(  # the same seed is the same picture
        server, "v1/images/generations", json.dumps({**values, "response_format": "b64_json"}).encode()
    ))["data"][0]["b64_json"]))).tobytes() == picture.tobytes()  # fmt: skip


def test_an_upload_serves_as_start(server):
    picture = io.BytesIO()
    Image.new("RGB", (128, 128), "blue").save(picture, "PNG")
    upload = json.load(ask(server, "api/v1/uploads", picture.getvalue()))
    assert re.fullmatch(r"[0-9a-f]{64}\.png", upload["name"]) and upload["width"] == 128
    settings = {"prompt": "a red circle on blue", "image_start": upload["name"]}
    job = json.load(ask(server, "api/v1/jobs", json.dumps(settings).encode()))["jobs"][0]
    with ask(server, job["url"][1:] + "/events") as lines:
        assert b"event: done\n" in list(lines)
    assert json.load(ask(server, job["url"][1:]))["settings"]["image_start"] == upload["name"]


def test_a_lost_line_goes_on_where_it_broke(server):
    job = json.load(ask(server, "api/v1/jobs", b'{"prompt": "a circle"}'))["jobs"][0]
    path = job["url"][1:] + "/events"
    with ask(server, path) as lines:
        whole = [line for line in lines if line.startswith((b"id: ", b"event: "))]
    kept = [(int(number[4:]), kind) for number, kind in zip(whole[::2], whole[1::2], strict=True)]
    first, last = kept[0], kept[-1]
    with ask(server, path, **{"Last-Event-ID": str(first[0])}) as lines:
        rest = lines.read()
    assert f"id: {first[0]}\n".encode() not in rest and f"id: {last[0]}\n".encode() in rest
    with ask(server, path, **{"Last-Event-ID": str(last[0])}) as nothing:
        assert nothing.status == 204
    with pytest.raises(urllib.error.HTTPError) as late:
        ask(server, job["url"][1:], method="DELETE")
    assert late.value.code == 409 and b"nothing to cancel" in late.value.read()


def test_gradios_client_logs_in_or_shows_a_token(server):
    from gradio_client import Client

    settings = {"prompt": "a red circle"}
    for way in ({"auth": (USER, PASSWORD)}, {"headers": {"Authorization": f"Bearer {TOKEN}"}}):
        result = Client(server.url, verbose=False, **way).predict(settings, api_name="/generate")
        assert len(result["images"]) == 1
    with pytest.raises(Exception, match="ogin|redentials"):
        Client(server.url, verbose=False)


def test_no_file_and_no_server_of_this_computer_is_read_for_the_page(server):
    """The page's own handlers, called with files that nobody uploaded: `read_picture` stands for all."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.5)
        near = f"http://127.0.0.1:{canary.getsockname()[1]}/x.png"
        config = json.load(ask(server, "config"))
        [function] = [one["id"] for one in config["dependencies"] if one["api_name"] == "read_picture"]
        for path in (near, str(ROOT / "docs" / "page.png"), str(server.folder / ".zgp" / "zgp.sqlite3")):
            file = {"path": path, "url": near, "meta": {"_type": "gradio.FileData"}}
            call = {"data": [file, "z_image_mini"], "fn_index": function, "session_hash": "somebody"}
            ask(
                server,
                "gradio_api/queue/join",
                json.dumps(call).encode(),
                **{"Content-Type": "application/json"},
            )
            with ask(server, "gradio_api/queue/data?session_hash=somebody") as lines:
                [ended] = [line for line in lines if b'"process_completed"' in line]
            assert b'"success":false' in ended and b"SQLite format" not in ended
        with pytest.raises(TimeoutError):
            asked.append(canary.accept())
    assert asked == []


@pytest.mark.parametrize(
    "head, status",
    [
        (b"GET /api/v1/jobs HTTP/1.1\r\nHost: evil.example\r\n", 403),
        (b"GET /api/v1/jobs HTTP/1.0\r\n", 403),
        (b"GET http://evil.example/api/v1/jobs HTTP/1.1\r\nHost: evil.example\r\n", 403),
        (b"GET /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        (b"GET /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: a\nHost: b\r\n", 400),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n",
         400),
        (b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n", 400),
        (b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
         b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
         b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n",
         401),
        (b"GET /gradio_api/file=/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n", 401),
    ],
)  # fmt: skip
def test_on_the_wire(server, head, status):
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as line:
        line.sendall(head + b"Connection: close\r\n\r\n0\r\n\r\n")
        answer = line.recv(65536)
    assert int(answer.split()[1]) == status and b"root:" not in answer


def test_one_logs_in_makes_a_picture_and_logs_out(server):
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 390, "height": 800})
        context.set_default_timeout(1000 * LIMIT)
        tab = context.new_page()
        complaints = []
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tab.goto(server.url)
        assert tab.url.endswith("/login")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for password in ("wrong", PASSWORD):
            tab.fill("#username", USER)
            tab.fill("#password", password)
            tab.click("button")
            if password == "wrong":
                assert "do not belong together" in tab.inner_text("[role=alert]")
        tab.wait_for_selector("#generate")
        tab.locator("#prompt textarea").fill("a red circle on a white background")
        tab.locator("#generate").click()
        link = tab.wait_for_selector("#viewer a.zgp-canvas").get_attribute("href")
        assert tab.evaluate("document.querySelector('#viewer img').decode().then(() => true)")
        # what the browser says of the wrong password, and of streams that end now, is not the page's
        assert [text for text in complaints if "401" not in text] == []
        tab.get_by_role("button", name="Log out").click()
        tab.wait_for_selector("#username")
        assert context.request.get(server.url + link).status == 401
        context.close()


@pytest.mark.parametrize("path", ["api/v1/jobs", "v1/images/generations"])
def test_a_large_download_is_refused_with_its_size_until_a_yes(server, path):
    body = json.dumps({"prompt": "x", "model_type": "z_image"}).encode()

    def newest():
        return [job["id"] for job in json.load(ask(server, "api/v1/jobs?limit=1"))]

    before = newest()
    if next(one["on_disk"] for one in json.load(ask(server, "api/v1/models")) if one["id"] == "z_image"):
        pytest.skip("the model is on this computer")
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, path, body, **{"Content-Type": "application/json"})
    said = refused.value.read().decode()
    assert refused.value.code == 409 and re.search(r"\d+\.\d GB \((bf16|int8)\)", said), said
    assert "download=true" in said and newest() == before


def test_models_say_what_their_first_picture_downloads(server):
    models = {model["id"]: model for model in json.load(ask(server, "api/v1/models"))}
    assert models["z_image"]["on_disk"] or models["z_image"]["download_bytes"] > 10**9
    assert models["z_image_mini"]["download_bytes"] == 0

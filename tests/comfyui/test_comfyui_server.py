"""The helper that starts ComfyUI, with a make-believe ComfyUI where the real one would take too long."""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tools.comfyui.install import link_pack, unlink_pack
from tools.comfyui.server import ComfyError, ComfyInstall, ComfyServer, find_comfyui

FAKE = """
import argparse, http.server, json, os, pathlib, subprocess, sys
HISTORY, DIES = {}, False
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--base-directory")
options, rest = parser.parse_known_args()
print("started with", *rest, flush=True)
BEHAVIOUR

class Answer(http.server.BaseHTTPRequestHandler):
    def reply(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith("/history"):
            if DIES:
                print("Segmentation fault", flush=True)
                os._exit(139)
            return self.reply(200, HISTORY)
        self.reply(200, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/upload/image":
            print("upload", body, flush=True)
            return self.reply(200, {"name": "kept (1).png", "subfolder": ""})
        if self.path == "/prompt":
            return self.reply(200, {"prompt_id": "p", "node_errors": {}})
        self.reply(200, {})

http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Answer).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyInstall:
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    folder = tmp_path / "ComfyUI of a user"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(FAKE.replace("BEHAVIOUR", ""), "utf-8")
    (folder / "comfyui_version.py").write_text('__version__ = "9.8.7"\n', "utf-8")
    install = ComfyInstall.at(folder)
    assert install is not None
    return install


def _behave(install: ComfyInstall, code: str) -> None:
    (install.path / "main.py").write_text(FAKE.replace("BEHAVIOUR", code), "utf-8")


def test_install_knows_version_and_python(fake: ComfyInstall) -> None:
    assert fake.version == "9.8.7"
    assert fake.python == Path(sys.executable)
    own = fake.path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own.parent.mkdir(parents=True)
    own.touch()
    again = ComfyInstall.at(fake.path)
    assert again is not None and again.python == own


def test_portable_windows_build(fake: ComfyInstall) -> None:
    portable = fake.path.parent / "python_embeded" / "python.exe"
    portable.parent.mkdir()
    portable.touch()
    install = ComfyInstall.at(fake.path)
    assert install is not None and install.python == portable


def test_find_by_variable(fake: ComfyInstall, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(fake.path))
    found = find_comfyui()
    assert found is not None and found.path == fake.path
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ComfyError, match=r"COMFYUI_PATH is .* no ComfyUI"):
        find_comfyui()
    assert ComfyInstall.at(tmp_path) is None


def test_server_starts_answers_and_ends(fake: ComfyInstall, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").touch()
    with ComfyServer(fake, pack) as server:
        url, base = server.url, server.base
        assert (base / "custom_nodes" / "ComfyUI-Retrace" / "__init__.py").exists()
        assert "--cpu" in server.log
        assert server.object_info() == {}
    assert not base.exists()
    assert (pack / "__init__.py").exists(), "the pack behind the link was deleted"
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=2)
    server.close()  # twice is fine


def test_plain_server_has_no_pack(fake: ComfyInstall) -> None:
    with ComfyServer(fake, None, gpu=True) as server:
        assert not list((server.base / "custom_nodes").iterdir())
        assert "--cpu" not in server.log


def test_a_server_that_stops_shows_its_last_lines(fake: ComfyInstall) -> None:
    _behave(fake, "raise SystemExit('no module named torch')")
    with pytest.raises(ComfyError, match=r"9\.8\.7.*stopped while it started") as caught, ComfyServer(fake, None):
        pass
    assert "no module named torch" in str(caught.value)


def test_a_server_that_never_answers(fake: ComfyInstall) -> None:
    _behave(fake, "import time; time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(ComfyError, match="did not answer in 1 s"), ComfyServer(fake, None, start_timeout=1):
        pass
    assert time.monotonic() - started < 20


def test_a_graph_that_never_ends(fake: ComfyInstall) -> None:
    waited: list[float] = []
    with (
        ComfyServer(fake, None) as server,
        pytest.raises(ComfyError, match="not done after 1 s and was interrupted"),
    ):
        server.run({}, timeout=1, on_wait=waited.append)
    assert waited == sorted(waited) and waited


def test_a_server_that_dies_while_a_graph_runs(fake: ComfyInstall) -> None:
    _behave(fake, "DIES = True")
    with ComfyServer(fake, None) as server, pytest.raises(ComfyError) as caught:
        server.run({})
    assert "gave no answer to /history/p" in str(caught.value)
    assert "its process ended with status 139" in str(caught.value)
    assert "Segmentation fault" in str(caught.value)


def test_a_server_that_is_gone_or_silent(fake: ComfyInstall) -> None:
    with ComfyServer(fake, None) as server:
        assert server._process is not None
        server._process.kill()
        with pytest.raises(ComfyError, match=r"gave no answer to /object_info .*its process ended"):
            server.object_info()


DONE = "HISTORY = {'p': {'status': {'messages': []}, 'outputs': {}}}"


def test_a_graph_that_is_done_has_a_result(fake: ComfyInstall) -> None:
    _behave(fake, DONE)
    with ComfyServer(fake, None) as server:
        assert server.run({}).images == []


def test_an_image_is_uploaded_under_its_name(fake: ComfyInstall, tmp_path: Path) -> None:
    (tmp_path / "a photo.png").write_bytes(b"bytes of it")
    with ComfyServer(fake, None) as server:
        assert server.upload_image(tmp_path / "a photo.png") == "kept (1).png"
        sent = server.log
    assert 'name="image"; filename="a photo.png"' in sent and "bytes of it" in sent
    assert 'name="overwrite"' in sent


def test_a_proxy_of_the_environment_is_not_asked(fake: ComfyInstall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ComfyServer(fake, None) as server:
        assert server.object_info() == {}


def test_outside_the_block_it_says_so(fake: ComfyInstall) -> None:
    with pytest.raises(ComfyError, match="not running"):
        _ = ComfyServer(fake).base


def test_links_fall_back_to_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, place = tmp_path / "pack", tmp_path / "custom_nodes" / "ComfyUI-Retrace"
    (pack / ".git").mkdir(parents=True)
    (pack / "__init__.py").touch()
    place.parent.mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_pack(pack, place)
    assert (place / "__init__.py").is_file() and not (place / ".git").exists()
    unlink_pack(place)
    assert place.is_dir(), "only links are removed"

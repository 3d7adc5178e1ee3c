"""Passwords and tokens of URLs: used to read, and in nothing that is stored, hashed, logged or printed."""

from __future__ import annotations

import base64
import http.server
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist import last_line, logs, urls
from ncf_dist.cli import run_job
from ncf_dist.config import Config
from ncf_dist.files import filesystem, resolve
from ncf_dist.manifests import run_key
from tests.test_cli import raises
from tests.test_line import ROOT, checkerboard

PASSWORD, TOKEN = "pa55w0rd", "t0k3n-of-the-store"


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(urls.SECRETS, "{}")


PUBLIC = {
    "http://host/x": "http://host/x",
    "http://user:pw@host/x": "http://host/x",
    "http://user:p@w@host/x": "http://host/x",
    "https://host:8443/a/b.csv?token=abc&sig=d%2Fe#part": "https://host:8443/a/b.csv",
    "HTTP://user@host/?t": "HTTP://host/",
    "s3://key:secret@bucket/logs/2026-0?.csv": "s3://bucket/logs/2026-0?.csv",
    "s3://bucket/x.csv?versionId=abc": "s3://bucket/x.csv",
    "ftp://me:pw@host/*.csv": "ftp://host/*.csv",
    "simplecache::http://u:p@h/a.zip?t=1": "simplecache::http://h/a.zip",
    "zip://in.csv::http://u:p@h/a.zip?t=1::file:///x": "zip://in.csv::http://h/a.zip::file:///x",
    "a@b.c": "a@b.c",
    "logs/what?.csv": "logs/what?.csv",
    "401, url='http://u:p@h/x?t=1', again": "401, url='http://h/x', again",
    "<http://u:p@h/x?t=1> and http://h/y?z": "<http://h/x> and http://h/y",
    "of http://[::1]:80/x?t=1 again": "of http://[::1]:80/x again",
}


@pytest.mark.parametrize("text", PUBLIC)
def test_the_public_form_of_a_url(text: str) -> None:
    assert urls.public_url(text) == PUBLIC[text]
    assert urls.public_url(PUBLIC[text]) == PUBLIC[text]


HIDDEN = {
    "http://user:s3c'r3t@h/x": "http://h/x",
    'http://user:<s3cr3t|"x>@h/x': "http://h/x",
    "http://us er:p/s3#cr3t@h/x": "http://h/x",
    "http://h/x?token=ab'cdef": "http://h/x",
    "http://h/x?token=ab::cdef": "http://h/x",
    "http://[::1]:80/x?token=abcdef": "http://[::1]:80/x",
    "http://h:80/a b?token=abcdef#g h": "http://h:80/a b",
    "zip://a.csv::http://user:abcdef@h/x.zip?t=ghijkl::file:///x": "zip://a.csv::http://h/x.zip::file:///x",
    "simplecache::ftp://user:abcdef@h/x": "simplecache::ftp://h/x",
    "abfs://container@account/x?sig=abcdef": "abfs://container@account/x",
}


@pytest.mark.parametrize("url", HIDDEN)
def test_a_url_of_a_config_is_hidden_whole_and_opened_as_it_was(url: str) -> None:
    """Of a whole URL every character is the URL's: quotes, blanks and colons too."""
    assert urls.hide(url) == HIDDEN[url]
    assert urls.real_url(HIDDEN[url]) == url
    said = urls.scrub(f"error: {url} cannot be opened")
    assert not [secret for secret in ("s3c", "cr3t", "cdef", "ghijkl") if secret in said], said


def test_containers_are_told_apart() -> None:
    assert urls.hide("abfs://a@account/x") != urls.hide("abfs://b@account/x")


words = st.text(st.sampled_from("abcXYZ019._~-%!$&()*+,;='|"), min_size=5, max_size=12)


@given(words, words, words, st.sampled_from(["http", "https", "ftp", "s3", "webdav+https"]))
def test_a_hidden_url_is_found_again_and_says_nothing(user: str, password: str, token: str, kind: str) -> None:
    login, query = f"{user}-U:{password}-P@", f"?key={token}-T"
    url = f"{kind}://{login}host:80/a/b.csv{query}"
    public = urls.hide(url)
    assert public == f"{kind}://host:80/a/b.csv"
    assert urls.real_url(public) == url
    assert urls.hide(public) == public
    said = urls.scrub(f"{url} and '{url}' and {password}-P or {token}-T")
    assert not [secret for secret in (f"{password}-P", f"{token}-T") if secret in said]


def test_what_lies_under_a_folder_or_a_glob_has_its_login() -> None:
    urls.hide("ftp://me:secret@host/logs/")
    urls.hide("ftp://you:other1@host/logs/new/*.csv")
    assert urls.real_url("ftp://host/logs/a/b.csv") == "ftp://me:secret@host/logs/a/b.csv"
    assert urls.real_url("ftp://host/logs/new/b.csv") == "ftp://you:other1@host/logs/new/b.csv"
    assert urls.real_url("ftp://host/logs2/b.csv") == "ftp://host/logs2/b.csv"
    assert urls.real_url("/logs/a.csv") == "/logs/a.csv"


def config(**sections: Any) -> Config:
    return Config.model_validate({"paths": {"lake": "lake"}, "input": {"path": "log"}, **sections})


def test_a_config_holds_public_urls_and_what_it_names_is_opened_with_the_secrets() -> None:
    url = f"http://me:{PASSWORD}@host/x?token={TOKEN}"
    both = config(
        paths={"lake": f"ftp://me:{PASSWORD}@lake/"},
        input={"path": [url, f"{url}2", "log?.dat"], "items": {"path": url}},
        score={"allow_items": url},
        train={"warm_start": url},
        spark={"master": "spark://host:7077"},
    )
    assert both.input.path == ("http://host/x", "http://host/x#2", "log?.dat")
    dumped = both.model_dump_json(by_alias=True)
    for secret in (PASSWORD, TOKEN):
        assert secret not in dumped
        assert secret not in repr(both)
    again = Config.model_validate_json(dumped)
    assert again == both
    assert [urls.real_url(path) for path in again.input.path] == [url, f"{url}2", "log?.dat"]
    assert urls.real_url(resolve(again.paths.lake)) == f"ftp://me:{PASSWORD}@lake"
    assert filesystem("memory://a/b")[1] == "/a/b"


def test_a_new_password_or_token_is_the_same_run() -> None:
    keys = set()
    for secret in ("first-one", "second-one"):
        found = config(input={"path": f"http://me:{secret}@host/x?token={secret}"})
        keys.add(run_key("prepare", "2026-01-01", found.model_dump(mode="json"), {}))
    assert len(keys) == 1


def test_the_last_line_and_the_log_hold_no_secret_of_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://me:{PASSWORD}@host/x?token={TOKEN}"
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"paths": {"lake": str(tmp_path / "lake")}, "input": {"path": url}}))
    formatter = logs.Formatter()
    for error in (OSError(f"404 at {url}"), ValueError(f"login me {PASSWORD} refused; {TOKEN}")):
        assert run_job("prepare", raises(error), ["--config", str(path), "--ds", "2026-01-01"]) == 1
        out = capsys.readouterr().out
        record = logging.LogRecord("x", 40, "x", 1, "failed: %s", (error,), (type(error), error, None))
        for text in (out, formatter.format(record)):
            assert PASSWORD not in text
            assert TOKEN not in text
            assert type(error).__name__ in text


# ---- the real thing ------------------------------------------------------------------------------------------

HTTP = '''
"""Loaded by every Python of the job: a file system for http:// without packages that this project does not need."""
import io, urllib.parse, urllib.request, base64
import fsspec

class Web(fsspec.AbstractFileSystem):
    protocol = ("http",)
    @classmethod
    def _strip_protocol(cls, path): return path
    def unstrip_protocol(self, path): return path
    def get(self, url):
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=host).geturl())
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        try:
            return urllib.request.urlopen(request).read()
        except OSError as error:
            raise FileNotFoundError(f"{error} for {url}")
    def info(self, path, **_): return {"name": path, "size": len(self.get(path)), "type": "file", "ETag": "1"}
    def isdir(self, path): return False
    def exists(self, path, **_): return True
    def ls(self, path, detail=True, **_): return [self.info(path) if detail else path]
    def _open(self, path, mode="rb", **_): return io.BytesIO(self.get(path))

fsspec.register_implementation("http", Web, clobber=True)
'''


class Guarded(http.server.BaseHTTPRequestHandler):
    """Serves two logs to who knows the password and the token; the second has lines that are none."""

    rows = "\n".join(checkerboard()) + "\n"
    bad = "".join(f"customer-{n}@example.org likes {n}\n" for n in range(5))

    def do_GET(self) -> None:
        basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        known = self.headers["Authorization"] == f"Basic {basic}" and self.path.endswith(f"?token={TOKEN}")
        body = (self.rows if self.path.startswith("/good") else self.rows[:100] + "\n" + self.bad).encode()
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(body if known else b"")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """host:port"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{serving.server_port}"
        serving.shutdown()


@pytest.fixture
def line(tmp_path: Path) -> Path:
    tree = {
        "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
        "negatives": {"draws": 2, "candidates": 10},
        "model": {"name": "gmf", "factors": 4},
        "train": {"launcher": "none", "batch_size": 64, "epochs": 1},
        "spark": {"master": "local[1]", "driver_memory": "1g", "shuffle_partitions": 1},
    }
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "python").mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(textwrap.dedent(HTTP))
    return tmp_path / "line.yaml"


JOBS = """
import json, os, sys
from ncf_dist import urls
from ncf_dist.cli import main
from ncf_dist.config import Spark
from ncf_dist.spark_io import kept_session

with kept_session(Spark()):
    for args in json.loads(sys.argv[1]):
        os.environ[urls.SECRETS] = "{}"  # Each job knows the secrets of its own command.
        main(args)
"""


def test_a_log_behind_a_password_is_read_and_the_password_is_nowhere(line: Path, server: str) -> None:
    """Config, manifests, rank spec, quarantine, last line and log, of a night and of one that is refused. One process
    runs the jobs, so that Spark starts once."""

    def job(name: str, log: str, token: str = TOKEN) -> list[str]:
        path = f"input.path=http://me:{PASSWORD}@{server}/{log}.dat?token={token}"
        return [name, "--config", str(line), "--ds", "2026-01-02", "--set", path]

    jobs = [
        job("prepare", "good"),
        job("prepare", "bad"),
        job("train", "good"),
        job("prepare", "good", TOKEN + "-wrong"),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(line.parent / "python"), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-c", JOBS, json.dumps(jobs)], env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    reports = [last_line.read(row) for row in ran.stdout.splitlines()]
    assert [report["exit_code"] for report in reports] == [0, 3, 0, 1], ran
    assert f"http://{server}/bad.dat" in reports[1]["error"]
    assert f"for http://{server}/good.dat" in reports[3]["error"]
    assert f"for http://{server}/good.dat" in ran.stderr, "the log says it, too"
    for text in (ran.stdout, ran.stderr):
        assert PASSWORD not in text
        assert TOKEN not in text
        assert "customer-" not in text, "a person's id belongs into the quarantine alone"
    stored = [path for path in Path(line.parent / "lake").rglob("*") if path.is_file()]
    assert {path.name for path in stored} >= {"manifest.json", "spec.json", "history.json"}
    for path in stored:
        assert PASSWORD.encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path


def test_credentials_of_the_environment_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"the/{name}+=")
        said = urls.scrub(f"refused the/{name}+= and {quote(f'the/{name}+=', safe='')}")
        assert said == "refused *** and ***"
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert urls.scrub("in eu-central-1") == "in eu-central-1"

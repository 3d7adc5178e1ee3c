"""Whatever form credentials come in, they are in no file, log or line of a publication to S3."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from ncf_dist.errors import ExitCode
from tests.published import Night, good
from tests.s3 import KEY, SECRET, TOKEN, Store, served

pytest.importorskip("s3fs")

DS = "2026-01-31"
WRONG, PASSWORD, BEARER = "AKIANOBODYKNOWSIT", "PasswordOfTheEndpoint+/1", "BearerOfTheContainer+/2"
GIVEN = {"AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": TOKEN, "SessionToken": TOKEN}
Environment = dict[str, str]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served() as server:
        yield server


def found_in(texts: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """(which text, what of the credentials it has), as they are, quoted for a URL, and in base64."""
    secrets = (KEY, SECRET, TOKEN, WRONG, PASSWORD, BEARER)
    spelt = [form for secret in secrets for form in (secret, quote(secret, safe=""), _base64(secret))]
    return [(name, form) for name, text in texts.items() for form in spelt if form.encode() in text]


def _base64(secret: str) -> str:
    """Its longest stretch that does not depend on what follows."""
    return base64.b64encode(secret.encode()[: len(secret) // 3 * 3]).decode()


# ---- the forms -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _token(folder: Path, store: Store) -> Iterator[Environment]:
    yield {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}


@contextlib.contextmanager
def _profile(folder: Path, store: Store) -> Iterator[Environment]:
    (folder / "aws").write_text(f"[night]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    yield {"AWS_PROFILE": "night", "AWS_SHARED_CREDENTIALS_FILE": str(folder / "aws"), "AWS_SESSION_TOKEN": TOKEN}


@contextlib.contextmanager
def _process(folder: Path, store: Store) -> Iterator[Environment]:
    """A program of the person's own says them."""
    (folder / "said.json").write_text(json.dumps({"Version": 1, **GIVEN}))
    (folder / "aws").write_text(f"[default]\ncredential_process = cat {folder / 'said.json'}\n")
    yield {"AWS_CONFIG_FILE": str(folder / "aws")}


@contextlib.contextmanager
def _container(folder: Path, store: Store) -> Iterator[Environment]:
    """A container asks its host for them, with a token of its own."""

    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = {**GIVEN, "Expiration": "2099-01-01T00:00:00Z"} if self.headers["Authorization"] == BEARER else {}
            self.send_response(200 if given else 403)
            self.end_headers()
            self.wfile.write(json.dumps(given).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as host:
        threading.Thread(target=host.serve_forever, args=(0.05,), daemon=True).start()
        uri = f"http://127.0.0.1:{host.server_address[1]}/credentials"
        yield {"AWS_CONTAINER_CREDENTIALS_FULL_URI": uri, "AWS_CONTAINER_AUTHORIZATION_TOKEN": BEARER}
        host.shutdown()


@contextlib.contextmanager
def _endpoint(folder: Path, store: Store) -> Iterator[Environment]:
    """A password of the endpoint's own, at which nobody answers any more."""
    with _token(folder, store) as keys:
        yield {**keys, "AWS_ENDPOINT_URL": f"http://me:{quote(PASSWORD, safe='')}@127.0.0.1:9"}


@contextlib.contextmanager
def _wrong(folder: Path, store: Store) -> Iterator[Environment]:
    yield {"AWS_ACCESS_KEY_ID": WRONG, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}


Form = Callable[[Path, Store], contextlib.AbstractContextManager[Environment]]
FORMS: dict[str, tuple[Form, ExitCode]] = {
    "token": (_token, ExitCode.DONE),
    "profile": (_profile, ExitCode.DONE),
    "process": (_process, ExitCode.DONE),
    "container": (_container, ExitCode.DONE),
    "endpoint": (_endpoint, ExitCode.INPUT),
    "url": (_token, ExitCode.CONFIG),
    "wrong": (_wrong, ExitCode.INPUT),
}


@pytest.mark.parametrize("form", ["token", *(pytest.param(form, marks=pytest.mark.soak) for form in [*FORMS][1:])])
def test_credentials_are_in_no_file_log_or_line(store: Store, tmp_path: Path, form: str) -> None:
    night = Night(tmp_path, DS, lake=f"{store.root}/{form}")
    night.prepare()
    night.score(good())
    tree = night.config.model_dump(mode="json", exclude_defaults=True)
    if form == "url":
        tree["paths"]["lake"] = night.lake.root.replace("s3://", f"s3://{KEY}:{quote(SECRET, safe='')}@")
    (given := tmp_path / "given").mkdir()
    (given / "line.yaml").write_text(json.dumps(tree))
    (home := tmp_path / "home").mkdir()
    known = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    known |= {"AWS_ENDPOINT_URL": store.url, "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "eu-west-1"}
    how, code = FORMS[form]
    store.fail_every = 5 if form == "token" else 0
    try:
        with how(given, store) as environment:
            done = subprocess.run(
                [sys.executable, "-m", "ncf_dist.cli", "publish", "--config", str(given / "line.yaml"), "--ds", DS],
                env={**known, "HOME": str(home), "TMPDIR": str(home), **environment},
                cwd=home,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        store.fail_every = 0
    assert done.returncode == code, done.stderr
    assert ("retries" in json.loads(done.stdout.splitlines()[-1])) == (form in ("token", "endpoint"))
    texts = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    texts |= {
        str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and given not in path.parents
    }
    texts |= {name: store.data(name) for name in store.names()}
    print(f"credentials by {form}: exit code {done.returncode}, {len(texts)} files, logs and lines looked through")
    assert found_in(texts) == []

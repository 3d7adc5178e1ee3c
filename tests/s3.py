"""An S3 server in this process: as much of the protocol as fsspec and delta-rs use, and the faults that tests need.

    with served() as store:                      # AWS_ENDPOINT_URL and credentials are set in the environment
        files.write_bytes(f"{store.root}/x", b"1")
        store.fail_every = 5                     # answer 503 to every fifth request
        store.delay_s = 0.2                      # be far away
        store.conditions = False                 # ignore If-None-Match and If-Match, as some stores do

The soak tests of test_s3.py hold it to what a real server does.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import hashlib
import http.server
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

KEY, SECRET, TOKEN = "AKIA2TESTKEYOFTESTS", "SecretOfTheTestsOnly/+abcdefghijk", "TokenOfTheTestsOnly+/=0123456789"
BUCKET = "lake"
PAGE = 1000


@dataclass
class Stored:
    data: bytes
    tag: str
    written: float


@dataclass
class Store:
    """What the server holds, and how it behaves. requests: (method, path with query) of all, in order; hook: called
    before each request is answered; may raise Refused; lose: the next put to a key with this in it is carried out and
    answered with 503."""

    url: str = ""
    objects: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    fail_every: int = 0
    delay_s: float = 0.0
    conditions: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)
    bytes_sent: int = 0
    hook: Callable[[str, str], None] | None = None
    lose: str | None = None
    clock: Callable[[], float] = time.time

    @property
    def root(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    prefix: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def names(self, below: str = "") -> list[str]:
        """Keys from the root on."""
        start = f"{self.prefix}/{below}"
        return sorted(key[len(self.prefix) + 1 :] for key in self.objects if key.startswith(start))

    def data(self, name: str) -> bytes:
        return self.objects[f"{self.prefix}/{name}"].data


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@contextlib.contextmanager
def served() -> Iterator[Store]:
    """A server on loopback, which this process's environment names while inside."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    server = _Server(("127.0.0.1", 0), handler)
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    names = {*store.environment, "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3"}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(store.environment)
    forget_clients()
    try:
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        forget_clients()
        server.shutdown()
        server.server_close()


def forget_clients() -> None:
    """File systems that are open know the endpoint that they were made for."""
    from ncf_dist.s3 import S3

    S3.clear_instance_cache()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # A client that was killed.


class _Handler(http.server.BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        body = self._read()
        store, parts = self.store, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        with store.lock:
            store.requests.append((self.command, self.path))
            number = len(store.requests)
        if store.delay_s:
            time.sleep(store.delay_s)
        try:
            if store.fail_every and number % store.fail_every == 0:
                raise Refused(503, "SlowDown")
            if KEY not in self.headers.get("Authorization", ""):
                raise Refused(403, "InvalidAccessKeyId")
            if store.hook is not None:
                store.hook(self.command, unquote(parts.path))
            if bucket != BUCKET:
                raise Refused(404, "NoSuchBucket")
            with store.lock:
                self._do(key, query, body)
        except Refused as error:
            text = f"<Error><Code>{error.code}</Code><Message>{error.code} of a test</Message></Error>"
            self._send(error.status, text.encode())

    def _read(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            if len(data := self.rfile.read(length)) < length:
                raise ConnectionError("the client has gone in the middle of its request")
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        plain, rest = b"", data
        while rest:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            plain, rest = plain + rest[:size], rest[size + 2 :]
        return plain

    def _do(self, key: str, query: dict[str, str], body: bytes) -> None:
        if not key:
            self._bucket(query, body)
        elif self.command == "POST" or "uploadId" in query:
            self._multipart(key, query, body)
        elif self.command == "PUT":
            self._put(key, body)
        elif self.command == "DELETE":
            self.store.objects.pop(key, None)
            self._send(204)
        else:
            self._get(key)

    def _bucket(self, query: dict[str, str], body: bytes) -> None:
        if self.command == "POST" and "delete" in query:
            for each in ElementTree.fromstring(body).iter():
                if each.tag.endswith("Key"):
                    self.store.objects.pop(each.text or "", None)
            self._send(200, b"<DeleteResult></DeleteResult>")
        elif self.command == "GET" and "location" not in query:
            self._send(200, self._listed(query).encode())
        else:
            self._send(200, b"<LocationConstraint>eu-central-1</LocationConstraint>" if "location" in query else b"")

    def _listed(self, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        shown = quote if query.get("encoding-type") == "url" else escape
        rows, last, seen = list[str](), "", set[str]()
        names = [key for key in sorted(self.store.objects) if key.startswith(prefix) and key > after]
        for key in names:
            common = (
                key[: key.index(delimiter, len(prefix)) + 1] if delimiter and delimiter in key[len(prefix) :] else ""
            )
            if common and (common in seen or common <= after):
                last = key
                continue
            if len(rows) >= most:
                break
            last = key
            if common:
                seen.add(common)
                rows.append(f"<CommonPrefixes><Prefix>{shown(common)}</Prefix></CommonPrefixes>")
                continue
            found = self.store.objects[key]
            when = dt.datetime.fromtimestamp(found.written, dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            rows.append(
                f"<Contents><Key>{shown(key)}</Key><LastModified>{when}</LastModified><ETag>&quot;{found.tag}&quot;"
                f"</ETag><Size>{len(found.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        more = bool(names) and last != names[-1]
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        return (
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{shown(prefix)}</Prefix><Delimiter>{delimiter}</Delimiter>"
            f"<KeyCount>{len(rows)}</KeyCount><MaxKeys>{most}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{'<EncodingType>url</EncodingType>' if shown is quote else ''}"
            f"{token}{''.join(rows)}</ListBucketResult>"
        )

    def _put(self, key: str, body: bytes) -> None:
        found = self.store.objects.get(key)
        if source := self.headers.get("x-amz-copy-source"):
            copied = self.store.objects.get(unquote(source).lstrip("/").partition("/")[2])
            if copied is None:
                raise Refused(404, "NoSuchKey")
            self._keep(key, copied.data)
            self._send(200, f"<CopyObjectResult><ETag>&quot;{copied.tag}&quot;</ETag></CopyObjectResult>".encode())
            return
        if self.store.conditions:
            if self.headers.get("If-None-Match") == "*" and found is not None:
                raise Refused(412, "PreconditionFailed")
            if (wanted := self.headers.get("If-Match")) is not None:
                if found is None:
                    raise Refused(404, "NoSuchKey")
                if wanted.strip('"') != found.tag:
                    raise Refused(412, "PreconditionFailed")
        self._keep(key, body)
        if self.store.lose is not None and self.store.lose in key:
            self.store.lose = None
            raise Refused(503, "InternalError")
        self._send(200, tag=self.store.objects[key].tag)

    def _keep(self, key: str, body: bytes) -> None:
        self.store.objects[key] = Stored(body, hashlib.md5(body).hexdigest(), self.store.clock())

    def _get(self, key: str) -> None:
        found = self.store.objects.get(key)
        if found is None:
            raise Refused(404, "NoSuchKey")
        data, status, said = found.data, 200, {}
        if (wanted := self.headers.get("If-Match")) is not None and wanted.strip('"') != found.tag:
            raise Refused(412, "PreconditionFailed")
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(data)
            start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            end = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
            if start >= size:
                raise Refused(416, "InvalidRange")
            data, status, said = data[start:end], 206, {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self._send(status, data, found.tag, found.written, said)

    def _multipart(self, key: str, query: dict[str, str], body: bytes) -> None:
        uploads, name = self.store.uploads, query.get("uploadId", "")
        if "uploads" in query:
            uploads[name := uuid.uuid4().hex] = {}
            self._send(
                200, f"<R><Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId></R>".encode()
            )
        elif name not in uploads:
            raise Refused(404, "NoSuchUpload")
        elif self.command == "PUT":
            uploads[name][int(query["partNumber"])] = body
            self._send(200, tag=hashlib.md5(body).hexdigest())
        elif self.command == "DELETE":
            del uploads[name]
            self._send(204)
        else:
            self._keep(key, b"".join(data for _, data in sorted(uploads.pop(name).items())))
            tag = self.store.objects[key].tag
            self._send(200, f"<R><Key>{escape(key)}</Key><ETag>&quot;{tag}&quot;</ETag></R>".encode())

    def _send(
        self, status: int, body: bytes = b"", tag: str = "", written: float = 0.0, said: dict[str, str] | None = None
    ) -> None:
        self.send_response_only(status)
        self.send_header("Date", email.utils.formatdate(self.store.clock(), usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", f'"{tag}"')
        if written:
            self.send_header("Last-Modified", email.utils.formatdate(written, usegmt=True))
        for name, value in (said or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.store.bytes_sent += len(body)

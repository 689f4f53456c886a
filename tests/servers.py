"""Real servers on loopback: S3 (SeaweedFS), a hub with Hugging Face's API, a line that breaks.

`Relay` stands between a client and a server and cuts connections in the middle of an answer.
"""

import base64
import hashlib
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ACCESS_KEY, SECRET_KEY = "alloy-test", "alloy-test-secret"
PIECE_BYTES = 1 << 14


def free_port() -> int:
    """A port that is free, and whose number plus 10000 is too: SeaweedFS puts its gRPC there.

    Both lie below the ports that a kernel gives to connections (from 32768 on): one of those may be
    taken again before a server listens at it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def wait_for_port(port: int, process: subprocess.Popen, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing answers at port {port} after {seconds} s")


def post(port: int, body: dict) -> dict:
    """The answer of a served model at a port; HTTPError where it refuses."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


class Relay:
    """Passes bytes between clients and one server; cuts on request, counts what it passed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_bytes = 0  # from the server to the clients
        self.cut_after = 0  # bytes of one connection
        self.cuts_left = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        with suppress(OSError):  # closing alone does not end an accept that waits
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is gone: so is the line
                client.close()
                continue
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        try:
            while piece := source.recv(PIECE_BYTES):
                target.sendall(piece)
                if is_answer:
                    passed += len(piece)
                    self.num_bytes += len(piece)
                    if self.cuts_left and passed > self.cut_after:
                        self.cuts_left -= 1
                        break
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """A SeaweedFS S3 server that keeps its data in `folder`; yields its port."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    reader = {
        "name": "other",
        "credentials": [{"accessKey": "other-key", "secretKey": "other-secret"}],
        "actions": ["Read:elsewhere"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity, reader]}))
    data = folder / "data"
    data.mkdir()
    master, volume, filer, s3 = (free_port() for _ in range(4))
    weed = Path(sys.executable).with_name("weed")
    command = [str(weed) if weed.exists() else str(shutil.which("weed")), "server"]
    command += [f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-master.volumeSizeLimitMB=64"]
    command += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={config}"]
    # Their fixed ports would end the second server of a machine, after its S3 port has answered.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "weed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for_port(s3, process)
        yield s3
    finally:
        process.kill()  # asked to end it takes ten seconds; nobody wants its data
        process.wait()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no news."""


class HubServer:
    """A hub with the part of Hugging Face's API that fetching and pushing a model use.

    `repos[name][commit][path]` is a file's content; `refs[name][branch]` is a commit. Files that
    end in `.safetensors` are in LFS: the hub answers their hash, and sends them from another
    address.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.token = "right"  # of whoever may read what is private, and write
        self.created: dict[str, dict] = {}  # by repository, as it was asked for
        self.uploads: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.cuts: list[int] = []  # the next answers with a body break after so many bytes
        self.corrupt: set[str] = set()  # paths that are sent with one bit wrong
        self.failures: list[int] = []  # the next answers have these statuses
        self.knows_ranges = True
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def sent(self) -> list[str]:
        """The paths of the files whose content was asked for."""
        return [path for method, path, _ in self.requests if method == "GET" and "/cdn/" in path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch; returns the commit."""
        content = "".join(f"{path}{hashlib.sha1(data).hexdigest()}" for path, data in files.items())
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.repos.setdefault(name, {})[commit] = dict(files)
        self.refs.setdefault(name, {})[branch] = commit
        return commit

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, self.headers.get("Range", "")))
                if hub.failures:
                    return self._answer(hub.failures.pop(0), b"later")
                if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
                    return self._info(match[1], match[2] or "main")
                if match := re.fullmatch(r"/(cdn/)?(.+?)/resolve/([^/]+)/(.+)", path):
                    return self._file(bool(match[1]), match[2], match[3], match[4])
                return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

            def do_POST(self) -> None:
                """Create a repository, say how files are sent, and commit them."""
                path = unquote(urlsplit(self.path).path)
                body = self._body()
                hub.requests.append(("POST", path, ""))
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self._answer(401, b'{"error": "Invalid user token"}')
                if path == "/api/repos/create":
                    name = "/".join(json.loads(body)[key] for key in ("organization", "name"))
                    hub.repos.setdefault(name, {})
                    hub.refs.setdefault(name, {})
                    hub.created[name] = json.loads(body)
                    return self._json({"url": f"{hub.url}/{name}"})
                if path == "/api/validate-yaml":
                    return self._json({"warnings": [], "errors": []})
                if match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
                    objects = json.loads(body)["objects"]
                    link = f"{hub.url}/upload/{{}}"
                    answer = [
                        {**each, "actions": {"upload": {"href": link.format(each["oid"])}}}
                        for each in objects
                    ]
                    return self._json({"transfer": "basic", "objects": answer})
                if match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
                    files = [
                        {
                            "path": each["path"],
                            "uploadMode": "lfs" if _is_large(each["path"]) else "regular",
                            "shouldIgnore": False,
                        }
                        for each in json.loads(body)["files"]
                    ]
                    return self._json({"files": files})
                if match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
                    commit = hub.publish(match[1], _committed(body, hub.uploads), match[2])
                    url = f"{hub.url}/{match[1]}/commit/{commit}"
                    return self._json({"commitUrl": url, "commitOid": commit})
                return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

            def do_PUT(self) -> None:
                body = self._body()
                hub.uploads[hashlib.sha256(body).hexdigest()] = body
                self._answer(200, b"")

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", "0")))
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

            def _json(self, value: object) -> None:
                self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _commit(self, name: str, revision: str) -> str | None:
                if name not in hub.repos or (
                    name in hub.private
                    and self.headers.get("Authorization") != f"Bearer {hub.token}"
                ):
                    self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
                    return None
                commit = hub.refs[name].get(revision, revision)
                if commit not in hub.repos[name]:
                    self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                    return None
                return commit

            def _info(self, name: str, revision: str) -> None:
                if commit := self._commit(name, revision):
                    files = hub.repos[name][commit]
                    siblings = [_sibling(path, content) for path, content in files.items()]
                    info = {"id": name, "sha": commit, "siblings": siblings}
                    self._answer(200, json.dumps(info).encode())

            def _file(self, from_cdn: bool, name: str, revision: str, path: str) -> None:
                commit = self._commit(name, revision)
                if commit is not None:
                    self._content(from_cdn, commit, path, hub.repos[name][commit].get(path))

            def _content(
                self, from_cdn: bool, commit: str, path: str, content: bytes | None
            ) -> None:
                if content is None:
                    return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                about = {
                    "X-Repo-Commit": commit,
                    "X-Linked-ETag": hashlib.sha256(content).hexdigest(),
                    "X-Linked-Size": str(len(content)),
                }
                if not from_cdn:
                    location = {"Location": f"{hub.url}/cdn{self.path}"}
                    return self._answer(302, b"", {**about, **location})
                if path in hub.corrupt:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not asked or not hub.knows_ranges:
                    return self._answer(200, content, about)
                start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
                where = f"bytes {start}-{stop - 1}/{len(content)}"
                return self._answer(206, content[start:stop], {"Content-Range": where})

            def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if hub.cuts and status in (200, 206) and len(body) > hub.cuts[0]:
                    self.wfile.write(body[: hub.cuts.pop(0)])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                else:
                    self.wfile.write(body)

        return Handler


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _committed(body: bytes, uploads: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a commit: small ones within it, large ones as they were uploaded."""
    files = {}
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "lfsFile":
            files[entry["value"]["path"]] = uploads[entry["value"]["oid"]]
    return files


def _sibling(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "rfilename": path,
        "size": len(content),
        "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }
    if _is_large(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
    return entry

"""A small Hugging Face hub on loopback: as much of its protocol as the downloads of a data set need."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves data sets, each a dict of file names and contents; `faults` maps a file name to what goes wrong with it:
    an HTTP status, or "cut" (the connection ends half-way), or other content than was announced."""

    def __init__(self, datasets: dict[str, dict[str, bytes]]):
        self.datasets, self.faults, self.requests = datasets, {}, []
        self.newest = REVISION  # another one has no files here
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self, head=False)

            def do_HEAD(self):
                hub.answer(self, head=True)

            def do_POST(self):
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.answer(self, head=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()

    def answer(self, request, head: bool) -> None:
        url = urlparse(unquote(request.path))
        self.requests.append(f"{request.command} {request.path}")
        for dataset, files in self.datasets.items():
            if url.path.startswith(f"/api/datasets/{dataset}"):
                rest = url.path.removeprefix(f"/api/datasets/{dataset}").strip("/")
                return self.api(request, dataset, files, rest)
            prefix = f"/datasets/{dataset}/resolve/{REVISION}/"
            if url.path.startswith(prefix) and url.path.removeprefix(prefix) in files:
                return self.file(request, url.path.removeprefix(prefix), files, head)
        known = any(f"/{dataset}/" in url.path for dataset in self.datasets)
        self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def api(self, request, dataset: str, files: dict, rest: str) -> None:
        entries = [
            dict(
                type="file", path=name, size=len(content), oid=hashlib.sha1(content).hexdigest(),
                lfs=dict(oid=hashlib.sha256(content).hexdigest(), size=len(content), pointerSize=130),
            )
            for name, content in files.items()
        ]  # fmt: skip
        if rest.startswith("paths-info"):
            body = request.body.decode()
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            return self.send(request, 200, [e for e in entries if e["path"] in paths])
        if rest.startswith("tree"):
            below = rest.split("/", 2)[2] + "/" if rest.count("/") > 1 else ""
            inside = [e for e in entries if e["path"].startswith(below)]
            if "recursive=true" in request.path.lower():
                return self.send(request, 200, inside)
            deeper = {
                e["path"].removeprefix(below).split("/")[0] for e in inside if "/" in e["path"].removeprefix(below)
            }
            folders = [dict(type="directory", path=below + name, oid="0", size=0) for name in sorted(deeper)]
            return self.send(request, 200, folders + [e for e in inside if "/" not in e["path"].removeprefix(below)])
        siblings = [
            dict(
                rfilename=e["path"],
                size=e["size"],
                blobId=e["oid"],
                lfs=dict(sha256=e["lfs"]["oid"], size=e["size"], pointerSize=130),
            )
            for e in entries
        ]
        sha = rest.removeprefix("revision/") or self.newest
        info = dict(id=dataset, sha=sha, private=False, gated=False, disabled=False, tags=[], downloads=0, likes=0)
        return self.send(request, 200, info | dict(siblings=siblings))

    def file(self, request, name: str, files: dict, head: bool) -> None:
        content = files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(content)),
        }  # fmt: skip
        fault = self.faults.get(name)
        if isinstance(fault, int):
            return self.send(request, fault, b"{}")
        status, start, end = 200, 0, len(content)
        if request.headers.get("Range", "").startswith("bytes="):
            first, last = request.headers["Range"].removeprefix("bytes=").split("-")
            status, start, end = 206, int(first or 0), min(int(last or len(content) - 1) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        part = content[start:end]
        if fault == "cut" and not head:
            request.send_response(status)
            for key, value in headers.items() | {("Content-Length", str(len(part)))}:
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(part[: len(part) // 2])
            request.wfile.flush()
            request.close_connection = True
            return
        if isinstance(fault, bytes):
            part = fault[start:end]
        self.send(request, status, part, headers, head)

    def send(self, request, status: int, body, headers: dict | None = None, head: bool = False) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = head or request.command == "HEAD"
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if not head:
            request.wfile.write(body)

"""A stand-in for the Hub, so that tests run the genuine huggingface_hub and datasets clients offline.

It serves ROOT/models/<owner/name>/<files> and ROOT/datasets/<owner/name>/<files> as they are at that moment:

    hub = FakeHub(root)              # serves from a thread of this process until hub.close()
    os.environ.update(hub.env)       # before huggingface_hub is imported: it reads its settings once
    hub.gated.add("owner/name")      # this repository asks for a token
    hub.cut.add("model.safetensors")  # the next download of this file breaks off half-way
    hub.requests                     # paths of the files sent so far, "owner/name/file"

The folder owner/name@step3 is the revision step3 of owner/name.

Four requests are enough for those clients: about a repository, its folders, some of its paths, a file.
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 40
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)"
                 r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)"
                  r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class FakeHub:
    def __init__(self, root):
        self.root, self.gated, self.cut, self.requests = Path(root), set(), set(), []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.env = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.root / "cache"),
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def commit(repo):
    """It changes when a file of the repository does, so that the clients' caches notice."""
    files = sorted(path for path in repo.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(repo)} {etag(path)}\n" for path in files)
    return hashlib.sha1(listing.encode()).hexdigest()


def at_revision(repo, revision):
    """The folder of a branch, tag or commit of a repository, or None."""
    named = repo.with_name(f"{repo.name}@{revision}")
    if named.is_dir():
        return named
    for folder in repo.parent.glob(f"{repo.name}@*"):
        if revision == commit(folder):
            return folder
    return repo if revision in (None, "main") or re.fullmatch("[0-9a-f]{40}", revision) else None


def entry(path, repo):
    """What the Hub says about a file or folder of a repository."""
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
    return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if not (match := API.fullmatch(path) or FILE.fullmatch(path)):
            return self.send_json({}, 404, "EntryNotFound")
        repo = self.hub.root / (match["kind"] or "models").strip("/") / match["repo"]
        if not repo.is_dir():
            return self.send_json({}, 404, "RepoNotFound")
        repo = at_revision(repo, match["revision"])
        if repo is None:
            return self.send_json({}, 404, "RevisionNotFound")
        if match["repo"] in self.hub.gated and "Authorization" not in self.headers:
            return self.send_json({}, 401, "GatedRepo")
        if match.re is FILE:
            return self.send_file(repo, match["path"])
        return self.send_about(repo, match, parse_qs(url.query), body)

    do_HEAD = do_POST = do_GET

    def send_about(self, repo, match, query, body):
        """The three requests of the API: folders, chosen paths, the repository as a whole."""
        if match["what"] == "tree":
            top = repo / (match["path"] or "")
            if not top.is_dir():
                return self.send_json({}, 404, "EntryNotFound")
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            found = top.rglob("*") if recursive else top.iterdir()
            return self.send_json([entry(p, repo) for p in sorted(found)])
        if match["what"] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self.send_json([entry(repo / p, repo) for p in asked if (repo / p).exists()])
        files = [{"rfilename": entry(p, repo)["path"]} for p in sorted(repo.rglob("*")) if p.is_file()]
        return self.send_json({"id": match["repo"], "sha": commit(repo), "siblings": files})

    def send_json(self, obj, code=200, error=None):
        body = json.dumps(obj).encode()
        headers = {"X-Error-Code": error} if error else {}
        self.send_head(code, len(body), {"Content-Type": "application/json", **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, repo, name):
        """A file or, as parquet readers ask for them, a range of its bytes."""
        path = repo / name
        if not path.is_file():
            return self.send_json({}, 404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit(repo), "Accept-Ranges": "bytes"}
        code, size = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(asked[1]) if asked[1] else size - int(asked[2])
            end = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            code, content = 206, content[start:end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.send_head(code, len(content), headers)
        if self.command == "HEAD":
            return
        self.hub.requests.append("/".join(path.relative_to(self.hub.root).parts[1:]))
        if path.name in self.hub.cut:
            self.hub.cut.discard(path.name)
            self.wfile.write(content[:len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def send_head(self, code, length, headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

"""A local server that replaces the Hugging Face Hub: the endpoints that its real client needs to publish a model."""

import base64
import hashlib
import json
import sys
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".model")
LFS_BYTES = 10 * 10**6
JUST_MADE = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": dict(JUST_MADE)})
    """Files of the newest commit of every branch."""
    lfs: set[str] = field(default_factory=set)
    """SHA-256 of the contents that were uploaded as LFS files."""
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Branch, summary, and names of the files added or deleted."""


class Hub:
    """Serve until `close`. Clients must send `token`, and may write only to `owner`."""

    def __init__(self, token, owner):
        self.token, self.owner = token, owner
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, committed or not."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.leaks: list[str] = []
        """Requests to the storage that carried the token, which clients may send only to the Hub."""
        self.faults: dict[tuple[str, str], int | str] = {}
        """By method and a part of the path: a status to return, `drop` to close the connection once, or `stall`."""
        self.corrupt = False
        """Whether to store large files with one byte changed."""
        self.stalled, self.closed = threading.Event(), threading.Event()
        self.failures: list[str] = []
        """Tracebacks of errors in this server itself."""
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, method, part):
        """Return the number of requests of `method` with `part` in their path."""
        return sum(used == method and part in path for used, path in self.requests)


class _Server(ThreadingHTTPServer):
    hub: Hub

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a killed client causes one
            self.hub.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self, status, value, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, content in headers:
            self.send_header(name, content)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, code=None):
        self.answer(status, {"error": message}, [("X-Error-Code", code)] if code else [])

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def fail(self, fault):
        if fault == "stall":
            self.rfile.read(1)
            self.hub.stalled.set()
            self.hub.closed.wait()
        elif fault == "drop":
            self.rfile.read(1)
            self.close_connection = True
        else:
            self.body()
            self.refuse(fault, "told to fail")

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            matches = [key for key in self.hub.faults if key[0] == self.command and key[1] in path]
            fault = self.hub.faults[matches[0]] if matches else None
            if fault == "drop":
                del self.hub.faults[matches[0]]
        if fault is not None:
            return self.fail(fault)
        if path.startswith("/storage/"):
            return self.store(path.removeprefix("/storage/"))
        body = self.body()
        authorization = self.headers.get("Authorization")
        if authorization != f"Bearer {self.hub.token}":
            return self.refuse(401, f"{authorization} is unknown")
        is_json = self.headers.get("Content-Type", "").endswith(("/json", "+json"))
        value = json.loads(body) if is_json else body
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(value)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(value)
        # /api/models/owner/name[/action/revision]
        owner, name, *rest = path.removeprefix("/api/models/").split("/", 3)
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        if not rest:
            return self.answer(200, {"id": f"{owner}/{name}", "private": repository.private, "siblings": []})
        action, revision = rest
        if action == "branch":
            return self.branch(repository, revision)
        if revision not in repository.branches:
            return self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        answers = {"tree": self.tree, "preupload": self.preupload, "commit": self.commit}
        if action not in answers:  # such as xet-write-token: this Hub has no Xet storage
            return self.refuse(404, f"Cannot {self.command} {path}")
        return answers[action](repository, revision, value)

    do_GET = do_POST = do_PUT = handle_request

    def create(self, value):
        name = f"{value['organization']}/{value['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if value["organization"] != self.hub.owner:
            return self.refuse(403, f"You don't have the rights to create a model under {value['organization']}")
        with self.hub.lock:
            if name in self.hub.repositories:
                return self.answer(409, {"error": "You already created this model repo", **answer})
            self.hub.repositories[name] = Repository(private=value.get("visibility") == "private")
        return self.answer(200, answer)

    def branch(self, repository, revision):
        if revision in repository.branches:
            return self.refuse(409, f"Reference already exists: {revision}")
        repository.branches[revision] = dict(repository.branches["main"])
        return self.answer(200, {})

    def entry(self, repository, name, content):
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if sha256 in repository.lfs:
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entry["oid"] = git_hash(b"a pointer to " + sha256.encode())
        return entry

    def tree(self, repository, revision, value):
        files = repository.branches[revision]
        self.answer(200, [self.entry(repository, name, content) for name, content in files.items()])

    def preupload(self, repository, revision, value):
        answers = []
        for file in value["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if (content := repository.branches[revision].get(file["path"])) is not None:
                entry = self.entry(repository, file["path"], content)
                answer["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            answers.append(answer)
        self.answer(200, {"files": answers})

    def batch(self, value):
        objects = []
        for requested in value["objects"]:
            entry = {"oid": requested["oid"], "size": requested["size"]}
            if requested["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{requested['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid):
        content = self.body()
        if "Authorization" in self.headers:
            self.hub.leaks.append(self.path)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "content does not have this SHA-256")
        self.hub.objects[oid] = b"\0" + content[1:] if self.hub.corrupt else content
        return self.answer(200, {})

    def commit(self, repository, revision, body):
        name = next(name for name, candidate in self.hub.repositories.items() if candidate is repository)
        lines = [json.loads(line) for line in body.splitlines()]
        names, files = [], dict(repository.branches[revision])
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            names.append(value["path"])
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, f"{value['path']}: this LFS object was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.lfs.add(hashlib.sha256(files[value["path"]]).hexdigest())
            else:
                assert kind == "deletedFile", kind
                del files[value["path"]]
        assert max(Counter(names).values()) == 1, names
        repository.branches[revision] = files
        repository.commits.append((revision, lines[0]["value"]["summary"], names))
        oid = f"{len(repository.commits):040x}"
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

"""
A Hub in memory, on a free port of this machine: as much of its protocol as pushing and loading takes.

Clients are told of it by environment variables, which they read when they are imported; so they run in processes of
their own, with `LoopbackHub.environment`. The test looks at `LoopbackHub.repositories`, datasets by their ids and
models by `models/` and theirs, and `LoopbackHub.requests`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


DATE = "2026-01-01T00:00:00.000Z"
ACCOUNTS = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained"}
_REPOSITORY = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>datasets|models)/{_REPOSITORY}"
_FILES = rf"/((?P<kind>datasets)/)?{_REPOSITORY}"  # models have no name of their kind in front
_LARGE = (".parquet", ".png", ".safetensors", ".bin")
# Method, address, and the method of the handler that answers.
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "upload_modes"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths"),
    ("POST", rf"{_FILES}\.git/info/lfs/objects/batch", "large_files"),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", "upload"),
    ("GET", rf"{_FILES}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
]


@dataclass
class Repository:
    """Commits by their id, each a mapping of names to contents, and branches by name."""

    is_private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch, files, message):
        commit = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def files(self, revision="main"):
        return self.commits[self.branches.get(revision, revision)]


class Refused(Exception):
    def __init__(self, status, code, message, **content):
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        if url.path.endswith("/lfs/objects/batch"):
            time.sleep(hub.seconds_before_uploads)
        with hub.lock:
            hub.requests.append((self.command, url.path))
            try:
                for expected, pattern, name in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and expected == method:
                        values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        self.kind = values.pop("kind", "models")
                        return getattr(self, f"answer_{name}")(**values)
                raise Refused(404, "", f"There is no {self.command} {url.path} here.")
            except Refused as refused:
                content = {"error": str(refused), **refused.content}
                self.reply(content, refused.status, {"X-Error-Code": refused.code, "X-Error-Message": str(refused)})

    do_HEAD = do_POST = do_PUT = do_GET

    def reply(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def role(self):
        return ACCOUNTS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def key(self, id):
        return id if self.kind == "datasets" else f"models/{id}"

    def address(self, id):
        return f"{self.server.hub.address}/{'datasets/' if self.kind == 'datasets' else ''}{id}"

    def repository(self, id, writes=False):
        repository = self.server.hub.repositories.get(self.key(id))
        if repository is None or (repository.is_private and self.role() is None):
            raise Refused(404 if self.role() else 401, "RepoNotFound", f"There is no {self.key(id)}.")
        if writes:
            self.check_may_write()
        return repository

    def check_may_write(self):
        if self.role() in (None, "read"):
            raise Refused(403, "", "This token may not write.")

    def commit_of(self, repository, revision="main"):
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"There is no revision {revision}.")
        return commit

    def answer_whoami(self):
        if self.role() is None:
            raise Refused(401, "", "This token is not valid.")
        access = {"accessToken": {"displayName": "test", "role": self.role()}}
        self.reply({"type": "user", "name": "user", "fullname": "User", "orgs": [{"name": "club"}], "auth": access})

    def answer_validate_card(self):
        self.reply({"errors": [], "warnings": []})

    def answer_create(self):
        self.check_may_write()
        wanted = json.loads(self.body)
        self.kind = f"{wanted.get('type') or 'model'}s"
        id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        answer = {"url": self.address(id), "id": id, "name": id}
        if self.key(id) in self.server.hub.repositories:
            raise Refused(409, "", f"There is {self.key(id)} already.", **answer)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository = self.server.hub.repositories[self.key(id)] = Repository(is_private)
        repository.add("main", {".gitattributes": b"*.parquet filter=lfs\n"}, "initial commit")
        self.reply(answer)

    def answer_info(self, id, revision="main"):
        repository = self.repository(id)
        commit = self.commit_of(repository, revision)
        siblings = [{"rfilename": name} for name in sorted(repository.commits[commit])]
        details = {"private": repository.is_private, "lastModified": DATE, "downloads": 0, "likes": 0, "tags": []}
        self.reply(
            {"id": id, "_id": id, "sha": commit, "siblings": siblings, "disabled": False, "gated": False, **details}
        )

    def answer_branch(self, id, branch):
        repository = self.repository(id, writes=True)
        if branch in repository.branches:
            raise Refused(409, "", f"There is a branch {branch}.")
        repository.branches[branch] = repository.branches["main"]
        self.reply({})

    def answer_upload_modes(self, id, revision):
        repository = self.repository(id, writes=True)
        files = repository.commits[self.commit_of(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(_LARGE) else "regular"
            known = _describe(name, files[name]) if name in files else {}
            oid = known.get("lfs", known).get("oid")
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def answer_large_files(self, id):
        self.repository(id, writes=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.server.hub.large_files:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.hub.address}/large/{wanted['oid']}", "header": {}}
                }
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def answer_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.large_files[oid] = self.body
        self.reply({})

    def answer_commit(self, id, revision):
        repository = self.repository(id, writes=True)
        if self.server.hub.meanwhile is not None:
            self.server.hub.meanwhile(repository)
            self.server.hub.meanwhile = None
        parent = self.commit_of(repository, revision)
        files, message = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "", "The branch has moved.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.hub.large_files[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "", f"Entries of kind {kind} are not known here.")
        is_request = "create_pr" in self.query
        commit = repository.add("refs/pr/1" if is_request else revision, files, message)
        address = self.address(id)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{address}/commit/{commit}", "hookOutput": ""}
        self.reply({**answer, "pullRequestUrl": f"{address}/discussions/1" if is_request else None})

    def answer_tree(self, id, revision, folder=""):
        repository = self.repository(id)
        files = repository.commits[self.commit_of(repository, revision)]
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"There is no folder {folder}.")
        is_deep = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries = {}
        for name, data in sorted(inside.items()):
            steps = name[len(prefix) :].split("/")
            for depth in range(1, len(steps) if is_deep else min(len(steps), 2)):
                path = prefix + "/".join(steps[:depth])
                entries[path] = _describe_folder(path)
            if is_deep or len(steps) == 1:
                entries[name] = _describe(name, data)
        self.reply(list(entries.values()))

    def answer_paths(self, id, revision):
        repository = self.repository(id)
        files = repository.commits[self.commit_of(repository, revision)]
        is_json = self.body.startswith(b"{")
        wanted = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        wanted = [wanted] if isinstance(wanted, str) else wanted
        found = [_describe(name, files[name]) for name in wanted if name in files]
        folders = [name for name in wanted if any(file.startswith(f"{name}/") for file in files)]
        self.reply(found + [_describe_folder(name) for name in folders])

    def answer_resolve(self, id, revision, name):
        repository = self.repository(id)
        commit = self.commit_of(repository, revision)
        if name not in repository.commits[commit]:
            raise Refused(404, "EntryNotFound", f"There is no file {name}.")
        data = repository.commits[commit][name]
        headers = {"ETag": f'"{_describe(name, data)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.reply(data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(data[first : last + 1], 206, headers)


def _describe(name, data):
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
    if name.endswith(_LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return {**entry, "lastCommit": {"id": "0" * 40, "title": "commit", "date": DATE}}


def _describe_folder(name):
    last = {"id": "0" * 40, "title": "commit", "date": DATE}
    return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40, "lastCommit": last}


class LoopbackHub:
    """A context manager that runs the server."""

    def __init__(self):
        self.repositories, self.large_files, self.requests = {}, {}, []
        self.lock = threading.Lock()
        self.seconds_before_uploads = 0.0  # after a client has hashed its files, and before it sends them
        self.meanwhile = None  # what somebody else does to a repository just before the next commit

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token="hf_write"):
        """Variables for a process that is to use this Hub, with its caches and nothing of the user's in `home`."""
        names = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        names |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        names |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return names | ({"HF_TOKEN": token} if token else {})

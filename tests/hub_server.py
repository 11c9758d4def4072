"""A Hugging Face Hub on loopback, for tests in which the client is the real `huggingface_hub`.

It speaks the calls that creating, filling, listing and loading a repository take, over plain LFS: the client needs
`HF_HUB_DISABLE_XET=1`. What arrives is checked as the Hub checks it: tokens and their rights, sizes and hashes of large
files, files named in a commit but never uploaded, the metadata of model cards. Any other call answers 501 and is kept
in `Hub.unknown`, so that a test can assert that there was none.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
CARD_RULES = {"tags": ".+", "license": ".+", "base_model": r"([\w.-]+/)?[\w.-]+", "datasets": r"([\w.-]+/)?[\w.-]+"}
LFS_THRESHOLD = 10 * 2**20  # any file from this size on goes to LFS


class File(NamedTuple):
    oid: str  # the sha256 of a file in LFS, else git's sha1 of the blob; clients use either as the etag
    size: int
    lfs: bool


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name → commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit → path → file
    messages: list[str] = field(default_factory=list)

    def tree(self, revision: str) -> tuple[str, dict[str, File]]:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, self.commits[commit]

    def commit(self, branch: str, tree: dict[str, File], message: str) -> str:
        commit = hashlib.sha1(repr((self.branches.get(branch), message, tree)).encode()).hexdigest()
        self.branches[branch], self.commits[commit] = commit, tree
        self.messages.append(message)
        return commit


class HubError(Exception):
    """`code` goes into `X-Error-Code`, by which the client tells a missing repository from a missing file."""

    def __init__(self, status: int, message: str, code: str = "", **body):
        headers = {"X-Error-Message": message, "X-Error-Code": code}
        self.response = status, {"error": message, **body}, headers


class Hub:
    """The server and its state; `tokens` maps a token to its user and role, `"read"` or `"write"`."""

    def __init__(self, root: Path, tokens: dict[str, tuple[str, str]]):
        self.root, self.tokens, self.lock = Path(root), tokens, threading.RLock()
        self.repos: dict[str, Repo] = {}  # keyed "models/user/name"
        self.calls: list[str] = []  # "POST /api/repos/create 200" and so on
        self.unknown: list[str] = []
        # As on the Hub, large files live on another origin, to which the client must not send the user's token.
        handler = type("Handler", (_Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, for tests to look at; `repo` as in `"models/user/name"`."""
        return {path: self.blob(file.oid).read_bytes() for path, file in self.repos[repo].tree(revision)[1].items()}

    def blob(self, oid: str) -> Path:
        return self.root / oid

    def store(self, content: bytes, oid: str | None = None) -> File:
        """Keeps a file: of LFS if it has an `oid`, of git otherwise."""
        name = oid or hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blob(name).write_bytes(content)
        return File(name, len(content), lfs=oid is not None)

    def storage_link(self, oid: str, **query) -> str:
        signature = hashlib.sha256(f"{id(self)} {oid}".encode()).hexdigest()  # stands in for the user's token
        return f"{self.storage_url}/lfs/{oid}?signature={signature}" + "".join(f"&{k}={v}" for k, v in query.items())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # keep-alive, as the client's connection pool expects

    def answer(self):
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for pattern, handler in ROUTES:
                if match := re.fullmatch(pattern, f"{method} {url.path}"):
                    with self.hub.lock:
                        groups = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                        status, body, headers = handler(self, **groups)
                    break
            else:
                self.hub.unknown.append(f"{self.command} {self.path}")
                raise HubError(501, "this test server does not speak that call")
        except HubError as error:
            status, body, headers = error.response
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.calls.append(f"{self.command} {url.path} {status}")
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args):
        pass

    def user(self, write_to: str | None = None) -> str | None:
        """Who calls, None without a token. Refuses who may not write to the namespace `write_to`."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens and (token or write_to):
            raise HubError(401, "Invalid credentials in Authorization header")
        user, role = self.hub.tokens.get(token, (None, "read"))
        if write_to and (user, role) != (write_to, "write"):
            raise HubError(403, f"You don't have the rights to write to the namespace {write_to!r}")
        return user

    def repo(self, key: str, write: bool = False) -> Repo:
        key = key if key.count("/") == 2 else f"models/{key}"  # the web's URLs name only the other kinds
        owner = key.split("/")[1]
        user, found = self.user(write_to=owner if write else None), self.hub.repos.get(key)
        if found is None or (found.private and user != owner):  # a private one does not admit that it exists
            raise HubError(404, "Repository not found", "RepoNotFound")
        return found

    def whoami(self):
        if (name := self.user()) is None:
            raise HubError(401, "Invalid username or password.")
        return 200, {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token"}}, {}

    def create_repo(self):
        spec = json.loads(self.body)
        owner, kind = spec.get("organization") or self.user() or "anonymous", f"{spec.get('type') or 'model'}s"
        self.user(write_to=owner)
        name = f"{owner}/{spec['name']}"
        url = f"{self.hub.url}/{name if kind == 'models' else f'{kind}/{name}'}"
        if f"{kind}/{name}" in self.hub.repos:  # no error to a client that was told `exist_ok=True`
            raise HubError(409, "You already created this repo", url=url)
        repo = self.hub.repos[f"{kind}/{name}"] = Repo(private=spec.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.commit("main", {".gitattributes": self.hub.store(attributes.encode())}, "initial commit")
        return 200, {"url": url, "id": name}, {}

    def create_branch(self, key, branch):
        repo = self.repo(key, write=True)
        if branch in repo.branches:
            raise HubError(409, "Reference already exists")
        repo.branches[branch], _ = repo.tree(json.loads(self.body).get("startingPoint", "main"))
        return 200, {}, {}

    def validate_card(self):
        front_matter = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        wrong = []
        try:
            card = yaml.safe_load(front_matter[1]) if front_matter else {}
            for key in card.keys() & CARD_RULES:
                values = card[key] if isinstance(card[key], list) else [card[key]]
                if not all(isinstance(value, str) and re.fullmatch(CARD_RULES[key], value) for value in values):
                    wrong.append(f'"{key}" with value {card[key]!r} is not valid')
        except yaml.YAMLError as error:
            wrong.append(str(error))
        if wrong:
            raise HubError(400, "Invalid metadata", errors=[{"message": message} for message in wrong])
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, key, revision):
        """Says how each file is to be sent, and its present hash, so that unchanged ones need not be."""
        _, tree = self.repo(key, write=True).tree(revision)
        files = json.loads(self.body)["files"]
        for file in files:
            lfs, present = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_THRESHOLD, tree.get(file["path"])
            file.update(uploadMode="lfs" if lfs else "regular", shouldIgnore=False, oid=present and present.oid)
        return 200, {"files": files}, {}

    def lfs_batch(self, key):
        self.repo(key, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not self.hub.blob(item["oid"]).exists():  # no action tells the client that the content is here
                item["actions"] = {"upload": {"href": self.hub.storage_link(item["oid"], size=item["size"])}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def check_storage_access(self, oid):
        if self.query.get("signature", "-") not in self.hub.storage_link(oid) or "Authorization" in self.headers:
            raise HubError(403, "the storage takes signed links and no tokens")

    def lfs_put(self, oid):
        self.check_storage_access(oid)
        if hashlib.sha256(self.body).hexdigest() != oid or len(self.body) != int(self.query["size"]):
            raise HubError(400, "the content does not have the announced sha256 and size")
        self.hub.store(self.body, oid)
        return 200, b"", {}

    def lfs_get(self, oid):
        self.check_storage_access(oid)
        return 200, self.hub.blob(oid).read_bytes(), {}

    def commit(self, key, branch):
        repo = self.repo(key, write=True)
        head, tree = repo.tree(branch)
        tree, header = dict(tree), {}
        for operation in map(json.loads, self.body.splitlines()):  # ndjson: one operation a line
            kind, value = operation["key"], operation["value"]
            path = value.get("path", "").rstrip("/")
            if kind == "header":
                header = value
            elif kind == "file":
                tree[path] = self.hub.store(base64.b64decode(value["content"], validate=True))
            elif kind == "lfsFile":
                blob = self.hub.blob(value["oid"])
                if not blob.exists() or blob.stat().st_size != value["size"]:
                    raise HubError(400, f"the LFS object of {path} was never uploaded")
                tree[path] = File(value["oid"], value["size"], lfs=True)
            else:
                folder = f"{path}/" if kind == "deletedFolder" else "\0"
                kept = {name: file for name, file in tree.items() if name != path and not name.startswith(folder)}
                if kind not in ("deletedFile", "deletedFolder") or len(kept) == len(tree):
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                tree = kept
        if header.get("parentCommit", head) != head:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = repo.commit(branch, tree, header["summary"])
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{commit}"
        return 200, {"commitOid": commit, "commitUrl": url}, {}

    def info(self, key, revision):
        commit, tree = self.repo(key).tree(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(tree)]
        return 200, {"id": key.split("/", 1)[1], "sha": commit, "siblings": siblings}, {}

    def list_tree(self, key, revision, folder):
        _, tree = self.repo(key).tree(revision)
        root, deep, entries = Path(folder), self.query.get("recursive") == "true", {}
        for path, file in tree.items():
            if root not in Path(path).parents:
                continue
            parents = [parent for parent in Path(path).parents if root in parent.parents]
            for parent in map(str, parents if deep else parents[-1:]):
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40}
            if deep or not parents:
                lfs = {"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}} if file.lfs else {}
                entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size} | lfs
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return 200, list(entries.values()), {}

    def resolve(self, key, revision, path):
        commit, tree = self.repo(key).tree(revision)
        if path not in tree:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = tree[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.lfs:  # what stands on the storage is described by the redirect to it
            link = {"Location": self.hub.storage_link(file.oid), "X-Linked-Etag": f'"{file.oid}"'}
            return 302, b"", headers | link | {"X-Linked-Size": file.size}
        return 200, self.hub.blob(file.oid).read_bytes(), headers


API, WEB = "/api/(?P<key>(models|datasets)/[^/]+/[^/]+)", "/(?P<key>(datasets/)?[^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create_repo),
    ("GET /api/agent-harnesses", lambda _: (200, {"standardEnvVars": [], "harnesses": {}}, {})),  # asked by `hf`
    ("POST /api/validate-yaml", _Handler.validate_card),
    (f"POST {API}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    (f"POST {API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (f"POST {API}/commit/(?P<branch>[^/]+)", _Handler.commit),
    (f"GET {API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    (f"GET {API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.list_tree),
    (f"POST {WEB}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET /lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_get),
    (f"GET {WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]

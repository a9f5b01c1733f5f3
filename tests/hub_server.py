"""A small Hub for tests: repositories in memory, spoken to over HTTP on loopback by the real `huggingface_hub` client.

    with HubServer() as hub:
        token = hub.add_user("ada")
        ...                              # a process with HF_ENDPOINT=hub.url
        hub.fail("HEAD", "/resolve/", status=503, times=1)

It speaks what the client needs of the Hub's protocol: create, validate-yaml, branches, preupload, commit (regular
files and LFS), pull requests, LFS batch and PUT, resolve (HEAD, GET, ranges), model info, tree, commits, refs; private
repositories; and the errors with their `X-Error-Code`. Faults are asked for with `fail`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_BYTES = 10_000  # files from this size on are "lfs" unless their name says text; the real Hub goes by name and size
TEXT_FILES = (".md", ".json", ".txt")


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    title: str = ""
    parent: str | None = None
    lfs: frozenset = frozenset()


@dataclass
class Repo:
    repo_id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> oid
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def add(self, ref: str, files: dict[str, bytes], title: str, parent: str | None, lfs=frozenset()) -> Commit:
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(json.dumps([parent, title, content, len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), title, parent, frozenset(lfs))
        self.refs[ref] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision) or self.refs.get(f"refs/heads/{revision}") or revision
        matches = [o for o in self.commits if len(oid) >= 7 and o.startswith(oid)]
        return self.commits[matches[0]] if len(matches) == 1 else None


@dataclass
class Fault:
    method: str
    pattern: str
    status: int | None
    headers: dict
    drop: str | None
    times: int
    after: int
    body: bytes | None = None


class HubServer:
    """The server; a context manager. `url` is what `HF_ENDPOINT` is set to.

    Attributes:
        repos (`dict[str, Repo]`): what is stored.
        requests (`list[tuple]`): (method, path) of every request so far.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def add_user(self, name: str) -> str:
        """Makes a user and returns the token."""
        token = f"hf_test{hashlib.sha1(name.encode()).hexdigest()[:20]}"
        self.tokens[token] = name
        return token

    def add_repo(
        self, repo_id: str, files: dict[str, bytes], private: bool = False, title="Initial commit", lfs=()
    ) -> str:
        """Puts a repository, or another commit on its main branch, in place without HTTP; returns the commit.

        `lfs` names the files that are told by their SHA-256 rather than by git's hash.
        """
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id, private))
            parent = repo.refs.get("refs/heads/main")
            files = {**(repo.commits[parent].files if parent else {}), **files}
            return repo.add("refs/heads/main", files, title, parent, lfs).oid

    def add_folder(self, repo_id: str, folder, **kwargs) -> str:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.add_repo(repo_id, files, **kwargs)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision."""
        return self.repos[repo_id].find(revision).files

    def fail(
        self,
        method: str,
        pattern: str,
        status=None,
        headers=None,
        drop: str | None = None,
        times: int = 1,
        after: int = 0,
        body: bytes | None = None,
    ):
        """Lets coming requests fail.

        Args:
            method (`str`): HTTP method; "" for any.
            pattern (`str`): regular expression searched in the path.
            status (`int`, *optional*): answer with this status, and `headers`.
            drop (`str`, *optional*): "before": hang up without an answer; "middle": hang up after half of the body;
                "after": do what was asked, then hang up without an answer; "flip": change one bit of the body;
                "hang": answer nothing until the client hangs up; "short", "long": announce half or double the length.
            body (`bytes`, *optional*): with `status`, what to answer, as HTML, such as the login page of a network.
            times (`int`): how many requests fail.
            after (`int`): how many matching requests go well first.
        """
        with self.lock:
            self.faults.append(Fault(method, pattern, status, headers or {}, drop, times, after, body))

    def _fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("", method) and re.search(fault.pattern, path):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Answer(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers=None):
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **(headers or {})}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: HubServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def log_message(self, *_):
            pass

        # ---------------------------------------------------------------- plumbing

        def _dispatch(self):
            path = unquote(urlsplit(self.path).path)
            query = parse_qs(urlsplit(self.path).query)
            with hub.lock:
                hub.requests.append((self.command, self.path))
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            self._fault = hub._fault(self.command, self.path)
            try:
                if self._fault and self._fault.drop == "before":
                    return self._hang_up()
                if self._fault and self._fault.drop == "hang":
                    self.connection.settimeout(5)
                    with contextlib.suppress(OSError):
                        self.connection.recv(1)
                    return self._hang_up()
                if self._fault and self._fault.body is not None:
                    return self._send(self._fault.status, self._fault.body, {"Content-Type": "text/html"})
                if self._fault and self._fault.status:
                    raise _Answer(self._fault.status, "asked to fail", headers=self._fault.headers)
                for methods, pattern, function in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods:
                        with hub.lock:
                            answer = function(self, *match.groups(), query=query, body=body)
                        return self._send(*answer)
                raise _Answer(404, f"no route for {self.command} {path}")
            except _Answer as error:
                data = json.dumps({"error": error.message}).encode()
                self._send(error.status, data, {"Content-Type": "application/json", **error.headers})

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

        def _send(self, status: int, data, headers=None):
            if self._fault and self._fault.drop == "after":
                return self._hang_up()
            if not isinstance(data, bytes):
                data, headers = json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})}
            headers = {"Content-Length": len(data), **(headers or {})}
            if self._fault and self._fault.drop in ("short", "long"):
                for key in {"Content-Length", "X-Linked-Size"} & set(headers):
                    headers[key] = headers[key] // 2 if self._fault.drop == "short" else 2 * headers[key]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            if self._fault and self._fault.drop == "flip" and data:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self._fault and self._fault.drop == "middle":
                self.wfile.write(data[: len(data) // 2])
                return self._hang_up()
            if self._fault and self._fault.drop == "short":
                data = data[: len(data) // 2]
            self.wfile.write(data)
            if self._fault and self._fault.drop == "long":
                self._hang_up()

        def _hang_up(self):
            self.wfile.flush()
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

        # ---------------------------------------------------------------- who, and what may they see

        def _user(self) -> str | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                raise _Answer(401, "Invalid credentials in Authorization header")
            return hub.tokens.get(token)

        def _owner(self, repo_id: str) -> str:
            return repo_id.split("/")[0]

        def _repo(self, repo_id: str, write: bool = False) -> Repo:
            user, repo = self._user(), hub.repos.get(repo_id)
            if repo is None or (repo.private and user != self._owner(repo_id)):
                # As on the Hub: who may not see a repository cannot tell it from a missing one.
                raise _Answer(401 if user is None else 404, "Repository not found", "RepoNotFound")
            if write and user is None:
                raise _Answer(401, "Invalid username or password.")
            if write and user != self._owner(repo_id):
                raise _Answer(403, "you don't have the rights to write to this repository")
            return repo

        def _commit(self, repo: Repo, revision: str) -> Commit:
            commit = repo.find(revision)
            if commit is None:
                raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return commit

        # ---------------------------------------------------------------- routes

        def whoami(self, query, body):
            user = self._user()
            if user is None:
                raise _Answer(401, "Invalid username or password.")
            return 200, {"type": "user", "name": user, "orgs": []}

        def create(self, query, body):
            user, asked = self._user(), json.loads(body)
            if user is None:
                raise _Answer(401, "Invalid username or password.")
            owner = asked.get("organization") or user
            repo_id = f"{owner}/{asked['name']}"
            answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
            if owner != user:
                raise _Answer(403, f"you don't have the rights to create a model under {owner!r}")
            if repo_id in hub.repos:
                return 409, {**answer, "error": "You already created this model repo"}
            private = asked.get("private") is True or asked.get("visibility") == "private"
            repo = hub.repos[repo_id] = Repo(repo_id, private)
            repo.add("refs/heads/main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", None)
            return 200, answer

        def validate_yaml(self, query, body):
            content = json.loads(body)["content"]
            match = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
            if match is None:
                return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            try:
                values = yaml.safe_load(match[1])
            except yaml.YAMLError as error:
                return 400, {"errors": [{"message": f"invalid YAML: {error}"}], "warnings": []}
            errors = [] if isinstance(values, dict) else [{"message": "metadata must be a mapping"}]
            values = values if isinstance(values, dict) else {}
            for key in ("tags", "datasets"):
                value = values.get(key, [])
                if not isinstance(value, (list, str)) or any(not isinstance(v, str) for v in value):
                    errors.append({"message": f'"{key}" must be an array of strings'})
            for key in ("base_model", "license", "library_name", "pipeline_tag"):
                if not isinstance(values.get(key, ""), (str, list)):
                    errors.append({"message": f'"{key}" must be a string'})
            for entry in values.get("model-index", []):
                if not isinstance(entry.get("name"), str) or not entry["name"]:
                    errors.append({"message": '"model-index[0].name" is required'})
                for result in entry.get("results", []):
                    ok = {"task", "dataset", "metrics"} <= set(result) and {"name", "type"} <= set(result["dataset"])
                    ok = ok and all({"type", "value"} <= set(metric) for metric in result["metrics"])
                    if not ok:
                        errors.append({"message": '"model-index[0].results[0]" lacks task, dataset or metrics'})
            return (400 if errors else 200), {"errors": errors, "warnings": []}

        def branch(self, repo_id, name, query, body):
            repo = self._repo(repo_id, write=True)
            if f"refs/heads/{name}" in repo.refs:
                raise _Answer(409, "Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            repo.refs[f"refs/heads/{name}"] = self._commit(repo, start).oid
            return 200, {}

        def preupload(self, repo_id, revision, query, body):
            create_pr = query.get("create_pr") == ["1"]
            repo = self._repo(repo_id, write=not create_pr)
            commit = self._commit(repo, revision)
            answers = []
            for asked in json.loads(body)["files"]:
                path = asked["path"]
                is_lfs = not path.endswith(TEXT_FILES) and asked["size"] >= LFS_BYTES
                present = commit.files.get(path)
                oid = None
                if present is not None:
                    oid = hashlib.sha256(present).hexdigest() if path in commit.lfs else _git_oid(present)
                answers.append(
                    {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}
                )
            return 200, {"files": answers, "commitOid": commit.oid}

        def commit(self, repo_id, revision, query, body):
            create_pr = query.get("create_pr") == ["1"]
            repo = self._repo(repo_id, write=not create_pr)
            if create_pr and self._user() is None:
                raise _Answer(401, "Invalid username or password.")
            if revision in repo.commits:
                raise _Answer(400, "a commit cannot be committed to: name a branch", "BadRequest")
            parent = self._commit(repo, revision)
            files, lfs, title, expected = dict(parent.files), set(parent.lfs), "", None
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    title, expected = value["summary"], value.get("parentCommit")
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    lfs.discard(value["path"])
                elif entry["key"] == "lfsFile":
                    if value["oid"] not in hub.lfs_objects:
                        raise _Answer(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                    files[value["path"]] = hub.lfs_objects[value["oid"]]
                    lfs.add(value["path"])
                elif entry["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _Answer(404, "A file with this name doesn't exist", "EntryNotFound")
                else:
                    raise _Answer(400, f"unknown operation {entry['key']}")
            if expected is not None and expected != parent.oid:
                raise _Answer(412, "A commit has happened since. Please refresh and try again.")
            answer = {}
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if create_pr:
                repo.pull_requests += 1
                ref = f"refs/pr/{repo.pull_requests}"
                answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{repo.pull_requests}"
            commit = repo.add(ref, files, title, parent.oid, lfs)
            url = f"{hub.url}/{repo_id}/commit/{commit.oid}"
            return 200, {"success": True, "commitOid": commit.oid, "commitUrl": url, **answer}

        def lfs_batch(self, repo_id, query, body):
            self._repo(repo_id)
            if self._user() is None:
                raise _Answer(401, "Invalid username or password.")
            objects = []
            for asked in json.loads(body)["objects"]:
                entry = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in hub.lfs_objects:
                    entry["actions"] = {
                        "upload": {"href": f"{hub.url}/_lfs/{asked['oid']}"},
                        "verify": {"href": f"{hub.url}/_lfs/{asked['oid']}/verify"},
                    }
                objects.append(entry)
            return 200, {"transfer": "basic", "objects": objects}

        def lfs_put(self, oid, query, body):
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Answer(400, "the content does not have this sha256")
            hub.lfs_objects[oid] = body
            return 200, b""

        def lfs_verify(self, oid, query, body):
            stored = hub.lfs_objects.get(oid)
            if stored is None or len(stored) != json.loads(body)["size"]:
                raise _Answer(404, "no such object")
            return 200, {}

        def info(self, repo_id, revision="main", query=None, body=None):
            repo = self._repo(repo_id)
            commit = self._commit(repo, revision)
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            return 200, {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.oid,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }

        def tree(self, repo_id, revision, folder=None, query=None, body=None):
            commit = self._commit(self._repo(repo_id), revision)
            entries = []
            for path, data in sorted(commit.files.items()):
                if folder and not path.startswith(folder.strip("/") + "/"):
                    continue
                entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
                if path in commit.lfs:
                    sha = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
                entries.append(entry)
            return 200, entries

        def commits(self, repo_id, revision, query, body):
            repo = self._repo(repo_id)
            oid, result = self._commit(repo, revision).oid, []
            while oid:
                commit = repo.commits[oid]
                entry = {"id": oid, "title": commit.title, "message": "", "authors": []}
                result.append({**entry, "date": "2026-01-01T00:00:00.000Z"})
                oid = commit.parent
            return 200, result

        def refs(self, repo_id, query, body):
            repo = self._repo(repo_id)
            kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
            return 200, {
                kind: [
                    {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                    for ref, oid in repo.refs.items()
                    if ref.startswith(prefix)
                ]
                for kind, prefix in {**kinds, "converts": "refs/convert/"}.items()
            }

        def resolve(self, repo_id, rest, query, body):
            repo = self._repo(repo_id)
            # A revision may hold slashes (refs/pr/1), escaped in the URL and unescaped here.
            parts = rest.split("/")
            cut = 3 if rest.startswith("refs/") else 1
            revision, path = "/".join(parts[:cut]), "/".join(parts[cut:])
            commit = self._commit(repo, revision)
            data = commit.files.get(path)
            if data is None:
                raise _Answer(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
            is_lfs = path in commit.lfs
            etag = hashlib.sha256(data).hexdigest() if is_lfs else _git_oid(data)
            headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            if is_lfs:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(data)}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                if first >= len(data):
                    raise _Answer(416, "range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return 206, data[first : last + 1], headers
            return 200, data, {**headers, "Content-Length": len(data)}

    repo, rev = r"([\w.\-]+(?:/[\w.\-]+)?)", r"(refs/[\w]+/[^/]+|[^/]+)"
    ROUTES = [
        (("GET",), r"/api/whoami-v2", Handler.whoami),
        (("POST",), r"/api/repos/create", Handler.create),
        (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
        (("POST",), rf"/api/models/{repo}/branch/(.+)", Handler.branch),
        (("POST",), rf"/api/models/{repo}/preupload/(.+)", Handler.preupload),
        (("POST",), rf"/api/models/{repo}/commit/(.+)", Handler.commit),
        (("GET",), rf"/api/models/{repo}/revision/(.+)", Handler.info),
        (("GET",), rf"/api/models/{repo}/tree/{rev}(/.*)?", Handler.tree),
        (("GET",), rf"/api/models/{repo}/commits/(.+)", Handler.commits),
        (("GET",), rf"/api/models/{repo}/refs", Handler.refs),
        (("GET",), rf"/api/models/{repo}", Handler.info),
        (("POST",), rf"/{repo}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        (("PUT",), r"/_lfs/(\w+)", Handler.lfs_put),
        (("POST",), r"/_lfs/(\w+)/verify", Handler.lfs_verify),
        (("HEAD", "GET"), rf"/{repo}/resolve/(.+)", Handler.resolve),
    ]
    return Handler

"""A stub of W&B's server on the loopback interface, which records what the real `wandb` and `wandb-workspaces` send.

It answers GraphQL requests by the name of the operation, accepts uploads and history by offset, and can be made slow,
broken or unreachable.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Json = dict[str, Any]
KEY = "0123456789abcdef" * 2 + "planted0"  # 40 characters, like keys of W&B
ENTITY = "someone"


@dataclass
class StubRun:
    """A run as the server knows it."""

    name: str
    project: str
    fields: Json = field(default_factory=dict)  # of UpsertBucket
    files: dict[str, list[str]] = field(default_factory=dict)  # lines by offset
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def rows(self) -> list[Json]:
        """All rows of the history, in the order of their arrival."""
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", [])]

    @property
    def history(self) -> list[Json]:
        """The rows that W&B would show: of rows with the same number the last."""
        return list({row["_step"]: row for row in self.rows}.values())

    @property
    def summary(self) -> Json:
        lines = self.files.get("wandb-summary.json", [])
        found: Json = json.loads(lines[-1]) if lines else json.loads(self.fields.get("summaryMetrics") or "{}")
        return found

    @property
    def config(self) -> Json:
        content = json.loads(self.fields.get("config") or "{}")
        return {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in content.items()}

    @property
    def bucket(self) -> Json:
        """The run in the answers to `RunResumeStatus` and `UpsertBucket`."""
        lines = self.files.get("wandb-history.jsonl", [])
        project = {"id": "project", "name": self.project, "entity": {"id": "entity", "name": ENTITY}}
        return {
            "id": f"id-{self.name}", "name": self.name, "displayName": self.fields.get("displayName") or self.name,
            "project": project, "config": self.fields.get("config") or "{}", "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(lines), "eventsLineCount": len(self.files.get("wandb-events.jsonl", [])),
            "logLineCount": 0, "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "tags": [],
            "wandbConfig": '{"t": 1}', "sweepName": None, "description": None, "notes": None,
        }


@dataclass
class StubArtifact:
    """A version of an artifact."""

    id: str
    name: str
    kind: str
    run: str  # that made it
    metadata: Json
    digest: str
    version: int
    manifest: Json = field(default_factory=dict)
    committed: bool = False
    used_by: list[str] = field(default_factory=list)


class WandbStub:
    """`with WandbStub() as stub:` serves on `stub.url`.

    `delay` seconds pass before each answer; `status` is answered instead of 200 where it is set; `watch` is called with
    the stub after each request.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StubRun] = {}
        self.artifacts: dict[str, StubArtifact] = {}
        self.views: dict[str, Json] = {}
        self.blobs: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.delay, self.status = 0.0, 200
        self.watch: Callable[[WandbStub], object] | None = None
        self.lock = threading.RLock()
        self.server: _Server | None = _Server(("127.0.0.1", 0), self)
        self.port = self.server.server_address[1]
        self._serve()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> WandbStub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        server = self.server
        assert server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on; keep what was recorded."""
        with self.lock:
            server, self.server = self.server, None
        if server:
            server.shutdown()
            server.close_connections()
            server.server_close()

    def refuse(self) -> None:
        """The same as `stop`, while a request is being answered."""
        threading.Thread(target=self.stop).start()

    def restart(self) -> None:
        """Serve again at the same address."""
        self.stop()
        self.delay, self.status, self.watch = 0.0, 200, None
        self.server = _Server(("127.0.0.1", self.port), self)
        self._serve()

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment variables that make W&B use this server and write only into `folder`."""
        names = ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")
        places = {name: str(folder / name.lower()) for name in names}
        return {
            "WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "NETRC": str(folder / "netrc"),
            "WANDB_ERROR_REPORTING": "false", **places,
        }

    def by_type(self) -> dict[str, StubRun]:
        """Runs by job type; the last where several have the same."""
        return {run.fields["jobType"]: run for run in self.runs.values()}

    # answers

    def answer(self, path: str, body: bytes, method: str) -> Any:
        """The answer to a request: JSON, or bytes of a file."""
        path = unquote(path)
        with self.lock:
            if path.startswith("/graphql"):
                request = json.loads(body)
                match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
                operation = request.get("operationName") or (match[1] if match else "")
                self.operations.append(operation)
                call = getattr(self, f"on_{operation}", None)
                if call is None:
                    self.unknown.append(operation)
                    return {"errors": [{"message": f"no such operation: {operation}"}]}
                return {"data": call(request.get("variables") or {})}
            if path.endswith("/file_stream"):
                self.operations.append("file_stream")
                return self._stream(path.split("/")[-2], json.loads(body))
            if path.startswith("/blob/"):
                if method == "PUT":
                    self.operations.append("upload")
                    self._upload(path.removeprefix("/blob/"), body)
                    return {}
                return self.blobs.get(path.removeprefix("/blob/"), b"")
            return {}

    def _stream(self, run: str, body: Json) -> Json:
        found = self.runs[run]
        for name, chunk in (body.get("files") or {}).items():
            lines, offset = found.files.setdefault(name, []), chunk.get("offset") or 0
            lines[offset : offset + len(chunk["content"])] = chunk["content"]  # what is sent again replaces the first
        if body.get("complete"):
            found.exit_code = body.get("exitcode")
        return {"limits": {}}

    def _upload(self, place: str, body: bytes) -> None:
        self.blobs[place] = body
        kind, owner, name = place.split("/", 2)
        if kind == "run":
            self.runs[owner].uploads[name] = body
        elif kind == "manifest":
            self.artifacts[owner].manifest = json.loads(body)

    def on_Viewer(self, _: Json) -> Json:
        teams = {"edges": [{"node": {"id": "team", "name": ENTITY}}]}
        return {"viewer": {
            "id": "viewer", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "", "flags": "{}",
            "teams": teams, "admin": False, "apiKeys": {"edges": []}, "deletedAt": None,
        }}

    on_GetDefaultEntity = on_Viewer

    def on_ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, v: Json) -> Json:
        run = self.runs.get(v["name"])
        model = {"id": "project", "name": v.get("project"), "entity": {"id": "entity", "name": ENTITY}}
        return {"model": model | {"bucket": run and run.bucket}}

    def on_UpsertBucket(self, v: Json) -> Json:
        name = v.get("name") or str(v["id"]).removeprefix("id-")
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StubRun(name, v.get("project") or "uncategorized"))
        run.fields |= {key: value for key, value in v.items() if value is not None}
        return {"upsertBucket": {"bucket": run.bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, v: Json) -> Json:
        files = [{"name": name, "uploadUrl": f"{self.url}/blob/run/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": f"id-{v['run']}", "uploadHeaders": [], "files": files}}

    def on_ArtifactType(self, v: Json) -> Json:
        found = self.find_artifact(v["name"])
        return {"project": {"artifact": found and {"artifactType": {"name": found.kind}}}}

    def on_CreateArtifact(self, v: Json) -> Json:
        i = v["input"]
        name = i["artifactCollectionName"]
        same = [a for a in self.artifacts.values() if a.name == name]
        found = next((a for a in same if a.digest == i["digest"]), None)
        if found is None:
            kept = json.loads(i.get("metadata") or "{}")
            place, kind = f"artifact-{len(self.artifacts)}", i["artifactTypeName"]
            found = StubArtifact(place, name, kind, i["runName"], kept, i["digest"], len(same))
            self.artifacts[found.id] = found
        latest = {"latestArtifact": {"id": same[-1].id}} if same else {"latestArtifact": None}
        state = "COMMITTED" if found.committed else "PENDING"
        return {"createArtifact": {"artifact": {"id": found.id, "state": state, "artifactSequence": latest}}}

    def on_CreateArtifactManifest(self, v: Json) -> Json:
        url = f"{self.url}/blob/manifest/{v['artifactID']}/{v['name']}"
        file = {"id": "file", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{v['artifactID']}", "file": file}}}

    on_UpdateArtifactManifest = on_CreateArtifactManifest

    def on_CreateArtifactFiles(self, v: Json) -> Json:
        nodes = []
        for file in v["input"]["artifactFiles"]:
            place = f"artifact/{file['artifactID']}/{file['name']}"
            nodes.append({
                "storagePath": place, "uploadUrl": f"{self.url}/blob/{place}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            })
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_CommitArtifact(self, v: Json) -> Json:
        found = self.artifacts[v["artifactID"]]
        found.committed = True
        return {"commitArtifact": {"artifact": {"id": found.id, "digest": found.digest}}}

    def on_ArtifactMembershipByName(self, v: Json) -> Json:
        found = self.find_artifact(v["name"])
        return {"project": {"artifactCollectionMembership": found and self._membership(found)}}

    def on_UseArtifact(self, v: Json) -> Json:
        found = self.artifacts[v.get("artifactID") or v["input"]["artifactID"]]
        found.used_by.append(v.get("runName") or v["input"]["runName"])
        return {"useArtifact": {"artifact": {"id": found.id}}}

    def find_artifact(self, name: str) -> StubArtifact | None:
        """The newest committed version of that name."""
        name = name.partition(":")[0]
        return next((a for a in reversed(self.artifacts.values()) if a.name == name and a.committed), None)

    def _membership(self, a: StubArtifact) -> Json:
        project = {
            "id": "p", "internalId": "1", "name": self.runs[a.run].project, "entity": {"id": "e", "name": ENTITY},
        }
        collection = {
            "__typename": "ArtifactSequence", "id": "c", "name": a.name, "project": project,
            "type": {"id": "t", "name": a.kind}, "description": None, "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": "2026-01-01T00:00:00Z", "aliases": {"edges": []}, "tags": {"edges": []},
        }
        artifact = {
            "id": a.id, "artifactSequence": collection, "versionIndex": a.version, "artifactType": {"name": a.kind},
            "description": None, "metadata": json.dumps(a.metadata), "ttlDurationSeconds": -2,
            "ttlIsInherited": False, "tags": [], "historyStep": None, "state": "COMMITTED", "size": 0,
            "digest": a.digest, "commitHash": "c", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None, "aliases": [],
        }
        return {
            "id": f"membership-{a.id}", "createdAt": "2026-01-01T00:00:00Z", "versionIndex": a.version,
            "aliases": [], "artifact": artifact, "artifactCollection": collection,
        }

    def on_OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": {"organization": None}}

    def on_ProjectInternalId(self, v: Json) -> Json:
        there = any(run.project == v["projectName"] for run in self.runs.values()) and v["entityName"] == ENTITY
        return {"project": {"id": "p", "internalId": "1"} if there else None}

    def on_GetProjects(self, _: Json) -> Json:
        names = dict.fromkeys(run.project for run in self.runs.values())
        nodes = [
            {"id": "p", "internalId": "1", "name": name, "entityName": ENTITY, "createdAt": "2026-01-01T00:00:00Z",
             "isBenchmark": False, "user": None}
            for name in names
        ]
        edges = [{"cursor": node["name"], "node": node} for node in nodes]
        return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def on_upsertView(self, v: Json) -> Json:
        inserted = not v.get("id")
        name = v.get("id") or base64.b64encode(b"View:%d" % len(self.views)).decode()
        project = {"id": "p", "name": v["projectName"], "entityName": v["entityName"]}
        self.views[name] = {
            "id": name, "type": v["type"], "name": v["name"], "displayName": v["displayName"],
            "description": v["description"], "project": project, "spec": v["spec"],
            "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z",
        }
        return {"upsertView": {"view": self.views[name], "inserted": inserted}}

    def on_SpecificReport(self, v: Json) -> Json:
        return {"view": self.views.get(v["reportId"])}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], stub: WandbStub) -> None:
        self.stub = stub
        self.connections: set[Any] = set()
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client closed the connection

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(2)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def handle_any(self) -> None:
        stub = self.server.stub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if stub.delay:
            time.sleep(stub.delay)
        content: Any = {"errors": [{"message": "broken"}]}
        if stub.status == 200:
            content = stub.answer(self.path, body, self.command)
        if stub.watch:
            stub.watch(stub)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(stub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = handle_any

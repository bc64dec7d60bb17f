"""What of Hugging Face's hub the client needs to make a repository, commit to it and fetch files, in this process."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class FakeHub:
    """Repositories by name, each with its files; a context manager."""

    def __init__(self):
        self.empty()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, code, body=b"", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                headers = {"Content-Length": len(body), **headers}
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self):
                hub.get(self)

            do_HEAD = do_GET

            def do_POST(self):
                hub.post(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def empty(self):
        """Forget every repository."""
        self.files, self.private, self.commits = {}, {}, []
        self.deny = False  # as if the token might not write

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def sha(self, name):
        parts = [f"{file} {hashlib.sha256(data).hexdigest()}" for file, data in sorted(self.files[name].items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def missing(self, request, code="EntryNotFound"):
        request.answer(404, {"error": "not found"}, X_Error_Code=code, X_Error_Message="not found")

    def get(self, request):
        path = request.path.partition("?")[0].strip("/").split("/")
        name = "/".join(path[2:4] if path[:2] == ["api", "models"] else path[:2])
        if name not in self.files:
            return self.missing(request, "RepoNotFound")
        sha = self.sha(name)
        if path[:2] == ["api", "models"]:
            if path[4:5] == ["tree"]:
                found = [{"type": "file", "path": f, "size": len(d), "oid": "0"} for f, d in self.files[name].items()]
                return request.answer(200, found)
            siblings = [{"rfilename": file} for file in self.files[name]]
            return request.answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})
        file = "/".join(path[4:])  # owner/name/resolve/revision/file
        if file not in self.files[name]:
            return self.missing(request)
        data = self.files[name][file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return request.answer(200, data, ETag=etag, X_Repo_Commit=sha, Content_Type="application/octet-stream")

    def post(self, request, body):
        path = request.path.partition("?")[0].strip("/").split("/")
        if path == ["api", "validate-yaml"]:
            return request.answer(200, {"errors": [], "warnings": []})
        if self.deny:
            return request.answer(403, {"error": "this token may not write"})
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.files[name], self.private[name] = {}, asked.get("private", asked.get("visibility") == "private")
            return request.answer(200, {"url": f"{self.url}/{name}", "name": name})
        name = "/".join(path[2:4])
        if path[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return request.answer(200, {"files": files})
        assert path[4] == "commit", path
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.commits.append(name)
        sha = self.sha(name)
        return request.answer(200, {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

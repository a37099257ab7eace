"""A small HTTP server that answers as a test says, in a thread of it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from served_tokens.proof.server import RENDER

MODELS = {"data": [{"id": "tiny"}]}


@contextmanager
def serving(paths: dict):
    """The address of a server that answers `paths`: {path: answer(body, headers) -> (status, JSON or bytes)}."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = paths.get(self.path, lambda *_: (404, {"detail": "Not Found"}))
            status, content = answer(json.loads(body or b"null"), self.headers)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = respond

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def a_server(render=None, **more) -> dict:
    return {"/v1/models": lambda *_: (200, MODELS), **({RENDER: render} if render else {}), **more}

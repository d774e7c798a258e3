"""A chat endpoint on this machine that answers as it is told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers each request with the next of `replies`: (status, body, headers), or a function of the request."""

    def __init__(self):
        self.seen, self.replies, owner = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.seen.append((self.path, dict(self.headers), json.loads(body)))
                reply = owner.replies.pop(0) if owner.replies else said("hello")
                status, content, headers = reply() if callable(reply) else reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


def said(text, **headers) -> tuple[int, bytes, dict[str, str]]:
    return (
        200,
        json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(),
        headers,
    )


def failed(status: int, words: str = "", **headers) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps({"error": {"message": words}}).encode() if words else b"oops", headers

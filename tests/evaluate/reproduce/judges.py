"""A judge on loopback that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackJudge:
    """Within: a server that gives every answer `score`, or says `replies` one after the other.

    A reply that is a number is an HTTP status. `asked` are the bodies of the requests.
    """

    def __init__(self, score: int = 3, replies: list[str | int] | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.replies = replies
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                judge.asked.append({"path": self.path, **json.loads(body)})
                judge.keys.append(self.headers["Authorization"])
                reply = judge.replies.pop(0) if judge.replies else f"{{'score': {score}}}"
                status = reply if isinstance(reply, int) else 200
                choices = [{"message": {"role": "assistant", "content": reply}}]
                told = json.dumps({"choices": choices}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *arguments: Any) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> LoopbackJudge:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

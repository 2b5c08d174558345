"""A local HTTP server that fails on request, in every way a real one does."""

import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ShardServer:
    """Serves a folder; `faults[name]` is a list of what happens to the next requests for it.

    Faults: a number (a status), ("cut", n) (n bytes, then the connection ends), ("stall", seconds,
    n) (n bytes, then nothing for so long), ("garbage",) (other bytes of the right length).
    """

    def __init__(self, folder):
        self.folder = folder
        self.faults = {}
        self.requests = []
        self.ranges = True
        self.etags = True
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, name):
        return sum(asked == name for asked, _ in self.requests)

    def ranges_asked(self, name):
        return [range_ for asked, range_ in self.requests if asked == name and range_]

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def _handler(server):  # noqa: C901  a class inside
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.lstrip("/")
                with server.lock:
                    server.requests.append((name, self.headers.get("Range")))
                    waiting = server.faults.get(name, [])
                    fault = waiting.pop(0) if waiting else None
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._answer(name, fault)
                self.close_connection = True

            def _answer(self, name, fault):
                path = server.folder / name.partition("?")[0]
                if isinstance(fault, int) or not path.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                data = path.read_bytes()
                tag = f'"{hash(data)}"'
                start = self._start(tag, len(data))
                if start is not None and start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(200 if start is None else 206)
                if start is not None:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                body = data[start or 0 :]
                self.send_header("Content-Length", str(len(body)))
                if server.etags:
                    self.send_header("ETag", tag)
                self.end_headers()
                kind, *values = fault or ("whole",)
                if kind == "cut":
                    body = body[: values[0]]
                if kind == "garbage":
                    body = b"\xa5" * len(body)
                if kind == "stall":
                    self.wfile.write(body[: values[1]])
                    self.wfile.flush()
                    time.sleep(values[0])
                    return
                self.wfile.write(body)

            def _start(self, tag, length):
                asked = self.headers.get("Range")
                if not server.ranges or asked is None:
                    return None
                if self.headers.get("If-Range") not in (None, tag):
                    return None
                return int(asked.removeprefix("bytes=").rstrip("-"))

        return Handler


@contextmanager
def serving(folder):
    server = ShardServer(folder)
    try:
        yield server
    finally:
        server.close()

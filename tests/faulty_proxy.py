"""An HTTP proxy before a real S3 server that answers some requests wrongly, as networks and servers do."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

DROPPED = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultyProxy:
    """``faults`` are used up one per ranged GET, or without end if ``endless``; ``ranges`` are those that were asked.

    500, 503: an answer of that status. reset: half of the body, then the connection is reset. truncated: half, then it
    is closed. flipped: a bit of the body is another. slow: the body comes in drops. stalled: half, then nothing more.
    """

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.faults: deque[str] = deque()
        self.endless = ""
        self.delay = 0.0  # seconds before each answer to a ranged GET
        self.ranges: list[tuple[str, str]] = []  # (path, range)
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def next_fault(self, path: str, wanted: str) -> str:
        with self.lock:
            self.ranges.append((path, wanted))
            return self.faults.popleft() if self.faults else self.endless


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[tuple[str, FaultyProxy]]:
    """The proxy's URL, and the proxy."""
    proxy = FaultyProxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            wanted = self.headers.get("Range")
            fault = proxy.next_fault(self.path, wanted) if self.command == "GET" and wanted else ""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault in {"500", "503"}:
                code = "InternalError" if fault == "500" else "SlowDown"
                return self.reply(int(fault), {}, b"<Error><Code>%s</Code></Error>" % code.encode())
            upstream = http.client.HTTPConnection(proxy.upstream.hostname or "", proxy.upstream.port, timeout=30)
            # The headers go on as they are: the signature covers Host, which is the proxy's.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in DROPPED}
            upstream.close()
            if wanted:
                time.sleep(proxy.delay)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
            return self.reply(answer.status, headers, content, fault, length)

        def reply(
            self, status: int, headers: dict[str, str], body: bytes, fault: str = "", length: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if fault == "flipped":
                body = body[:5] + bytes([body[5] ^ 4]) + body[6:]
            half = body[: len(body) // 2]
            if fault in {"reset", "truncated", "stalled"}:
                self.wfile.write(half)
                self.wfile.flush()
                if fault == "stalled":
                    proxy.ended.wait(10)
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR) if fault == "truncated" else self.connection.close()
            elif fault == "slow":
                for start in range(0, len(body), 256):
                    try:
                        self.wfile.write(body[start : start + 256])
                    except OSError:  # the client has given up
                        break
                    if proxy.ended.wait(0.05):
                        break
                self.close_connection = True
            else:
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward  # noqa: N815 - the names that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (OSError, ValueError):  # the connection was broken, by us or by the client
                self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def shutdown_request(self, request: object) -> None:
            with suppress(OSError):  # closed already
                super().shutdown_request(request)  # type: ignore[arg-type]

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()

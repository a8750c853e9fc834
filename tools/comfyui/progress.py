"""What a running ComfyUI tells its frontend: which node works, and how far it is. Standard library only.

The server speaks WebSocket (RFC 6455); this is as much of it as listening needs. Progress is a courtesy: whatever goes
wrong here ends the listening, never the run.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import urllib.parse
from dataclasses import dataclass
from typing import Any

_TEXT, _CLOSE, _PING = 1, 8, 9


@dataclass(frozen=True)
class NodeProgress:
    """Node ``node_id`` works; it did ``value`` of ``maximum`` steps (0 of 0 where it counts none)."""

    node_id: str
    value: int = 0
    maximum: int = 0


class ProgressListener:
    """Listens to the messages of the server at ``url`` to ``client``; use it in a ``with`` block."""

    def __init__(self, url: str, client: str, timeout: float = 5.0) -> None:
        self._buffer = b""
        self._part = b""
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError, ValueError):
            self._connect(urllib.parse.urlsplit(url), client, timeout)

    def __enter__(self) -> ProgressListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self, url: urllib.parse.SplitResult, client: str, timeout: float) -> None:
        connection = socket.create_connection((url.hostname or "127.0.0.1", url.port or 80), timeout)
        try:
            key = base64.b64encode(os.urandom(16)).decode()
            connection.sendall(
                (
                    f"GET /ws?clientId={client} HTTP/1.1\r\nHost: {url.netloc}\r\nUpgrade: websocket\r\n"
                    f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
                ).encode()
            )
            answer = b""
            while b"\r\n\r\n" not in answer:
                received = connection.recv(4096)
                if not received or len(answer) > 65536:
                    raise OSError("no WebSocket there")
                answer += received
            head, _, self._buffer = answer.partition(b"\r\n\r\n")
            if b" 101 " not in head.split(b"\r\n")[0]:
                raise OSError("no WebSocket there")
            connection.setblocking(False)
        except BaseException:
            connection.close()
            raise
        self._socket = connection

    def news(self) -> list[NodeProgress]:
        """What arrived since the last call; returns at once."""
        try:
            while self._socket is not None:
                received = self._socket.recv(65536)
                if not received:
                    self.close()
                self._buffer += received
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        found = []
        while (frame := self._frame()) is not None:
            progress = self._understood(*frame)
            found += [progress] if progress is not None else []
        return found

    def _frame(self) -> tuple[int, bytes] | None:
        """Opcode and content of the next complete message (RFC 6455, section 5.2; servers do not mask)."""
        while len(self._buffer) >= 2:
            opcode, size, start = self._buffer[0] & 15, self._buffer[1] & 127, 2
            if size > 125:
                start = 4 if size == 126 else 10
                if len(self._buffer) < start:
                    return None
                (size,) = struct.unpack("!H" if start == 4 else "!Q", self._buffer[2:start])
            if len(self._buffer) < start + size:
                return None
            last, content = self._buffer[0] & 128, self._buffer[start : start + size]
            self._buffer = self._buffer[start + size :]
            if opcode >= _CLOSE:  # control frames may stand between the parts of a message
                return opcode, content
            self._opcode = opcode or self._opcode
            self._part += content
            if last:
                content, self._part = self._part, b""
                return self._opcode, content
        return None

    _opcode = _TEXT

    def _understood(self, opcode: int, content: bytes) -> NodeProgress | None:
        if opcode == _CLOSE:
            self.close()
        if opcode == _PING and self._socket is not None:
            with contextlib.suppress(OSError):  # a pong; clients mask, and a mask of zeros changes nothing
                self._socket.sendall(bytes([0x8A, 0x80 | len(content), 0, 0, 0, 0]) + content)
        if opcode != _TEXT:
            return None
        try:
            message: Any = json.loads(content)
            kind, data = message["type"], message["data"]
            if kind == "executing" and data["node"] is not None:
                return NodeProgress(str(data["node"]))
            if kind == "progress" and data.get("node") is not None:
                return NodeProgress(str(data["node"]), int(data["value"]), int(data["max"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        return None

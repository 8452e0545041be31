"""Malformed requests, drawn by seed and number, and how an answer to one is judged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.serving.accounts import Reply
from bench.serving.clients import split_http
from bench.serving.malformed_grpc import GRPC_KINDS
from bench.serving.malformed_http import CUT_OFF, HARMLESS, HTTP_KINDS, MAY_CLOSE

_LONGEST = 2000
_GRPC_SHARE = 0.3


@dataclass(frozen=True)
class Bad:
    """A malformed request."""

    kind: str  # what is wrong with it
    protocol: str  # "http" or "grpc"
    content: bytes  # bytes of a connection, or a message
    method: str = ""  # of gRPC
    ends: bool = False  # whether the sending side ends behind it, so that what it promised never comes
    may_close: bool = False  # whether ending the connection without a word is an answer
    harmless: bool = False  # whether it may be answered as well: what is wrong with it is bounded and touches nothing


def malformed(seed: int, number: int, sheets: Sequence[bytes]) -> Bad:
    """A malformed request made of valid images: always the same for a seed, a number and the sheets."""
    draw = random.Random(f"{seed} {number}")
    if draw.random() < _GRPC_SHARE:
        kind = draw.choice(list(GRPC_KINDS))
        content, method = GRPC_KINDS[kind](draw, draw.choice(sheets))
        return Bad(kind, "grpc", content, method)
    kind = draw.choice(list(HTTP_KINDS))
    content = HTTP_KINDS[kind](draw, draw.choice(sheets))
    return Bad(kind, "http", content, ends=kind in CUT_OFF, may_close=kind in MAY_CLOSE, harmless=kind in HARMLESS)


def judge_http(bad: Bad, raw: object) -> tuple[str, str]:
    """How a malformed request was answered: "refused", "closed", "answered", "busy", or a fault; and what was said."""
    if isinstance(raw, ConnectionError) and bad.may_close:
        return "closed", ""
    if isinstance(raw, Exception):
        return "no answer", f"{type(raw).__name__}: {raw}"
    found = split_http(raw)
    if found is None:
        closed = not raw and bad.may_close
        return ("closed" if closed else "no answer"), raw[:100].decode("latin-1")
    status, headers, body = found
    text = body.decode("utf-8", "replace")
    if 200 <= status < 300:
        return ("answered" if bad.harmless else "answered as if valid"), text
    return _refusal(status, text, busy="retry-after" in headers)


def judge_grpc(bad: Bad, reply: Reply) -> tuple[str, str]:
    """The same for gRPC."""
    if reply.status == 200:
        return ("answered" if bad.harmless else "answered as if valid"), "an answer"
    # what is no message is refused by gRPC itself, which has this one word for it
    if "deserializing" in reply.text:
        return "refused", reply.text
    return _refusal(reply.status, reply.text, busy=True)


def _refusal(status: int, text: str, *, busy: bool) -> tuple[str, str]:
    if status in (429, 503):
        return ("busy" if busy else "refused unclearly"), text
    if not 400 <= status < 500:
        return "no answer" if status == 0 else "fault of the server", f"{status} {text}"
    readable = text.strip() and "\n" not in text.strip() and "Traceback" not in text and len(text) <= _LONGEST
    return ("refused" if readable else "refused unclearly"), text

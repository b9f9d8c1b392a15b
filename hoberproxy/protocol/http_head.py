"""HTTP/1.1 heads on bytes: requests and responses read and written, framing settled (RFC 9112).

Strict on both legs: a shape that two parsers could read in two ways (request smuggling) is refused,
never repaired. Leaves to others: bodies (protocol/http_body.py), heads that come again
(protocol/known_heads.py), sockets, time limits, what a field means beyond framing, and closing the
connection after an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

Headers = list[tuple[bytes, bytes]]
"""Names lower-cased, values without the white space around them."""

MAX_REQUEST_HEAD_BYTES: Final = 32 * 1024
MAX_RESPONSE_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 100
MAX_LENGTH: Final = 2**53  # what every JSON reader and log store still holds exactly
MAX_KEPT_LINE_BYTES: Final = 128  # a longer line is parsed each time
MAX_KEPT_LINES: Final = 1024
MAX_KEPT_VALUES: Final = 64  # of one header's name

_END: Final = b"\r\n\r\n"  # of a head
_NOTHING: Final[list[bytes]] = []
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

# RFC 9110 5.6.2 and 5.5. obs-text (0x80 and up) passes: `X-Title` holds letters of all languages.
TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
VALUE: Final = rb"[\t\x20-\x7e\x80-\xff]*+"
_TARGET: Final = rb"[!\"$-~]++"  # printable ASCII, no space, no fragment (RFC 9112 3.2)

_TOKEN_ONLY: Final = re.compile(TOKEN)
_REQUEST_LINE: Final = re.compile(rb"(%b) (%b) HTTP/([0-9]\.[0-9])" % (TOKEN, _TARGET))
# The reason phrase may be missing, its space too (RFC 9112 4 wants the space; servers forget it).
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: %b)?" % VALUE)
_STATUS_BEGUN: Final = b"HTTP/1."
# What a line of a head never holds; a CR at the very end may have its LF still to come.
_BARE: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)")
FIELD_LINE: Final = re.compile(rb"(%b):(%b)" % (TOKEN, VALUE))
_SECRET_NAME: Final = re.compile(rb"auth|cookie|key|secret|session|token")
_BLOCK_OUT: Final = re.compile(rb"(?:%b: %b\r\n)*" % (TOKEN, VALUE))
_REQUEST_LINE_OUT: Final = re.compile(rb"%b %b HTTP/1\.1\r\n" % (TOKEN, _TARGET))
_ABSOLUTE_FORM: Final = re.compile(rb"(?i:https?)://([^/?]++)([^?]*+)(?:\?(.*+))?")
# Of -._~, digits and letters (RFC 3986, 2.3). What an escape makes is not read again: %2541 is %41.
_ESCAPED_UNRESERVED: Final = re.compile(
    rb"(?i:%(2[de]|3[0-9]|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9ae]))"
)
# Narrower than reg-name (RFC 3986 3.2.2): no sub-delims, which no real host name has.
_AUTHORITY: Final = re.compile(rb"(?:[0-9A-Za-z._~%-]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]{0,5})?")
_KEEPALIVE_TIMEOUT: Final = re.compile(rb"(?i:(?:^|[,; \t])timeout=\"?([0-9]{1,9})(?![0-9]))")


class HeadError(Exception):
    """A head breaks the rules of HTTP/1.1: answer with `status`, and close the connection.

    For a response head `status` is 502. Messages quote names and framing values only, and at most
    40 characters of them.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class FramingKind(Enum):
    """The ways to find the end of a body (RFC 9112 6.3)."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_EOF = "until_eof"  # responses only


# As globals: see docs/mypyc.md.
_NONE: Final = FramingKind.NONE
_LENGTH: Final = FramingKind.LENGTH
_CHUNKED: Final = FramingKind.CHUNKED
_UNTIL_EOF: Final = FramingKind.UNTIL_EOF


# Heads


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The head of a client's request, framing settled. `repr` leaves out what may hold the key.

    `target` is as sent. `path` and `query` are cut from it, still percent-encoded; an absolute-form
    target is reduced to them. `path` is in one form: letters, digits and -._~ are never escaped
    (RFC 3986, 6.2.2.2), and doubled slashes and one at the end, which come of base URLs, are taken
    out. `length` is in bytes, None unless `kind` is LENGTH.
    """

    method: bytes
    target: bytes = field(repr=False)
    path: bytes
    query: bytes = field(repr=False)
    version_minor: int
    headers: Headers = field(repr=False)
    kind: FramingKind
    length: int | None
    keep_alive: bool
    expects_continue: bool
    _first: dict[bytes, bytes] = field(default_factory=dict, repr=False, compare=False)

    @property
    def content_type(self) -> bytes:
        """Return the media type in lower case without parameters, b"" when none was sent."""
        return _media_type(self._first)

    def get(self, name: bytes) -> bytes | None:
        """Return the first value of the header `name`, which is in lower case."""
        return self._first.get(name)

    def __post_init__(self) -> None:
        if not self._first:
            object.__setattr__(self, "_first", dict(reversed(self.headers)))


class ResponseHead:
    """The head of a model server's response to a POST, framing settled. It is never changed.

    `keepalive_hint` is the server's `Keep-Alive: timeout=N` in seconds: a hint, since llama.cpp
    says 5 and closes at once. `length` is in bytes, None unless `kind` is LENGTH. `content_type` is
    the media type in lower case without parameters, b"" when none was sent. `content_encoding` has
    all codings in lower case, b"identity" when there is none.
    """

    __slots__ = (
        "_first",
        "_headers",
        "_values",
        "_varied",
        "content_encoding",
        "content_type",
        "keep_alive",
        "keepalive_hint",
        "kind",
        "length",
        "status",
    )

    def __init__(
        self,
        status: int,
        headers: Headers,
        kind: FramingKind,
        length: int | None,
        keep_alive: bool,
        keepalive_hint: float | None,
        first: dict[bytes, bytes],
        content_type: bytes,
        content_encoding: bytes,
    ) -> None:
        self.status = status
        self._headers = headers
        self.kind = kind
        self.length = length
        self.keep_alive = keep_alive
        self.keepalive_hint = keepalive_hint
        self._first = first
        self.content_type = content_type
        self.content_encoding = content_encoding
        self._varied = _NOTHING  # names of fields whose value is not that in `_headers`
        self._values = _NOTHING  # but the one here, in the same order

    def varied(self, names: list[bytes], values: list[bytes], length: int | None) -> ResponseHead:
        """Return this head with `values` for the fields `names`; of these `length` is settled."""
        head = ResponseHead(
            self.status,
            self._headers,
            self.kind,
            length,
            self.keep_alive,
            self.keepalive_hint,
            self._first,
            self.content_type,
            self.content_encoding,
        )
        head._varied, head._values = names, values
        return head

    @property
    def headers(self) -> Headers:
        """Return all headers in order."""
        if not self._varied:
            return self._headers
        values = dict(zip(self._varied, self._values, strict=True))
        return [(name, values.get(name, value)) for name, value in self._headers]

    def get(self, name: bytes) -> bytes | None:
        """Return the first value of the header `name`, which is in lower case."""
        for place in range(len(self._varied)):
            if self._varied[place] == name:
                return self._values[place]
        return self._first.get(name)


def skip_empty_line(buffer: bytes | bytearray) -> int:
    """Return the offset of the request line in `buffer`, which may begin with one CRLF.

    Old clients send it after a body (RFC 9112 2.2). Call this once per request, when its first
    bytes are there; a second empty line is an error.
    """
    return 2 if buffer.startswith(b"\r\n") else 0


def find_head_end(buffer: bytes | bytearray, start: int = 0) -> int:
    """Return the offset past a head's empty line in `buffer`, -1 without one.

    `start` is where the last search ended.
    """
    end = buffer.find(_END, max(0, start - 3))
    return end + 4 if end >= 0 else -1


def check_response_head(part: bytes, start: int = 0) -> None:
    """Raise HeadError if `part` cannot be the beginning of a response's head.

    What stands before `start` has passed an earlier check. So a peer that ends its lines with LF
    alone, or speaks another protocol, fails at once and not by a time limit.
    """
    line_start = part.rfind(b"\r\n", 0, start) + 2
    if line_start < 2:  # still in the status line
        line_start = 0
        if not (_STATUS_BEGUN.startswith(part[:7]) or part.startswith(_STATUS_BEGUN)):
            raise HeadError("expected 'HTTP/1.' at the start of a head, got something else", 502)
    if _BARE.search(part, max(0, start - 1)):
        raise HeadError("expected head lines that end in CR LF, got a bare CR, LF or control", 502)
    lines = part[line_start:].split(b"\r\n")
    for line in lines[:-1]:
        if line_start:
            match = FIELD_LINE.fullmatch(line)
        else:
            match = _STATUS_LINE.fullmatch(line)
        if match is None:
            raise HeadError("expected a status line and 'name: value' lines, got another one", 502)
        line_start += len(line) + 2


def parse_request_head(raw: bytes) -> RequestHead:
    """Return the request's head in `raw`, which ends with its empty line. Raises HeadError."""
    if len(raw) > MAX_REQUEST_HEAD_BYTES:
        raise HeadError(_too_large(len(raw), MAX_REQUEST_HEAD_BYTES), 431)
    lines = _split_lines(raw)
    method, target, path, query, version_minor = _parse_request_line(lines.pop(0))
    headers = _parse_fields(lines)
    first = _index(headers)
    _check_host(first.get(b"host"), version_minor)
    kind, length = _framing(first, version_minor)
    return RequestHead(
        method,
        target,
        path,
        query,
        version_minor,
        headers,
        kind,
        length,
        _keep_alive(headers, first, version_minor),
        # An expectation of HTTP/1.0 is ignored (RFC 9110 10.1.1).
        b"expect" in first and version_minor == 1 and first[b"expect"].lower() == b"100-continue",
        first,
    )


def parse_response_head(raw: bytes) -> ResponseHead:
    """Return the head in `raw` of a response to a POST; it ends with its empty line.

    A status of 1xx other than 101 is a head as any other: the caller drops it and reads the next.
    Raises HeadError.
    """
    try:
        return _parse_response_head(raw)
    except HeadError as error:
        error.status = 502  # whatever was wrong with it, it is the model server's fault
        raise


def _parse_response_head(raw: bytes) -> ResponseHead:
    if len(raw) > MAX_RESPONSE_HEAD_BYTES:
        raise HeadError(_too_large(len(raw), MAX_RESPONSE_HEAD_BYTES))
    lines = _split_lines(raw)
    status, version_minor = _parse_status_line(lines.pop(0))
    headers = _parse_fields(lines)
    first = _index(headers)
    kind, length = _framing(first, version_minor)
    if status < 200 or status in (204, 304):
        kind, length = _NONE, None  # whatever the fields say (RFC 9112 6.3, rule 1)
    elif kind is _NONE:
        kind = _UNTIL_EOF  # rule 8: the end of the connection ends the body
    return ResponseHead(
        status,
        headers,
        kind,
        length,
        kind is not _UNTIL_EOF and _keep_alive(headers, first, version_minor),
        _keepalive_hint(first.get(b"keep-alive")),
        first,
        _media_type(first),
        _joined(headers, b"content-encoding").lower() or b"identity",
    )


# Lines of a head


class _FieldLines(dict[bytes, tuple[bytes, bytes]]):
    """Header lines, read once and kept: a peer sends the same ones with each message.

    So the head of an SDK takes 10 µs and not 35. No line is kept whose name hints at a secret, and
    few of a name whose value changes with each message.
    """

    def __init__(self) -> None:
        self._kept: dict[bytes, int] = {}  # values by name

    def clear(self) -> None:
        super().clear()
        self._kept.clear()

    def __missing__(self, line: bytes) -> tuple[bytes, bytes]:
        match = FIELD_LINE.fullmatch(line)
        if match is None:
            raise HeadError(_explain_field_line(line))
        name, value = match[1].lower(), match[2].strip(b" \t")
        kept = self._kept.get(name, 0)
        if (
            kept < MAX_KEPT_VALUES
            and len(line) <= MAX_KEPT_LINE_BYTES
            and not _SECRET_NAME.search(name)
        ):
            if len(self) >= MAX_KEPT_LINES:
                self.clear()
                kept = 0
            self._kept[name] = kept + 1
            self[line] = name, value
        return name, value


_field_lines: Final = _FieldLines()


def _split_lines(raw: bytes) -> list[bytes]:
    # A bare CR or LF stays inside a line, where no pattern lets it pass (RFC 9112 2.2).
    if not raw.endswith(_END):
        raise HeadError("expected a head that ends with an empty line")
    return raw[:-4].split(b"\r\n")


def _parse_fields(lines: list[bytes]) -> Headers:
    if len(lines) > MAX_HEADERS:
        raise HeadError(f"expected at most {MAX_HEADERS} header lines, got {len(lines)}", 431)
    read = _field_lines
    return [read[line] for line in lines]


def _parse_request_line(line: bytes) -> tuple[bytes, bytes, bytes, bytes, int]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HeadError(_explain_request_line(line))
    method, target, version = match.groups()
    if version not in (b"1.0", b"1.1"):
        raise HeadError(f"expected HTTP/1.1 or HTTP/1.0, got HTTP/{version.decode()}", 505)
    path, query = _split_target(method, target)
    return method, target, path, query, int(version == b"1.1")


def _split_target(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Return path and query of `target`, whatever its form (RFC 9112 3.2)."""
    if target.startswith(b"/"):
        path, _, query = target.partition(b"?")
        return _normalize_path(path), query
    if target == b"*" and method == b"OPTIONS":
        return target, b""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None or not _AUTHORITY.fullmatch(match[1]):
        raise HeadError("expected a request target that begins with '/' or 'http://host/'")
    return _normalize_path(match[2]), match[3] or b""


def _normalize_path(path: bytes) -> bytes:
    if b"%" in path:
        path = _ESCAPED_UNRESERVED.sub(lambda match: bytes((int(match[1], 16),)), path)
    if b"//" in path or path.endswith(b"/"):
        path = b"/" + b"/".join([part for part in path.split(b"/") if part])
    return path or b"/"


def _parse_status_line(line: bytes) -> tuple[int, int]:
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise HeadError("expected a status line such as 'HTTP/1.1 200 OK', got something else")
    status = int(match[2])
    if status == 101:
        raise HeadError("expected no change of protocol, got status 101; none was asked for")
    return status, int(match[1])


# What the fields say about framing


def _index(headers: Headers) -> dict[bytes, bytes]:
    """Return the first value of each name. Raises HeadError where a second one is ambiguous."""
    first = dict(headers)
    if len(first) == len(headers):
        return first
    names = [name for name, _ in headers]
    for name in (b"content-length", b"transfer-encoding", b"host"):
        # RFC 9112 6.3 lets equal lengths pass; no known client sends them.
        if names.count(name) > 1:
            raise HeadError(f"expected one {name.decode()} header, got {names.count(name)}")
    return dict(reversed(headers))


def _framing(first: dict[bytes, bytes], version_minor: int) -> tuple[FramingKind, int | None]:
    """Return the kind and length that the fields declare (RFC 9112 6.3). Raises HeadError."""
    length, coding = first.get(b"content-length"), first.get(b"transfer-encoding")
    if coding is None:
        return (_NONE, None) if length is None else (_LENGTH, _parse_length(length))
    if length is not None:
        raise HeadError("expected content-length or transfer-encoding, got both")
    if version_minor == 0:
        raise HeadError("expected no transfer-encoding in HTTP/1.0, got one")  # RFC 9112 6.1
    if coding.lower() != b"chunked":
        raise HeadError(f"expected transfer-encoding 'chunked', got '{quote(coding)}'")
    return _CHUNKED, None


def _parse_length(value: bytes) -> int:
    # int() alone takes signs, underscores and spaces; `5, 5` is two lengths.
    if not value.isdigit() or len(value) > 16 or int(value) > MAX_LENGTH:
        raise HeadError(
            f"expected content-length as digits, at most {MAX_LENGTH}, got '{quote(value)}'"
        )
    return int(value)


def _keep_alive(headers: Headers, first: dict[bytes, bytes], version_minor: int) -> bool:
    """Return whether the peer keeps the connection open after this message (RFC 9112 9.3)."""
    value = first.get(b"connection")
    if value is None:
        return version_minor == 1
    if len(first) != len(headers):
        value = _joined(headers, b"connection")
    options = [option.strip(b" \t") for option in value.lower().split(b",")]
    return b"close" not in options and (version_minor == 1 or b"keep-alive" in options)


def _keepalive_hint(value: bytes | None) -> float | None:
    if value is None:
        return None
    match = _KEEPALIVE_TIMEOUT.search(value)
    return float(match[1]) if match else None


def _check_host(value: bytes | None, version_minor: int) -> None:
    """Raise HeadError if the host is malformed, or missing in HTTP/1.1 (RFC 9112 3.2).

    `_index` has refused a second one.
    """
    if value is None:
        if version_minor == 1:
            raise HeadError("expected a host header, got none")
    elif not _AUTHORITY.fullmatch(value):
        raise HeadError(f"expected a host header such as 'name:port', got '{quote(value)}'")


def _media_type(first: dict[bytes, bytes]) -> bytes:
    return first.get(b"content-type", b"").partition(b";")[0].strip(b" \t").lower()


def _joined(headers: Headers, name: bytes) -> bytes:
    """Return all values of the list header `name` as one (RFC 9110 5.3)."""
    return b",".join([value for key, value in headers if key == name])


# Words for what is wrong. Values are not quoted: a broken line may well be the one with the key.


def quote(value: bytes) -> str:
    """Return at most 40 printable characters of `value`, for a message."""
    return repr(value[:40])[2:-1][:40]


def _too_large(size: int, limit: int) -> str:
    return f"expected a head of at most {limit} bytes, got {size}"


def _explain_request_line(line: bytes) -> str:
    method = line.partition(b" ")[0]
    if not line:
        return "expected a request line, got an empty line"
    if b"\r" in line or b"\n" in line:
        return "expected lines that end with CR LF, got a bare CR or LF in the request line"
    if not _TOKEN_ONLY.fullmatch(method):
        return f"expected a method such as POST, got '{quote(method)}'"
    return "expected 'method target HTTP/1.1' with single spaces and a target of printable ASCII"


def _explain_field_line(line: bytes) -> str:
    name, colon, _ = line.partition(b":")
    if b"\r" in line or b"\n" in line:
        return "expected header lines that end with CR LF, got a bare CR or LF in one"
    if line[:1] in (b" ", b"\t"):
        return "expected each header on one line, got a folded one"  # RFC 9112 5.2
    if not colon:
        return "expected 'name: value' in each header line, got one without a colon"
    if name.endswith((b" ", b"\t")):  # RFC 9112 5.1
        return f"expected no space before the colon, got one after '{quote(name.rstrip())}'"
    if not _TOKEN_ONLY.fullmatch(name):
        return f"expected a header name of letters, digits and '-', got '{quote(name)}'"
    return f"expected printable characters in header '{quote(name)}', got a control character"


# What we send

REASONS: Final[dict[int, bytes]] = {
    200: b"OK",
    204: b"No Content",
    304: b"Not Modified",
    400: b"Bad Request",
    401: b"Unauthorized",
    402: b"Payment Required",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    417: b"Expectation Failed",
    422: b"Unprocessable Content",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
_STATUS_LINES: Final = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b"")) for status in range(200, 600)
}


def serialize_request_head(method: bytes, target: bytes, headers: Headers) -> bytes:
    """Return a request's head to send. Raises ValueError if the parts don't make one head."""
    line = b"%b %b HTTP/1.1\r\n" % (method, target)
    if not _REQUEST_LINE_OUT.fullmatch(line):
        raise ValueError("expected a method and a target without spaces or control characters")
    return b"%b%b\r\n" % (line, serialize_fields(headers))


def begin_response_head(status: int, headers: Headers) -> bytes:
    """Return a final response's head to send, up to further fields and the empty line.

    Raises ValueError if the parts don't make one head.
    """
    line = _STATUS_LINES.get(status)
    if line is None:
        raise ValueError(f"expected a status from 200 to 599, got {status}")
    return line + serialize_fields(headers) if headers else line


def serialize_fields(headers: Headers) -> bytes:
    """Return the lines of `headers`. Raises ValueError if a header is not one line."""
    block = b"".join([b"%b: %b\r\n" % header for header in headers])
    # A value with a line break of its own may look like two good lines: so they are counted.
    if not _BLOCK_OUT.fullmatch(block) or block.count(b"\n") != len(headers):
        raise ValueError(_explain_bad_header(headers))
    return block


def _explain_bad_header(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, _ in headers:
        if not _TOKEN_ONLY.fullmatch(name):
            return f"expected a header name of letters, digits and '-', got '{quote(name)}'"
    bad = next(name for name, value in headers if not re.fullmatch(VALUE, value))
    return f"expected a header value without line breaks or control characters in '{quote(bad)}'"

"""HTTP/1.1 without I/O, as the rest of the package imports it.

Heads are in `http11_head`, the framing of bodies is in `http11_body`.
"""

from .http11_body import (
    BodyReader,
    ChunkedBody,
    FramingError,
    LengthBody,
    NoBody,
    UntilEofBody,
    body_reader,
)
from .http11_head import (
    CONTINUE,
    MAX_REQUEST_HEAD_BYTES,
    MAX_RESPONSE_HEAD_BYTES,
    REASONS,
    FramingKind,
    HeadError,
    Headers,
    RepeatedHead,
    RequestHead,
    ResponseHead,
    ResponseHeads,
    find_head_end,
    parse_request_head,
    parse_response_head,
    repeated_head,
    serialize_fields,
    serialize_request_head,
    serialize_response_head,
    skip_empty_line,
)

__all__ = [
    "CONTINUE",
    "MAX_REQUEST_HEAD_BYTES",
    "MAX_RESPONSE_HEAD_BYTES",
    "REASONS",
    "BodyReader",
    "ChunkedBody",
    "FramingError",
    "FramingKind",
    "HeadError",
    "Headers",
    "LengthBody",
    "NoBody",
    "RepeatedHead",
    "RequestHead",
    "ResponseHead",
    "ResponseHeads",
    "UntilEofBody",
    "body_reader",
    "find_head_end",
    "parse_request_head",
    "parse_response_head",
    "repeated_head",
    "serialize_fields",
    "serialize_request_head",
    "serialize_response_head",
    "skip_empty_line",
]

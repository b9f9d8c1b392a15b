"""Framing of HTTP/1.1 bodies: where they end, and that cuts in the bytes change nothing."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hoberproxy.protocol.http_body import (
    BodyReader,
    ChunkedBody,
    FramingError,
    LengthBody,
    NoBody,
    RequestChunks,
    UntilEofBody,
    body_reader,
    whole_chunk,
)
from hoberproxy.protocol.http_head import (
    Headers,
    find_head_end,
    parse_request_head,
    parse_response_head,
)
from tests.conftest import pure_only
from tests.protocol.test_http_head import (
    CHUNKED,
    HEADERS,
    LENGTH,
    LLAMA_BODY,
    LLAMA_EVENTS,
    LLAMA_HEAD,
    VALUES,
    chunk,
    request,
)
from tests.support.cuts import cut_at

LLAMA_PAYLOAD = b"".join(LLAMA_EVENTS)


RECORDED = {
    "llama.cpp stream, closes after it": (LLAMA_HEAD + LLAMA_BODY, LLAMA_PAYLOAD),
    "json reply with a length": (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        b'{"id":"a"}',
        b'{"id":"a"}',
    ),
    "chunks with extensions and trailers": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n"
        b'5;a="b c"\r\nhello\r\n00006 ; x\r\n world\r\n000;last\r\nX-Sum: 1\r\nX-B:\r\n\r\n',
        b"hello world",
    ),
    "old server, until the connection ends": (
        b"HTTP/1.0 200\r\nServer: old\r\n\r\ndata: [DONE]\n\n",
        b"data: [DONE]\n\n",
    ),
    "no body": (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b""),
}


def read(reader: BodyReader, *reads: bytes) -> bytes:
    pieces = [piece for data in reads for piece in reader.feed(data)]
    assert all(pieces), "no piece may be empty"
    return b"".join(pieces)


def read_response(raw: bytes, cuts: list[int]) -> tuple[bytes, bytes]:
    """Payload and leftover of a whole response, its bytes read up to each of the cuts."""
    end = find_head_end(raw)
    reader = body_reader(parse_response_head(raw[:end]))
    payload = read(reader, *cut_at(raw[end:], cuts))
    reader.feed_eof()
    assert reader.is_complete
    return payload, reader.leftover


@pytest.mark.parametrize(("raw", "payload"), RECORDED.values(), ids=RECORDED)
def test_a_recorded_response_reads_the_same_cut_anywhere(raw: bytes, payload: bytes) -> None:
    size = len(raw) - find_head_end(raw)
    for cut in range(size + 1):
        assert read_response(raw, [cut]) == (payload, b""), f"cut at {cut}"
    assert read_response(raw, list(range(size))) == (payload, b""), "byte by byte"


@pytest.mark.parametrize("name", [name for name in RECORDED if "until" not in name])
def test_a_response_cut_short_anywhere_is_never_taken_for_a_whole_one(name: str) -> None:
    raw, _ = RECORDED[name]
    end = find_head_end(raw)
    for size in range(len(raw) - end):
        reader = body_reader(parse_response_head(raw[:end]))
        read(reader, raw[end : end + size])
        assert not reader.is_complete, f"after {size} bytes"
        with pytest.raises(FramingError, match="got the end of the connection"):
            reader.feed_eof()


@pytest.mark.parametrize("name", [name for name in RECORDED if "until" not in name])
def test_bytes_behind_a_body_are_left_over_wherever_they_were_cut(name: str) -> None:
    raw, payload = RECORDED[name]
    size = len(raw) - find_head_end(raw)
    for cut in range(size + 5):
        assert read_response(raw + b"HTTP/", [cut]) == (payload, b"HTTP/")


def test_whole_chunks_come_out_one_piece_each() -> None:
    assert ChunkedBody().feed(LLAMA_BODY) == LLAMA_EVENTS


def test_whole_chunks_behind_the_end_of_another_come_out_one_piece_each() -> None:
    reader = ChunkedBody()
    reader.feed(b"5\r\nhel")
    assert reader.feed(b"lo\r\n" + LLAMA_BODY) == [b"lo", *LLAMA_EVENTS]


@pure_only
def test_a_large_chunk_passes_read_by_read_without_a_copy() -> None:
    reader = ChunkedBody()
    read_size, reads = 65536, 800
    assert reader.feed(b"%x\r\n" % (read_size * reads)) == []
    data = b"x" * read_size
    for _ in range(reads):
        (piece,) = reader.feed(data)
        assert piece is data
    assert reader.feed(b"\r\n0\r\n\r\n") == []
    assert reader.is_complete


@pytest.mark.parametrize("digits", [b"1F", b"1f", b"0000001f", b"000000000000001F"])
def test_a_chunk_size_is_hex_of_up_to_sixteen_digits(digits: bytes) -> None:
    payload = b"p" * 31
    assert read(ChunkedBody(), digits + b"\r\n" + payload + b"\r\n") == payload


BAD_CHUNKS = {
    "no size": b"\r\n",
    "no size but an extension": b";a\r\n",
    "size with 0x": b"0x5\r\nhello\r\n",
    "size with a plus sign": b"+5\r\nhello\r\n",
    "negative size": b"-5\r\nhello\r\n",
    "size with an underscore": b"0_5\r\nhello\r\n",
    "space before the size": b" 5\r\nhello\r\n",
    "space after the size": b"5 \r\nhello\r\n",
    "size not hex": b"g\r\n",
    "size of seventeen digits": b"00000000000000005\r\nhello\r\n",
    "bare LF after the size": b"5\nhello\r\n",
    "bare CR after the size": b"5\rhello\r\n",
    "CR CR LF after the size": b"5\r\r\nhello\r\n",
    "bare LF in an extension": b"5;a\nb\r\nhello\r\n",
    "bare CR in an extension": b"5;a\rb\r\nhello\r\n",
    "NUL in an extension": b"5;a\0\r\nhello\r\n",
    "extension over 4 KB": b"5;" + b"a" * 4096 + b"\r\nhello\r\n",
    "data longer than its size": b"5\r\nhello!\r\n",
    "bare LF after the data": b"5\r\nhello\n0\r\n\r\n",
    "bare CR after the data": b"5\r\nhello\r0\r\n\r\n",
    "nothing after the data": b"5\r\nhello0\r\n\r\n",
    "bare LF at the end": b"0\r\n\n",
    "bare CR at the end": b"0\r\n\rx",
    "trailer without a colon": b"0\r\nGET / HTTP/1.1\r\n\r\n",
    "trailer with a space before the colon": b"0\r\nA : b\r\n\r\n",
    "folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "trailer with a bare LF": b"0\r\nA: b\nC: d\r\n\r\n",
    "one trailer over 16 KB": b"0\r\nA: " + b"b" * 16384 + b"\r\n\r\n",
    "trailers over 16 KB": b"0\r\n" + b"A: bcdefgh\r\n" * 1700 + b"\r\n",
}


@pytest.mark.parametrize("raw", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
@pytest.mark.parametrize("step", [1, 3, 1_000_000], ids=["by bytes", "by threes", "in one read"])
def test_chunks_out_of_shape_are_refused_however_cut(raw: bytes, step: int) -> None:
    reader = ChunkedBody()
    with pytest.raises(FramingError, match=r"^expected "):
        for at in range(0, len(raw), step):
            reader.feed(raw[at : at + step])
    assert not reader.is_complete
    with pytest.raises(FramingError, match="after an error"):
        reader.feed_eof()
    with pytest.raises(FramingError, match="after a framing error"):
        reader.feed(b"5\r\nhello\r\n0\r\n\r\n")


def chunked_request() -> BodyReader:
    return body_reader(parse_request_head(request(b"Transfer-Encoding: chunked")))


@pytest.mark.parametrize("line", [b"1\r\n", b"1;a=b\r\n"], ids=["plain", "with an extension"])
def test_a_request_in_tiny_chunks_is_refused_once_they_are_too_many(line: bytes) -> None:
    reader = chunked_request()
    read = (line + b"x\r\n") * 1000
    with pytest.raises(FramingError, match="chunks of 256 bytes or more on average"):
        for _ in range(40):
            assert len(reader.feed(read)) == 1000
    with pytest.raises(FramingError, match="after a framing error"):
        reader.feed(read)


@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 32_000), (256, 80_000)],
    ids=["tiny, but not many", "many, but not tiny"],
)
def test_a_request_in_chunks_of_other_sizes_is_read_to_its_end(size: int, count: int) -> None:
    reader, read = chunked_request(), (b"%x\r\n" % size + b"x" * size + b"\r\n") * 1000
    assert sum(len(reader.feed(read)) for _ in range(count // 1000)) == count
    reader.feed(b"0\r\n\r\n")
    assert reader.is_complete


def test_a_large_chunk_of_a_request_may_come_in_any_reads() -> None:
    reader = chunked_request()
    reader.feed(b"%x\r\n" % 40_000)
    for _ in range(40_000):
        assert reader.feed(b"x") == [b"x"]


def test_an_answer_may_come_in_any_number_of_tiny_chunks() -> None:
    reader = ChunkedBody()
    for _ in range(20):
        assert len(reader.feed(b"1\r\nx\r\n" * 1000)) == 1000


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param(b"hello", id="size not hex"),
        pytest.param(b"5\nhello", id="bare LF after the size"),
        pytest.param(b"5\r\nhelloX", id="no CR LF after the data"),
        pytest.param(b"5\r\nhello\rX", id="bare CR after the data"),
        pytest.param(b"5;" + b"a" * 4096, id="endless extension"),
        pytest.param(b"0\r\nA: " + b"b" * 16384, id="endless trailer"),
        pytest.param(b"0\r\nGET /", id="next request in the place of trailers"),
    ],
)
def test_a_beginning_that_nothing_can_mend_fails_without_waiting_for_its_line(
    beginning: bytes,
) -> None:
    with pytest.raises(FramingError):
        ChunkedBody().feed(beginning)


@pytest.mark.parametrize("step", [1, 1_000_000], ids=["by bytes", "in one read"])
def test_extensions_and_trailers_at_their_largest_pass(step: int) -> None:
    trailer = b"A: " + b"b" * (16384 - 3) + b"\r\n"
    raw = b"5;" + b"a" * 4094 + b"\r\nhello\r\n0\r\n" + trailer + b"\r\n"
    reader = ChunkedBody()
    assert read(reader, *(raw[at : at + step] for at in range(0, len(raw), step))) == b"hello"
    assert reader.is_complete


@pytest.mark.parametrize("size_line_", [b"5", b"005", b"0000005", b"00000000000000005", b"5;a=b"])
def test_a_whole_chunk_is_cut_out_as_the_reader_reads_it(size_line_: bytes) -> None:
    raw = b"ab" + size_line_ + b"\r\nhello\r\n"
    if len(size_line_) > 16:
        with pytest.raises(FramingError):
            ChunkedBody().feed(raw[2:])
        assert whole_chunk(raw, 2) == (0, 0)
        return
    assert ChunkedBody().feed(raw[2:]) == [b"hello"]
    start, end = whole_chunk(raw, 2)
    assert raw[start:end] == (b"" if b";" in size_line_ else b"hello")
    assert [whole_chunk(raw[:size], 2) for size in range(len(raw))] == [(0, 0)] * len(raw)


@pytest.mark.parametrize("size", [9, 10, 15, 16, 0xABC, 0xFFFF, 0x10000, 1_000_000])
def test_a_chunks_size_is_read_in_capitals_too(size: int) -> None:
    for line in (b"%x" % size, b"%X" % size):
        raw = line + b"\r\n" + b"x" * size + b"\r\n"
        assert whole_chunk(raw, 0) == (len(line) + 2, len(line) + 2 + size)
        assert ChunkedBody().feed(raw) == [b"x" * size]


@pytest.mark.parametrize(
    "raw",
    [
        b"0\r\n\r\n",
        b"\r\n\r\n",
        b"",
        b"1\n\nx\r\n",
        b"1\r\nx\r\r",
        b"1\r\nx\n\n",
        b"1\rxx\r\n",
        b"g\r\nx\r\n",
        b"-1\r\n\r\n",
    ],
)
def test_what_is_no_usual_whole_chunk_is_left_to_the_reader(raw: bytes) -> None:
    assert whole_chunk(raw, 0) == (0, 0)


def test_a_body_of_known_length_ends_there() -> None:
    reader = LengthBody(5)
    assert read(reader, b"he", b"") == b"he"
    assert not reader.is_complete
    assert read(reader, b"llo!", b"?") == b"llo"
    assert reader.is_complete and reader.leftover == b"!?"


def test_an_empty_body_and_no_body_are_complete_from_the_start() -> None:
    for reader in (LengthBody(0), NoBody()):
        assert reader.is_complete
        assert reader.feed(b"next") == []
        assert reader.leftover == b"next"
        reader.feed_eof()


def test_a_body_until_eof_is_complete_only_then() -> None:
    reader = UntilEofBody()
    assert read(reader, b"a", b"", b"b") == b"ab"
    assert not reader.is_complete
    reader.feed_eof()
    assert reader.is_complete and reader.leftover == b""


@pytest.mark.parametrize(
    ("raw", "reader"),
    [
        pytest.param(request(), NoBody, id="no framing"),
        pytest.param(request(LENGTH), LengthBody, id="length"),
        pytest.param(request(b"Content-Length: 0"), LengthBody, id="length of nothing"),
        pytest.param(request(CHUNKED), RequestChunks, id="chunked"),
    ],
)
def test_the_reader_of_a_request_body_follows_its_head(raw: bytes, reader: type) -> None:
    assert type(body_reader(parse_request_head(raw))) is reader


EXTENSIONS = VALUES.map(lambda value: b" \t;" + value) | st.just(b"")


CUTS = st.lists(st.integers(min_value=0, max_value=400), max_size=12)


@given(
    chunks=st.lists(st.tuples(st.binary(min_size=1, max_size=60), EXTENSIONS), max_size=8),
    last=EXTENSIONS,
    trailers=HEADERS,
    rest=st.binary(max_size=20),
    cuts=CUTS,
)
def test_any_chunking_and_any_cuts_give_the_payload_and_what_follows(
    chunks: list[tuple[bytes, bytes]],
    last: bytes,
    trailers: Headers,
    rest: bytes,
    cuts: list[int],
) -> None:
    body = b"".join([chunk(payload, extension) for payload, extension in chunks])
    end = b"0" + last + b"\r\n" + b"".join([b"%b:%b\r\n" % pair for pair in trailers]) + b"\r\n"
    reader = ChunkedBody()
    assert read(reader, *cut_at(body + end + rest, cuts)) == b"".join(p for p, _ in chunks)
    assert reader.is_complete
    assert reader.leftover == rest
    reader.feed_eof()


CHUNK_SOUP = st.lists(
    st.sampled_from([b"\r\n", b"\r", b"\n", b"0", b"5", b"a", b";", b":", b" ", b"\0", b"hello"])
).map(b"".join)


@given(raw=st.binary(max_size=200) | CHUNK_SOUP, cuts=CUTS)
@example(raw=b"5\r\nhello\r\n0\r\n\r\n", cuts=[])
def test_any_bytes_are_judged_alike_however_cut(raw: bytes, cuts: list[int]) -> None:
    def outcome(reads: list[bytes]) -> tuple[bytes, bytes] | None:
        reader = ChunkedBody()
        try:
            payload = read(reader, *reads)
            reader.feed_eof()
        except FramingError:
            return None
        return payload, reader.leftover

    assert outcome([raw]) == outcome(cut_at(raw, cuts)) == outcome(cut_at(raw, range(len(raw))))

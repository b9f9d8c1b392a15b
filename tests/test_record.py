"""Records: which fields they have, and what counts as a failure."""

from __future__ import annotations

import pytest

from hoberproxy.record import CLIENT_CLOSED, COLUMNS, Record


@pytest.mark.parametrize(
    ("status", "code", "failed"),
    [
        pytest.param(200, "", False, id="a finished request is none"),
        pytest.param(200, "upstream_error", True, id="a stream that broke after its 200 is one"),
        pytest.param(404, "model_not_found", True, id="a refusal is one"),
        pytest.param(CLIENT_CLOSED, "client_closed", False, id="a client that left is none"),
        pytest.param(0, "", True, id="a request without an outcome is one"),
    ],
)
def test_a_failure_is_what_failed_the_client(status: int, code: str, failed: bool) -> None:
    assert Record(id="r", started=0.0, status=status, code=code).is_failure is failed


def test_a_record_has_a_value_in_every_field_from_the_beginning() -> None:
    record = Record("a", 1.0)
    assert [record.id, record.started] == [getattr(record, name) for name in COLUMNS[:2]]
    assert not any(getattr(record, name) for name in COLUMNS[2:])


def test_a_field_that_no_record_has_is_refused() -> None:
    with pytest.raises(TypeError, match="got prompt"):
        Record("a", 0.0, prompt="secret")


def test_records_are_equal_if_all_that_is_stored_is() -> None:
    one, other = Record("a", 0.0, cost=3), Record("a", 0.0, cost=3)
    other.is_sealed = True
    assert one == other
    other.overhead = 0.1
    assert one != other

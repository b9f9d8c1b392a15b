"""The loader of keys on a real file: what changes in the store is in force soon after."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hoberproxy.access.keys import Keyring
from hoberproxy.accounting.record import Row
from hoberproxy.errors import AccessError
from hoberproxy.storage.sqlite_records import SqliteStore as Store
from hoberproxy.storage.store import StoreError
from tests.support.patience import wait_until
from tests.support.recording import Process, record
from tests.support.stores import write_records


def authenticates(keyring: Keyring, key: str) -> bool:
    try:
        keyring.authenticate(b"Bearer " + key.encode(), time.time())
    except AccessError:
        return False
    return True


def test_the_keys_are_known_as_soon_as_it_has_started(
    make: Callable[..., Process], path: Path
) -> None:
    store = Store(path)
    key, _ = store.create_key("x")
    store.close()
    keyring = Keyring()
    make(keyring).start()
    assert authenticates(keyring, key)


def test_keys_made_and_revoked_elsewhere_take_effect(
    make: Callable[..., Process], path: Path
) -> None:
    keyring = Keyring()
    make(keyring).start()
    store = Store(path)
    key, row = store.create_key("x")
    wait_until(lambda: authenticates(keyring, key))
    store.revoke_key(row.key_id)
    wait_until(lambda: not authenticates(keyring, key))
    store.close()


def test_keys_are_reloaded_while_records_cannot_be_written(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store, *batch: list[Row]) -> int:
        raise StoreError("the disk is full", is_transient=True)

    monkeypatch.setattr(Store, "write", refuse)
    keyring = Keyring()
    process = make(keyring)
    process.start()
    process.put(record(1))
    store = Store(path)
    key, _ = store.create_key("x")
    store.close()
    wait_until(lambda: authenticates(keyring, key))
    assert process.depth == 1
    process.close(0.01)


def test_records_of_another_process_are_no_reason_to_load_keys(
    make: Callable[..., Process], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    looks: list[int] = []
    load, look = Store.load_keys, Store.keys_version
    monkeypatch.setattr(Store, "load_keys", lambda store, _: loads.append(1) or load(store))
    monkeypatch.setattr(Store, "keys_version", lambda store: looks.append(1) or look(store))
    make().start()
    store = Store(path)
    for number in range(3):
        seen = len(looks)
        write_records(store, [record(number)])
        wait_until(lambda seen=seen: len(looks) > seen)
    store.close()
    time.sleep(0.05)  # several turns more
    assert len(loads) == 1
    assert len(looks) == 1 + 3  # and without a write there is not even a look


def test_keys_stay_in_force_while_they_cannot_be_reloaded(
    make: Callable[..., Process],
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store(path)
    key, _ = store.create_key("x")
    keyring = Keyring()
    make(keyring).start()
    with monkeypatch.context() as patch:

        def fail(store: Store) -> int:
            raise StoreError("cannot read: disk I/O error", is_transient=True)

        patch.setattr(Store, "data_version", fail)
        wait_until(lambda: "keys cannot be reloaded" in caplog.text)
        time.sleep(0.05)  # several turns more
        assert authenticates(keyring, key)
    assert caplog.text.count("keys cannot be reloaded") == 1
    other, _ = store.create_key("y")
    wait_until(lambda: authenticates(keyring, other))
    store.close()

"""The tables of the store, as the steps that lead from any earlier version to this one."""

from __future__ import annotations

# One tuple of statements for each version; a released one is never edited, a new one is added.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE keys (
            id TEXT PRIMARY KEY,
            digest BLOB NOT NULL UNIQUE,
            label TEXT NOT NULL,
            kind TEXT NOT NULL,
            hint TEXT NOT NULL,
            created REAL NOT NULL,
            expires REAL,
            revoked REAL
        )""",
        # Counted by triggers, so that a change made by hand with the sqlite3 shell counts too.
        "CREATE TABLE keys_version (version INTEGER NOT NULL)",
        "INSERT INTO keys_version VALUES (0)",
        *(
            f"CREATE TRIGGER keys_{event.lower()} AFTER {event} ON keys "
            "BEGIN UPDATE keys_version SET version = version + 1; END"
            for event in ("INSERT", "UPDATE", "DELETE")
        ),
        """CREATE TABLE records (
            id TEXT PRIMARY KEY,
            started REAL NOT NULL,
            key_id TEXT NOT NULL,
            key_label TEXT NOT NULL,
            path TEXT NOT NULL,
            requested TEXT NOT NULL,
            slug TEXT NOT NULL,
            provider TEXT NOT NULL,
            upstream_model TEXT NOT NULL,
            upstream_id TEXT NOT NULL,
            client_request_id TEXT NOT NULL,
            streamed INTEGER NOT NULL,
            status INTEGER NOT NULL,
            code TEXT NOT NULL,
            phase TEXT NOT NULL,
            finish_reason TEXT NOT NULL,
            attempts INTEGER NOT NULL,
            failures TEXT NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            has_usage INTEGER NOT NULL,
            estimated INTEGER NOT NULL,
            events INTEGER NOT NULL,
            bytes_out INTEGER NOT NULL,
            first_content REAL,
            total REAL NOT NULL
        )""",
        # The only second index: one on a random value costs a record three times as much again.
        "CREATE INDEX records_started ON records (started)",
    ),
    (
        # Limits of keys. Money is in picodollars (1e-12 USD): whole numbers add up exactly.
        "ALTER TABLE keys ADD COLUMN requests_per_minute INTEGER",
        "ALTER TABLE keys ADD COLUMN tokens_per_minute INTEGER",
        "ALTER TABLE keys ADD COLUMN requests_per_day INTEGER",
        "ALTER TABLE keys ADD COLUMN concurrency INTEGER",
        "ALTER TABLE keys ADD COLUMN budget INTEGER",
        "ALTER TABLE keys ADD COLUMN budget_period TEXT NOT NULL DEFAULT 'total'",
        "ALTER TABLE keys ADD COLUMN models TEXT NOT NULL DEFAULT '[]'",
        # The key before the last rotation, and until when it works.
        "ALTER TABLE keys ADD COLUMN old_digest BLOB",
        "ALTER TABLE keys ADD COLUMN old_until REAL",
        # Apart from the keys, whose every change makes all processes read them again.
        "CREATE TABLE key_uses (key_id TEXT PRIMARY KEY, last_used REAL NOT NULL)",
        # What a request cost, by which prices, and the proxy's own part of its time.
        "ALTER TABLE records ADD COLUMN price TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE records ADD COLUMN cost INTEGER",
        "ALTER TABLE records ADD COLUMN overhead REAL NOT NULL DEFAULT 0",
        # Sums of whole days (UTC), kept when the records go.
        """CREATE TABLE days (
            day INTEGER NOT NULL,
            key_id TEXT NOT NULL,
            key_label TEXT NOT NULL,
            slug TEXT NOT NULL,
            provider TEXT NOT NULL,
            status TEXT NOT NULL,
            requests INTEGER NOT NULL,
            tried INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            estimated_tokens INTEGER NOT NULL,
            cost INTEGER NOT NULL,
            unpriced INTEGER NOT NULL,
            first_content_sum REAL NOT NULL,
            first_content_count INTEGER NOT NULL,
            PRIMARY KEY (day, key_id, slug, provider, status)
        ) WITHOUT ROWID""",
        # Days before `until` are in `days`, and are read from there alone; those before `deleted`
        # have lost records.
        "CREATE TABLE summed (until INTEGER NOT NULL, deleted INTEGER NOT NULL)",
        "INSERT INTO summed VALUES (0, 0)",
    ),
    (
        # The part of the prompt that was written to the provider's cache, which some charge extra.
        *(
            f"ALTER TABLE {table} ADD COLUMN cache_write_tokens INTEGER NOT NULL DEFAULT 0"
            for table in ("records", "days")
        ),
    ),
)

"""The tables of a store and the statements on them, each inside a transaction."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from sqlite3 import Connection
from typing import NamedTuple

import numpy as np

# Raise by one whenever a store written before could not be read rightly: another
# table, column, checksum or place of a file. It is part of the folder's name, so
# that two versions of the package share a folder and ignore each other's rows.
FORMAT_VERSION = 1
# Payloads stand apart from the index: noting a row's last use would otherwise
# write its payload again.
SCHEMA = """
    CREATE TABLE rows (
        id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, kind TEXT NOT NULL,
        dtype TEXT NOT NULL, shape TEXT NOT NULL, checksum BLOB NOT NULL,
        nbytes INTEGER NOT NULL, segment TEXT, start INTEGER, used REAL NOT NULL
    );
    CREATE TABLE payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
    CREATE TABLE claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
    INSERT INTO counters VALUES ('hits', 0), ('misses', 0), ('bytes', 0)
"""
# How numpy writes the dtypes of numbers.
NUMBERS = re.compile(r"[<>|][biufc][0-9]{1,2}")
KINDS = ("row", "prefix")
# Keys in one statement.
PART = 500


class CacheInfo(NamedTuple):
    """What a store holds, and how often it was of use.

    ``rows`` and ``bytes`` count feature rows, ``prefix_rows`` and
    ``prefix_bytes`` activations kept for training. ``hits`` are rows that were
    found, ``misses`` rows that had to be computed, since the store was emptied.
    """

    rows: int
    bytes: int
    hits: int
    misses: int
    prefix_rows: int
    prefix_bytes: int


class Record(NamedTuple):
    """One row as it is written: its payload here, or its place in a segment."""

    key: bytes
    kind: str
    dtype: str
    shape: str
    checksum: bytes
    nbytes: int
    segment: str | None
    start: int | None
    payload: bytes | None

    @classmethod
    def of(cls, key: bytes, kind: str, row: np.ndarray, place=None) -> Record:
        """The record of an array; ``place`` is (segment, start) if it has one."""
        dtype, shape = row.dtype.str, ",".join(map(str, row.shape))
        segment, start = place or (None, None)
        payload = None if place else row.tobytes()
        return cls(
            key,
            kind,
            dtype,
            shape,
            checksum(key, dtype, shape, as_bytes(row) if place else payload),
            row.nbytes,
            segment,
            start,
            payload,
        )


def as_bytes(row: np.ndarray) -> np.ndarray:
    """The same memory, uint8 and flat."""
    return row.reshape(-1).view(np.uint8)


def checksum(key: bytes, dtype: str, shape: str, payload) -> bytes:
    """16 bytes that bind the payload to its key, dtype and shape."""
    state = hashlib.blake2b(f"{dtype} {shape} ".encode(), digest_size=16, key=key)
    state.update(payload)
    return state.digest()


def array_of(key: bytes, dtype: str, shape: str, expected: bytes, payload):
    """The array a record describes, read-only; None if anything is wrong with it."""
    try:
        if payload is None or checksum(key, dtype, shape, payload) != expected:
            return None
        sizes = tuple(int(size) for size in shape.split(",") if size)
        # Whoever made the file may have made its checksums too, and bytes taken
        # for objects ("|O") are addresses that numpy would follow.
        if not NUMBERS.fullmatch(dtype):
            return None
        return np.ndarray(sizes, np.dtype(dtype), buffer=payload)
    except (TypeError, ValueError, AttributeError):  # a garbled record
        return None


def find(connection: Connection, keys: Sequence[bytes]) -> Iterator[tuple]:
    """Stored records: key, dtype, shape, checksum, nbytes, segment, start, payload,
    id, time of last use and kind."""
    for part in parts(keys):
        yield from connection.execute(
            "SELECT key, dtype, shape, checksum, nbytes, segment, start, payload,"
            " id, used, kind FROM rows LEFT JOIN payloads USING (id)"
            f" WHERE key IN ({_marks(part)})",
            part,
        )


def note_used(connection: Connection, ids: Sequence[int], now: float) -> None:
    for part in parts(ids):
        connection.execute(
            f"UPDATE rows SET used = ? WHERE id IN ({_marks(part)})", (now, *part)
        )


def insert(connection: Connection, records: Sequence[Record], now: float) -> None:
    """Add the rows that are not there yet."""
    added = 0
    for record in records:
        *columns, payload = record
        cursor = connection.execute(
            "INSERT OR IGNORE INTO rows (key, kind, dtype, shape, checksum, nbytes,"
            f" segment, start, used) VALUES (?, ?, ?, ?, ?, ?, ?, ?, {now!r})",
            columns,
        )
        if cursor.rowcount and payload is not None:
            connection.execute(
                "INSERT OR REPLACE INTO payloads VALUES (?, ?)",
                (cursor.lastrowid, payload),
            )
        added += cursor.rowcount * record.nbytes
    count(connection, bytes=added)


def delete(connection: Connection, ids: Sequence[int]) -> None:
    for part in parts(ids):
        marks = _marks(part)
        (freed,) = connection.execute(
            f"SELECT SUM(nbytes) FROM rows WHERE id IN ({marks})", part
        ).fetchone()
        connection.execute(f"DELETE FROM rows WHERE id IN ({marks})", part)
        connection.execute(f"DELETE FROM payloads WHERE id IN ({marks})", part)
        count(connection, bytes=-(freed or 0))


def evict(
    connection: Connection, excess: float, drop_segment: Callable[[str], None]
) -> float:
    """Drop at least ``excess`` bytes of what was not used for longest.

    Gives the time at which the most recent of them was used.

    Small rows go one by one. A segment goes as a whole, and is as recent as the
    row in it that was used last.
    """
    ids: list[int] = []
    candidates = connection.execute(
        "SELECT id, NULL, nbytes, used FROM rows WHERE segment IS NULL"
        " UNION ALL SELECT MAX(id), segment, SUM(nbytes), MAX(used) FROM rows"
        " WHERE segment IS NOT NULL GROUP BY segment ORDER BY used, id"
    )
    segments = []
    last_used = float("-inf")
    for row_id, segment, nbytes, used in candidates:
        if excess <= 0:
            break
        excess -= nbytes
        last_used = used
        if segment is None:
            ids.append(row_id)
        else:
            segments.append(segment)
    for segment in segments:
        inside = connection.execute("SELECT id FROM rows WHERE segment = ?", (segment,))
        ids += [row_id for (row_id,) in inside]
        # Before the commit: a writer asks for its file in its own transaction.
        drop_segment(segment)
    delete(connection, ids)
    return last_used


def stored(connection: Connection, keys: Sequence[bytes]) -> set[bytes]:
    return {
        key
        for part in parts(keys)
        for (key,) in connection.execute(
            f"SELECT key FROM rows WHERE key IN ({_marks(part)})", part
        )
    }


def sizes(connection: Connection, keys: Sequence[bytes], kind: str) -> dict[bytes, int]:
    """Bytes of each stored row."""
    found: dict[bytes, int] = {}
    for part in parts(keys):
        found.update(
            connection.execute(
                f"SELECT key, nbytes FROM rows WHERE key IN ({_marks(part)})"
                " AND kind = ?",
                (*part, kind),
            )
        )
    return found


def claims(connection: Connection, keys: Sequence[bytes]) -> dict[bytes, str]:
    """Owner of each claimed key, dead ones too."""
    owners: dict[bytes, str] = {}
    for part in parts(keys):
        owners.update(
            connection.execute(
                f"SELECT key, owner FROM claims WHERE key IN ({_marks(part)})", part
            )
        )
    return owners


def set_claims(connection: Connection, keys: Iterable[bytes], owner: str) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO claims VALUES (?, ?)", [(key, owner) for key in keys]
    )


def drop_claims(connection: Connection, keys: Iterable[bytes], owner: str) -> None:
    connection.executemany(
        "DELETE FROM claims WHERE key = ? AND owner = ?", [(key, owner) for key in keys]
    )


def drop_all_claims(connection: Connection, keys: Iterable[bytes]) -> None:
    """Whosever they are: the rows are there now."""
    connection.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in keys])


def drop_dead_claims(connection: Connection, alive: Callable[[str], bool]) -> None:
    owners = connection.execute("SELECT DISTINCT owner FROM claims").fetchall()
    dead = [(owner,) for (owner,) in owners if not alive(owner)]
    connection.executemany("DELETE FROM claims WHERE owner = ?", dead)


def segments(connection: Connection) -> set[str]:
    """Names of the segment files that hold rows."""
    return {name for (name,) in connection.execute("SELECT DISTINCT segment FROM rows")}


def count(connection: Connection, **amounts: int) -> None:
    """Add to counters: hits, misses, bytes."""
    connection.executemany(
        "UPDATE counters SET value = value + ? WHERE name = ?",
        [(amount, name) for name, amount in amounts.items() if amount],
    )


def held_bytes(connection: Connection, *, recount: bool = False) -> int:
    """Bytes of all payloads, from the counter, which ``recount`` sets right."""
    if recount:
        connection.execute(
            "UPDATE counters SET value = (SELECT COALESCE(SUM(nbytes), 0) FROM rows)"
            " WHERE name = 'bytes'"
        )
    return connection.execute(
        "SELECT value FROM counters WHERE name = 'bytes'"
    ).fetchone()[0]


def info(connection: Connection) -> CacheInfo:
    counters = dict(connection.execute("SELECT name, value FROM counters"))
    held = {
        is_prefix: (rows, nbytes)
        for is_prefix, rows, nbytes in connection.execute(
            "SELECT kind = 'prefix', COUNT(*), SUM(nbytes) FROM rows GROUP BY 1"
        )
    }
    rows, prefixes = held.get(0, (0, 0)), held.get(1, (0, 0))
    return CacheInfo(*rows, counters["hits"], counters["misses"], *prefixes)


def clear(connection: Connection) -> None:
    """Drop rows and counts, but no claim."""
    connection.execute("DELETE FROM rows")
    connection.execute("DELETE FROM payloads")
    connection.execute("UPDATE counters SET value = 0")


def parts(items: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(items), PART):
        yield items[start : start + PART]


def _marks(items: Sequence) -> str:
    return ",".join("?" * len(items))

"""One place for keys, claims, budget and checksums of everything that is stored.

    keys.py       what makes two rows the same row
    session.py    which folder; what users ask about it
    rows.py       the store itself: look up, claim, put, evict
    index.py      the tables and the statements on them
    segments.py   large payloads, in append-only files
    database.py   the SQLite index: connections, forks, damage
    claims.py     who computes a row: a process, and a call of it
    notices.py    what users are told
    owners.py     which processes are alive

The arrows point down this list. Nothing here imports torch.
"""

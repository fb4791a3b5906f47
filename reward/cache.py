# SPDX-License-Identifier: Apache-2.0
"""Verdicts that need no second verification: in memory, and in a file if one is named."""

import logging
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from hashlib import blake2b

from reward.types import Status, Verdict

_logger = logging.getLogger(__name__)

NOT_STORED: frozenset[Status] = frozenset({"timeout", "crash", "oom", "unavailable"})
"""How a verification ends by the state of the machine; the next one may end otherwise."""

_SCHEMA_VERSION = 1
_APPLICATION_ID = 0x76657264  # "verd": tells our files from another program's
_WAIT_SECONDS = 30.0
_COLUMNS = ["key", "score", "status", "extracted", "detail", "seconds"]
_CREATE = (
    "CREATE TABLE verdicts (key BLOB PRIMARY KEY, score REAL, status TEXT NOT NULL, "
    "extracted TEXT, detail TEXT NOT NULL, seconds REAL NOT NULL) WITHOUT ROWID"
)


class VerdictCache:
    """The verdicts used last, up to a number, and all of them in a file if asked.

    A key is a tuple of texts that settle the verdict: name, version and options of the verifier,
    gold and extracted answer. Timeouts, crashes and other accidents are never kept, so that one
    slow moment does not make an answer wrong for the rest of a run.

    Threads may share a cache, and processes a file, which keeps keys as 128-bit digests. The file
    only grows; `clear` empties it. Text that cannot be stored there (a lone surrogate) stays in
    memory, and if the file fails later on (a full disk), a warning is logged and the cache goes on
    in memory. A pickled cache travels empty, with its size and path.

    Args:
        size: Number of verdicts kept in memory; the one used longest ago leaves first.
        path: SQLite file to read from and add to; made if it does not exist.

    Attributes:
        hits: Number of `get` that found a verdict.
        misses: Number of `get` that found none.

    Raises:
        ValueError: The size is not positive, or the file is damaged or not a cache of verdicts.
        OSError: The file cannot be opened.

    Example:
        >>> cache = VerdictCache(size=2)
        >>> cache.put(("exact", "24", "24.0"), Verdict(1.0, "correct", "24.0"))
        >>> cache.get(("exact", "24", "24.0")).score, cache.get(("exact", "24", "42"))
        (1.0, None)
        >>> cache.hits, cache.misses
        (1, 1)
    """

    def __init__(self, size: int = 100_000, path: str | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}; make no cache to keep nothing")
        self.size = size
        self.hits = 0
        self.misses = 0
        self._path = path
        self._kept: OrderedDict[tuple[str, ...], Verdict] = OrderedDict()
        self._file = None if path is None else _File(path)
        self._pid = os.getpid()
        self._own_lock = threading.Lock()

    def get(self, key: tuple[str, ...]) -> Verdict | None:
        """Return the verdict kept for a key, its seconds those of the first time, or `None`."""
        with self._lock():
            verdict = self._kept.get(key)
            if verdict is None and self._file is not None:
                verdict = self._file.get(key)
                self._drop_failed()
            if verdict is None:
                self.misses += 1
                return None
            self.hits += 1
            self._keep(key, verdict)
        return verdict

    def put(self, key: tuple[str, ...], verdict: Verdict) -> None:
        """Keep a verdict, unless its status is one of `NOT_STORED`."""
        if verdict.status in NOT_STORED:
            return
        with self._lock():
            self._keep(key, verdict)
            if self._file is not None:
                self._file.put(key, verdict)
                self._drop_failed()

    def clear(self) -> None:
        """Forget every verdict, those in the file too, and count from zero."""
        with self._lock():
            self._kept.clear()
            self.hits = self.misses = 0
            if self._file is not None:
                self._file.clear()
                self._drop_failed()

    def close(self) -> None:
        """Close the file; the cache goes on in memory."""
        with self._lock():
            if self._file is not None:
                self._file.close()
                self._file = None

    def __len__(self) -> int:
        """Number of verdicts in memory."""
        return len(self._kept)

    def __reduce__(self) -> tuple[type["VerdictCache"], tuple[int, str | None]]:
        return VerdictCache, (self.size, self._path)

    def _lock(self) -> threading.Lock:
        """Return the lock; in a forked process a new one, as the old may be held for ever."""
        if self._pid != os.getpid():
            self._pid, self._own_lock = os.getpid(), threading.Lock()
            # SQLite forbids to use, or even to close, a connection on the other side of a fork.
            self._file = None if self._file is None else self._file.reopened()
        return self._own_lock

    def _drop_failed(self) -> None:
        if self._file is not None and self._file.failure:
            _logger.warning(
                "the cache file %s failed (%s); verdicts are kept in memory only from here on",
                self._path,
                self._file.failure,
            )
            self._file.close()
            self._file = None

    def _keep(self, key: tuple[str, ...], verdict: Verdict) -> None:
        self._kept[key] = verdict
        self._kept.move_to_end(key)
        if len(self._kept) > self.size:
            self._kept.popitem(last=False)


class _File:
    """The SQLite side: opened with suspicion, and never a reason to stop a run after that."""

    def __init__(self, path: str) -> None:
        self.failure = ""
        self._path = path
        self._pid = os.getpid()
        try:
            self._connection = sqlite3.connect(
                path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except sqlite3.OperationalError as error:
            raise OSError(
                f"got the cache file {path}, which does not open ({error}); need a file that can "
                "be written, in a directory that exists: name another one"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"got the cache file {path}, which is damaged or no SQLite file ({error}); need "
                "one made by this class: delete it, or name another path"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_connection") and self._pid == os.getpid():
            self._connection.close()

    def get(self, key: tuple[str, ...]) -> Verdict | None:
        """Return what the file holds for a key."""
        row = self._run("SELECT * FROM verdicts WHERE key = ?", (_digest(key),))
        try:
            return None if row is None else Verdict(*row[1:])
        except (TypeError, ValueError):  # written by other hands
            return None

    def put(self, key: tuple[str, ...], verdict: Verdict) -> None:
        """Write a verdict; the last one stays."""
        row = (_digest(key), *(getattr(verdict, column) for column in _COLUMNS[1:]))
        self._run("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", row)

    def clear(self) -> None:
        """Delete every row."""
        self._run("DELETE FROM verdicts", ())

    def reopened(self) -> "_File | None":
        """Open the file again in a forked process."""
        _inherited.append(self._connection)
        try:
            return _File(self._path)
        except (OSError, ValueError) as error:
            _logger.warning("%s; verdicts are kept in memory only in this process", error)
            return None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _run(self, statement: str, values: tuple[object, ...]) -> tuple | None:
        try:
            return self._connection.execute(statement, values).fetchone()
        except UnicodeEncodeError:  # a lone surrogate; SQLite takes UTF-8 alone
            return None
        except sqlite3.Error as error:
            self.failure = str(error)
            return None

    def _prepare(self) -> None:
        """Make the table, or make sure that it is ours and whole; touch no other file."""
        execute = self._connection.execute
        execute("BEGIN")
        if self._is_empty():
            execute("COMMIT")
            execute("BEGIN IMMEDIATE")  # of several processes that start together one makes it
            if self._is_empty():
                execute(_CREATE)
                execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        mark = execute("PRAGMA application_id").fetchone()[0]
        version = execute("PRAGMA user_version").fetchone()[0]
        columns = [row[1] for row in execute("PRAGMA table_info(verdicts)")]
        execute("COMMIT")
        if (mark, version, columns) != (_APPLICATION_ID, _SCHEMA_VERSION, _COLUMNS):
            raise ValueError(
                f"got the cache file {self._path}, which another program or version made (mark "
                f"{mark}, version {version}, columns {columns}); need version {_SCHEMA_VERSION} of "
                "this class: name another path"
            )
        damage = execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        self._share()

    def _is_empty(self) -> bool:
        return not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]

    def _share(self) -> None:
        """Turn on the write-ahead log, in which readers do not wait for a writer."""
        until = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                return
            except sqlite3.OperationalError:  # this one does not wait for the lock by itself
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)


_inherited: list[sqlite3.Connection] = []
"""Connections of the process this one was forked from, kept so that nothing closes them."""


def _digest(key: tuple[str, ...]) -> bytes:
    parts = [part.encode(errors="surrogatepass") for part in key]
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return blake2b(text, digest_size=16).digest()

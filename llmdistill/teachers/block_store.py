"""Score blocks on disk, as they travel: for later epochs, runs and machines.

A store is a folder::

    info.json              the teacher: every field of TeacherInfo, and "evidence": "hidden" where these are its states
    head.safetensors       then, its output head
    shard-00000.blocks     records one after another: magic, key, length, CRC-32 of these, the encoded block
    shard-00000.index      where they lie, so that opening a store does not read it; only a help, may be lost

Every process that writes has shards of its own, and only ever appends, the record before its index entry. One killed at
any moment therefore leaves whole records and at most one that is cut off, at the end of a shard nobody will append to
again: it is passed over. Everything that is read is checked: the record by its CRC, the block by its own. What the
kernel has survives the process; a full shard, and the last one on ``close``, is synced to survive the machine.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from llmdistill.errors import UserError
from llmdistill.files import atomic_write, full_disk_is_said, read_json, sync
from llmdistill.teachers.base import TeacherInfo
from llmdistill.wire.blocks import BlockError, ScoreBlock
from llmdistill.wire.hidden import HiddenBlock, decode_any

KEY_BYTES = 16
Kind = Literal["logprobs", "hidden"]  # of the blocks in a store: all are of one
_HEAD = struct.Struct("<4s16sQI")  # magic, key, bytes of the block, CRC-32 of the three
_ENTRY = struct.Struct("<16sQQI")  # key, offset of the record, bytes of the block, CRC-32 of the three
_CRC_BYTES = 4
_MAGIC = b"LDSR"
_VOID = bytes(KEY_BYTES)  # key of an index entry that covers damaged bytes
_UNLIMITED = 1 << 62  # blocks of a store were written here, and are as long as their record says


class _Place(NamedTuple):
    shard: int
    offset: int
    length: int  # of the block, without the record's head


@dataclass
class _Seen:
    """Bytes that have been read of a shard and of its index."""

    blocks: int = 0
    index: int = 0


@dataclass
class _Shard:
    """The shard this process appends to."""

    pid: int
    number: int
    blocks: int  # file descriptors
    index: int
    size: int = 0

    def close(self) -> None:
        os.close(self.blocks)
        os.close(self.index)


class BlockStore:
    """Encoded score blocks under 16-byte keys; of several under one key the longest counts.

    Any number of processes, and their threads, may read and write at the same time. What others append is found by
    :meth:`refresh`.

    Args:
        folder: made when it is claimed or appended to.
        shard_bytes: a shard of this size is not appended to.
        skip_damaged: warn of bytes that are no record where no index tells what lies there, and go on behind them.

    Raises:
        UserError: there are such bytes, and they are not skipped.
    """

    def __init__(self, folder: str | Path, *, shard_bytes: int = 1 << 30, skip_damaged: bool = False) -> None:
        self.folder, self.skip_damaged = Path(folder), skip_damaged
        self.shard_bytes = shard_bytes
        self._places: dict[bytes, _Place] = {}
        self._shorter: dict[bytes, list[_Place]] = {}  # of keys that were written more than once: the others
        self._seen: dict[int, _Seen] = {}
        self._shard: _Shard | None = None
        self._lock = threading.RLock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[bytes]:
        """The keys."""
        return iter(list(self._places))

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> ScoreBlock | None:
        """The block of log-probs under ``key``, or None.

        Raises:
            UserError: it is damaged, or its file is gone; the message names file and byte. Or it holds hidden states.
        """
        found = self._read(key)
        if isinstance(found, HiddenBlock):
            raise self._other_kind("hidden states", "log-probs")
        return found

    def states(self, key: bytes) -> HiddenBlock | None:
        """As :meth:`get`, of hidden states."""
        found = self._read(key)
        if isinstance(found, ScoreBlock):
            raise self._other_kind("log-probs", "hidden states")
        return found

    def _other_kind(self, found: str, needed: str) -> UserError:
        return UserError(
            f"{self.folder} holds a block of {found} where {needed} are needed; a store holds blocks of one kind. Fix: "
            "another folder for this kind of evidence, or leave out the shards that are another store's."
        )

    def _read(self, key: bytes) -> ScoreBlock | HiddenBlock | None:
        place = self._places.get(key)
        if place is None:
            return None
        file = _file(self.folder, place.shard)
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError as error:
            with self._lock:
                if self._shard is not None and self._shard.number == place.shard:
                    self._shard.close()  # what is appended to it would be gone too
                    self._shard = None
            raise UserError(f"{file} is gone, and with it blocks of this store. Fix: put it back.") from error
        try:
            record = os.pread(descriptor, _HEAD.size + place.length, place.offset)
        finally:
            os.close(descriptor)
        try:
            if _read_head(record) != (key, place.length):
                raise BlockError("its head is not the one that was written")
            return decode_any(memoryview(record)[_HEAD.size :], max_positions=_UNLIMITED, max_bytes=_UNLIMITED)
        except BlockError as error:
            raise _damaged(file, place.offset, error) from error

    def forget(self, key: bytes) -> None:
        """Leaves out the block that :meth:`get` finds damaged. Another one under its key, if there is one, counts."""
        with self._lock:
            self._places.pop(key, None)
            if rest := self._shorter.get(key):
                self._places[key] = rest.pop()

    def append(self, key: bytes, data: bytes) -> None:
        """Writes an encoded block. When this returns it survives the process.

        Raises:
            UserError: the disk is full. What was there stays readable, and later calls use another shard.
            OSError: whatever else the file system says; likewise.
        """
        head = _sealed(_HEAD, _MAGIC, key, len(data))
        with self._lock:
            shard = self._writable()
            place = _Place(shard.number, shard.size, len(data))
            try:
                with full_disk_is_said(_file(self.folder, shard.number)):
                    _write(shard.blocks, head + data)
                    _write(shard.index, _sealed(_ENTRY, key, place.offset, place.length))
            except (OSError, UserError):
                self._shard = None  # nothing may follow a record that was cut off
                shard.close()
                raise
            shard.size += len(head) + len(data)
            seen = self._seen.setdefault(shard.number, _Seen())
            seen.blocks, seen.index = shard.size, seen.index + _ENTRY.size
            self._add(key, place)

    def refresh(self) -> int:
        """Finds what others have appended since: how many blocks."""
        with self._lock:
            found = 0
            for number in _numbers(self.folder):
                seen = self._seen.setdefault(number, _Seen())
                size = _file(self.folder, number).stat().st_size
                if size == seen.blocks:
                    continue
                for read in (self._indexed, self._scanned):
                    for key, place in read(number, seen, size):
                        self._add(key, place)
                        found += 1
            return found

    def info(self) -> TeacherInfo | None:
        """Whose evidence this is; None where nobody has claimed it.

        Raises:
            UserError: info.json is there and cannot be read.
        """
        file = self.folder / "info.json"
        content = read_json(file, "put the file back, or open the store once with its teacher behind it")
        if content is None:
            return None
        try:
            known = {field.name: content[field.name] for field in fields(TeacherInfo)}
            return TeacherInfo(**known | {"eos_ids": tuple(content["eos_ids"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} is no description of a teacher ({error!r}). Fix: put the file back.") from error

    def kind(self) -> Kind:
        """Of the blocks in it, as it was claimed for."""
        content = read_json(self.folder / "info.json", "put the file back") or {}
        return "hidden" if content.get("evidence") == "hidden" else "logprobs"

    def check_kind(self, kind: Kind) -> None:
        """Raises UserError where it was claimed for blocks of the other kind."""
        if (self.folder / "info.json").exists() and (found := self.kind()) != kind:
            words = {"hidden": "hidden states", "logprobs": "log-probs"}
            hint = "set teacher.hidden" if found == "hidden" else "leave teacher.hidden out"
            raise UserError(
                f"{self.folder} holds {words[found]} of a teacher, and {words[kind]} are asked of it; a store holds "
                f"blocks of one kind. Fix: {hint}, or another folder."
            )

    def claim(self, info: TeacherInfo, kind: Kind = "logprobs") -> TeacherInfo:
        """Says whose blocks will be appended, and of which kind, for good. Returns what the store says from then on.

        Of several that claim an empty store at one time the first wins. An info.json that was damaged is written anew
        where the blocks are this teacher's.

        Raises:
            UserError: it holds another teacher's, or of another vocabulary, or blocks of another kind.
        """
        content = json.dumps(asdict(info) | ({"evidence": "hidden"} if kind == "hidden" else {}), indent=1)
        try:
            found = self.info()
        except UserError as damaged:
            if not self._all_of(info):
                raise
            warnings.warn(f"{damaged} Its blocks are this teacher's, so it is written anew.", stacklevel=2)
            atomic_write(self.folder / "info.json", content)
            found = info
        if found is None:
            atomic_write(self.folder / "info.json", content, exclusive=True)
            found = self.info() or info
        self.check_kind(kind)
        if (found.fingerprint, found.tokenizer) != (info.fingerprint, info.tokenizer):
            raise UserError(
                f"{self.folder} holds evidence of teacher {found.name!r} (weights {found.fingerprint}, tokenizer "
                f"{found.tokenizer}); this is {info.name!r} (weights {info.fingerprint}, tokenizer {info.tokenizer}). "
                "Fix: another folder for this teacher."
            )
        return found

    def close(self) -> None:
        """Syncs what this process has appended. Appending again opens another shard."""
        with self._lock:
            shard, self._shard = self._shard, None
            if shard is not None:
                os.fsync(shard.blocks)
                os.fsync(shard.index)
                shard.close()
                sync(self.folder)

    def _all_of(self, info: TeacherInfo) -> bool:
        """Whether the newest block of every shard, as far as it can be read, is of that teacher and vocabulary."""
        newest = {place.shard: key for key, place in sorted(self._places.items(), key=lambda item: item[1].offset)}
        headers = list[tuple[str, str]]()
        for key in newest.values():
            with suppress(UserError):
                block = self._read(key)
                headers += [(block.header.teacher, block.header.tokenizer)] if block is not None else []
        return all(found == (info.fingerprint, info.tokenizer) for found in headers)

    def _add(self, key: bytes, place: _Place) -> None:
        if key == _VOID:
            return
        known = self._places.setdefault(key, place)
        if known is not place:
            least, most = sorted((known, place), key=lambda one: one.length)  # of equal ones the newer counts
            self._places[key] = most
            self._shorter.setdefault(key, []).append(least)
            self._shorter[key].sort(key=lambda one: one.length)

    def _writable(self) -> _Shard:
        """The shard to append to. One that was opened before a fork is the parent's."""
        shard = self._shard
        if shard is not None and shard.pid == os.getpid() and shard.size < self.shard_bytes:
            return shard
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        number = max(_numbers(self.folder), default=-1) + 1
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        while True:
            try:
                blocks = os.open(_file(self.folder, number), flags | os.O_EXCL, 0o666)
                break
            except FileExistsError:  # another writer's, since we looked
                number += 1
        index = os.open(_file(self.folder, number, "index"), flags | os.O_TRUNC, 0o666)
        self._shard = _Shard(os.getpid(), number, blocks, index)
        return self._shard

    def _indexed(self, number: int, seen: _Seen, size: int) -> Iterator[tuple[bytes, _Place]]:
        """Records that the index knows. It is believed as far as its checksums hold."""
        file = _file(self.folder, number, "index")
        if not file.exists():
            return
        with file.open("rb") as stream:
            stream.seek(seen.index)
            data = stream.read()
        for at in range(0, len(data) - _ENTRY.size + 1, _ENTRY.size):
            entry = data[at : at + _ENTRY.size]
            key, offset, length, crc = _ENTRY.unpack(entry)
            end = offset + _HEAD.size + length
            if zlib.crc32(entry[:-_CRC_BYTES]) != crc or end > size:
                return
            seen.index += _ENTRY.size
            if offset >= seen.blocks:  # else it was found in the shard before its entry was written
                seen.blocks = end
                yield key, _Place(number, offset, length)

    def _scanned(self, number: int, seen: _Seen, size: int) -> Iterator[tuple[bytes, _Place]]:
        """Whole records after those that the index knows."""
        file = _file(self.folder, number)
        with file.open("rb") as stream:
            while size - seen.blocks >= _HEAD.size:
                stream.seek(seen.blocks)
                head = stream.read(_HEAD.size)
                if head == bytes(_HEAD.size):  # a crash of the machine: the file has grown, its bytes never came
                    return
                try:
                    key, length = _read_head(head)
                except BlockError as error:
                    damaged = _damaged(file, seen.blocks, error)
                    if not self.skip_damaged:
                        raise damaged from error
                    warnings.warn(f"{damaged} It is passed over here.", stacklevel=2)
                    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                        seen.blocks = _next_head(data, seen.blocks + 1)
                    continue
                place = _Place(number, seen.blocks, length)
                if place.offset + _HEAD.size + length > size:  # cut off, or being written
                    return
                seen.blocks += _HEAD.size + length
                yield key, place


def rebuild_index(folder: str | Path) -> int:
    """Reads every shard from end to end and writes its index anew, without what is damaged: how many places that is.

    The sequences that lay there are missing from then on. Not to be called while others append.
    """
    damaged = 0
    for number in _numbers(Path(folder)):
        entries = list(_inspect(_file(Path(folder), number)))
        damaged += sum(key == _VOID for key, _, _ in entries)
        atomic_write(_file(Path(folder), number, "index"), b"".join(_sealed(_ENTRY, *entry) for entry in entries))
    return damaged


def _inspect(file: Path) -> Iterator[tuple[bytes, int, int]]:
    """Key, offset and length of every whole record, each one read; :data:`_VOID` for the bytes between them."""
    if not file.stat().st_size:
        return
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while len(data) - at >= _HEAD.size:
            try:
                key, length = _read_head(data[at : at + _HEAD.size])
                if at + _HEAD.size + length > len(data):  # cut off
                    return
                block = data[at + _HEAD.size : at + _HEAD.size + length]
                decode_any(block, max_positions=_UNLIMITED, max_bytes=_UNLIMITED)
            except BlockError:
                key, length = _VOID, _next_head(data, at + _HEAD.size) - at - _HEAD.size
            yield key, at, length
            at += _HEAD.size + length


def _next_head(data: mmap.mmap, at: int) -> int:
    """Where the next record starts, or the end."""
    while (at := data.find(_MAGIC, at)) >= 0:
        try:
            _read_head(data[at : at + _HEAD.size])
            return at
        except BlockError:
            at += 1
    return len(data)


def _file(folder: Path, number: int, kind: str = "blocks") -> Path:
    return folder / f"shard-{number:05d}.{kind}"


def _numbers(folder: Path) -> list[int]:
    names = [file.stem.removeprefix("shard-") for file in folder.glob("shard-*.blocks")]
    return sorted(int(name) for name in names if name.isdecimal())


def _sealed(layout: struct.Struct, *values: bytes | int) -> bytes:
    """The values and their checksum, the last field of ``layout``."""
    packed = layout.pack(*values, 0)[:-_CRC_BYTES]
    return packed + zlib.crc32(packed).to_bytes(_CRC_BYTES, "little")


def _read_head(record: bytes) -> tuple[bytes, int]:
    """Key and length of the block.

    Raises:
        BlockError: no record starts here.
    """
    if len(record) < _HEAD.size:
        raise BlockError("the file ends here")
    magic, key, length, crc = _HEAD.unpack_from(record)
    if magic != _MAGIC or zlib.crc32(record[: _HEAD.size - _CRC_BYTES]) != crc:
        raise BlockError("no record starts here")
    return key, length


def _damaged(file: Path, offset: int, error: BlockError) -> UserError:
    return UserError(
        f"{file} is damaged at byte {offset}: {error}. Fix: llmdistill.teachers.block_store.rebuild_index"
        f"({str(file.parent)!r}) gives up what is damaged; its sequences are then scored anew."
    )


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]

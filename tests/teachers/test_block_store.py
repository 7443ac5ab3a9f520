"""The store of score blocks: what was appended is there, whatever happened to the process or the file since."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.teachers import block_store
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.block_store import BlockStore, rebuild_index
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode, encode

INFO = TeacherInfo("tiny", "0123456789abcdef", "fedcba9876543210", 50, (1, 2), 256, None)
RECORD_HEAD = 32


def key_of(*name):
    return hashlib.blake2b(repr(name).encode(), digest_size=16).digest()


def data_of(*name, n=4, k=3):
    """An encoded block whose content follows from its name."""
    generator = torch.Generator().manual_seed(int.from_bytes(key_of(*name)[:4], "little"))
    logprobs = torch.randn(n, INFO.vocab_size, generator=generator).log_softmax(-1)
    values, ids = logprobs.topk(k)
    header = BlockHeader(INFO.fingerprint, INFO.tokenizer, k, INFO.vocab_size)
    return encode(ScoreBlock(slice(1, n + 1), logprobs[:, 0], ids.int(), values, header))


def size_of(*name):
    """Between 5 and 40 rows of up to 50 columns: several pages, so that a kill can fall inside a record."""
    number = key_of(*name)[5]
    return dict(n=5 + number % 36, k=1 + number % 50)


def fill(folder, names, **options):
    store = BlockStore(folder, **options)
    for name in names:
        store.append(key_of(name), data_of(name))
    store.close()
    return store


def same(block, data):
    expected = decode(data)
    return block is not None and all(
        torch.equal(getattr(block, name), getattr(expected, name))
        for name in ("token_logprobs", "topk_ids", "topk_logprobs")
    )


def flip(file, at):
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0x10]))


class TestContent:
    def test_what_is_appended_is_there_for_this_and_for_other_readers(self, tmp_path):
        store, early = BlockStore(tmp_path), BlockStore(tmp_path)
        for name in range(5):
            store.append(key_of(name), data_of(name))
            assert same(store.get(key_of(name)), data_of(name))
        late = BlockStore(tmp_path)
        assert len(late) == 5 and len(early) == 0 and early.get(key_of(0)) is None
        assert early.refresh() == 5 and early.refresh() == 0
        for reader in (early, late):
            assert all(same(reader.get(key_of(name)), data_of(name)) for name in range(5))
            assert key_of(5) not in reader and reader.get(key_of(5)) is None

    def test_the_longest_of_a_key_counts(self, tmp_path):
        store = BlockStore(tmp_path)
        for k in (3, 8, 5):
            store.append(key_of("a"), data_of("a", k=k))
        assert store.get(key_of("a")).header.top_k == 8
        assert BlockStore(tmp_path).get(key_of("a")).header.top_k == 8

    def test_a_shard_is_left_when_it_is_full_and_never_taken_up_again(self, tmp_path):
        size = RECORD_HEAD + len(data_of(0))
        fill(tmp_path, range(5), shard_bytes=2 * size)
        sizes = [file.stat().st_size // size for file in sorted(tmp_path.glob("*.blocks"))]
        assert sizes == [2, 2, 1]
        fill(tmp_path, [5])
        assert len(list(tmp_path.glob("*.blocks"))) == 4
        assert len(BlockStore(tmp_path)) == 6

    def test_on_disk_a_record_costs_68_bytes_beside_its_block(self, tmp_path):
        fill(tmp_path, range(10))
        used = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert used == sum(len(data_of(name)) + 68 for name in range(10))

    def test_info_is_every_field_of_the_teacher(self, tmp_path):
        store = BlockStore(tmp_path / "new")
        assert store.info() is None
        assert store.claim(INFO) == INFO == BlockStore(tmp_path / "new").info()
        (tmp_path / "new" / "info.json").write_text("{}")
        with pytest.raises(UserError, match=r"info.json is no description of a teacher"):
            store.info()


class TestCutOff:
    """A process that is killed leaves a prefix of what it was writing."""

    @pytest.mark.parametrize("index", ["kept", "lost"])
    def test_a_record_cut_at_any_byte_is_dropped_and_those_before_it_are_not(self, tmp_path, index):
        fill(tmp_path, range(3))
        blocks, entries = tmp_path / "shard-00000.blocks", tmp_path / "shard-00000.index"
        whole, last = blocks.read_bytes(), RECORD_HEAD + len(data_of(2))
        for cut in range(1, last + 1):
            blocks.write_bytes(whole[:-cut])
            if index == "lost":
                entries.unlink(missing_ok=True)
            store = BlockStore(tmp_path)
            assert len(store) == 2 and store.get(key_of(2)) is None
            assert all(same(store.get(key_of(name)), data_of(name)) for name in range(2))
        store.append(key_of(2), data_of(2))
        assert len(list(tmp_path.glob("*.blocks"))) == 2  # not behind the fragment
        assert same(BlockStore(tmp_path).get(key_of(2)), data_of(2))

    def test_an_index_cut_or_changed_anywhere_loses_nothing(self, tmp_path):
        fill(tmp_path, range(3))
        entries = tmp_path / "shard-00000.index"
        whole = entries.read_bytes()
        for at in range(len(whole)):
            for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
                entries.write_bytes(damaged)
                store = BlockStore(tmp_path)
                assert len(store) == 3 and all(same(store.get(key_of(name)), data_of(name)) for name in range(3))

    def test_bytes_that_never_came(self, tmp_path):
        """After a crash of the machine a file may have grown by zeros."""
        fill(tmp_path, range(3))
        with (tmp_path / "shard-00000.blocks").open("ab") as stream:
            stream.write(bytes(500))
        store = BlockStore(tmp_path)
        assert len(store) == 3 and store.refresh() == 0

    def test_a_full_disk_costs_one_record(self, tmp_path):
        """A limit on file sizes cuts the write off half-way, as a full disk does."""
        store = BlockStore(tmp_path)
        data = data_of("large", n=2000, k=20)
        for name in range(3):
            store.append(key_of(name), data_of(name))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, hard))
        try:
            with pytest.raises(UserError, match="shard-00000.blocks cannot be written: File too large.* make room"):
                store.append(key_of("large"), data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "shard-00000.blocks").stat().st_size == len(data) // 2
        store.append(key_of("large"), data)
        for reader in (store, BlockStore(tmp_path)):
            assert len(reader) == 4 and same(reader.get(key_of("large")), data)

    def test_records_found_before_their_index_entries_are_not_found_again(self, tmp_path):
        """A writer says last where it has written: a reader may come between."""
        fill(tmp_path, range(2))
        blocks, entries = tmp_path / "shard-00000.blocks", tmp_path / "shard-00000.index"
        whole, index = blocks.read_bytes(), entries.read_bytes()
        blocks.write_bytes(whole[: len(whole) // 2])
        entries.write_bytes(b"")
        reader = BlockStore(tmp_path)
        assert len(reader) == 1
        blocks.write_bytes(whole)
        entries.write_bytes(index)
        assert reader.refresh() == 1 and len(reader) == 2


class TestDamage:
    def test_a_flipped_byte_is_never_returned(self, tmp_path):
        """Any byte of the shard: the record it lies in is refused, by file and offset; the others are read."""
        fill(tmp_path, range(3))
        file, size = tmp_path / "shard-00000.blocks", RECORD_HEAD + len(data_of(0))
        for at in range(0, 3 * size, 5):
            flip(file, at)
            store, hit = BlockStore(tmp_path), at // size
            for name in range(3):
                if name != hit:
                    assert same(store.get(key_of(name)), data_of(name))
            with pytest.raises(UserError, match=rf"shard-00000.blocks is damaged at byte {hit * size}: .*Fix"):
                store.get(key_of(hit))
            flip(file, at)

    @pytest.mark.parametrize("at", [0, 10, 22, 30, 50])  # magic, key, length, checksum, block
    def test_without_an_index_too_and_the_rest_can_be_saved(self, tmp_path, at):
        fill(tmp_path, range(4))
        file, size = tmp_path / "shard-00000.blocks", RECORD_HEAD + len(data_of(0))
        (tmp_path / "shard-00000.index").unlink()
        flip(file, size + at)
        with pytest.raises(UserError, match=rf"shard-00000.blocks is damaged at byte {size}: .*rebuild_index"):
            BlockStore(tmp_path).get(key_of(1))
        assert rebuild_index(tmp_path) == 1
        store = BlockStore(tmp_path)
        assert len(store) == 3 and store.get(key_of(1)) is None
        assert all(same(store.get(key_of(name)), data_of(name)) for name in (0, 2, 3))
        store.append(key_of(1), data_of(1))
        assert rebuild_index(tmp_path) == 1 and len(BlockStore(tmp_path)) == 4

    def test_the_last_record(self, tmp_path):
        fill(tmp_path, range(3))
        file = tmp_path / "shard-00000.blocks"
        flip(file, file.stat().st_size - 1)
        assert rebuild_index(tmp_path) == 1
        assert len(BlockStore(tmp_path)) == 2

    def test_a_rebuilt_index_is_the_one_that_was_written(self, tmp_path):
        fill(tmp_path, range(5), shard_bytes=500)
        written = {file.name: file.read_bytes() for file in tmp_path.glob("*.index")}
        assert len(written) > 1
        for name in written:
            (tmp_path / name).unlink()
        assert rebuild_index(tmp_path) == 0
        assert {file.name: file.read_bytes() for file in tmp_path.glob("*.index")} == written

    def test_a_shard_that_is_gone(self, tmp_path):
        store = fill(tmp_path, range(3))
        (tmp_path / "shard-00000.blocks").unlink()
        with pytest.raises(UserError, match=r"shard-00000.blocks is gone"):
            store.get(key_of(0))


# Forks writers that append until they are killed, or as many as they are told; says what is appended.
WRITERS = """
import os, sys
from llmdistill.teachers.block_store import BlockStore
from tests.teachers.test_block_store import data_of, key_of, size_of
say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
say("ready")
for line in sys.stdin:
    folder, writers, count = line.split()
    children = []
    for _ in range(int(writers)):
        if not (child := os.fork()):
            store, i, me = BlockStore(folder, shard_bytes=100_000), 0, os.getpid()
            while i < int(count):
                store.append(key_of(me, i), data_of(me, i, **size_of(me, i)))
                say(me, i)
                i += 1
            store.close()
            os._exit(0)
        children.append(child)
    say("started", *children)
    for child in children:
        os.waitpid(child, 0)
    say("ended")
"""


@contextmanager
def writers():
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def started(process, folder, count, number):
    """Writers' process ids, and what they have said by then."""
    process.stdin.write(f"{folder} {number} {count}\n")
    said = []
    while (words := process.stdout.readline().split())[:1] != ["started"]:
        said.append(tuple(map(int, words)))
    return [int(word) for word in words[1:]], said


class TestProcesses:
    def test_kill_at_random_moments(self, tmp_path):
        """Twenty writers, one after another in one store, each killed within 60 ms of its start."""
        moments, appended = random.Random(0), []
        with writers() as process:
            for _ in range(20):
                (writer,), said = started(process, tmp_path, 10**9, 1)
                time.sleep(moments.uniform(0, 0.06))
                os.kill(writer, signal.SIGKILL)
                while (words := process.stdout.readline().split()) != ["ended"]:
                    said.append(tuple(map(int, words)))
                appended += said
                store = BlockStore(tmp_path)
                assert all(same(store.get(key_of(*n)), data_of(*n, **size_of(*n))) for n in said)
        assert len(appended) > 50
        assert all(same(store.get(key_of(*n)), data_of(*n, **size_of(*n))) for n in appended)
        # and what a writer was killed over before it could say so: one at most of each
        assert len(appended) <= len(store) <= len(appended) + 20
        assert rebuild_index(tmp_path) == 0
        assert len(BlockStore(tmp_path)) == len(store)

    def test_writers_and_a_reader_at_once(self, tmp_path):
        """Three writers of 60 blocks each; a reader that looks meanwhile sees only whole blocks, and finally all."""
        with writers() as process:
            children, said = started(process, tmp_path, 60, 3)
            reader, seen, ended = BlockStore(tmp_path), 0, False
            while not ended:
                words = process.stdout.readline().split()
                if not (ended := words == ["ended"]):
                    said.append(tuple(map(int, words)))
                reader.refresh()
                name = said[-1]
                seen += same(reader.get(key_of(*name)), data_of(*name, **size_of(*name)))
        assert seen > 60  # whoever said so had appended it
        assert sorted(said) == sorted((child, i) for child in children for i in range(60))
        assert len(reader) == 180 == len(BlockStore(tmp_path))
        assert all(same(reader.get(key_of(*n)), data_of(*n, **size_of(*n))) for n in said)

    def test_a_shard_that_another_writer_has_just_made_is_its_own(self, tmp_path, monkeypatch):
        """The listing of a folder is out of date at once: here always."""
        monkeypatch.setattr(block_store, "_numbers", lambda folder: [])
        stores = [BlockStore(tmp_path) for _ in range(3)]
        for i in range(2):
            for name, store in enumerate(stores):
                store.append(key_of(name, i), data_of(name, i))
        monkeypatch.undo()
        assert len(list(tmp_path.glob("*.blocks"))) == 3
        assert len(BlockStore(tmp_path)) == 6

    def test_a_fork_does_not_share_its_parents_shard(self, tmp_path):
        store = BlockStore(tmp_path)
        store.append(key_of("parent", 0), data_of("parent", 0))
        if not (child := os.fork()):
            code = 1
            try:
                store.append(key_of("child"), data_of("child"))
                code = 0
            finally:
                os._exit(code)
        store.append(key_of("parent", 1), data_of("parent", 1))
        assert os.waitpid(child, 0)[1] == 0
        assert len(list(tmp_path.glob("*.blocks"))) == 2
        assert len(BlockStore(tmp_path)) == 3 and store.refresh() == 1

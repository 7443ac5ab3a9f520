"""Coverage-guided fuzzing of ``decode``, for machines with atheris (``pip install atheris``).

    python -m tests.service.fuzz_blocks -max_total_time=120 [CORPUS_FOLDER]

Every input is tried as it is and with the checksum that belongs to it, so that the code behind the checksum is reached.
The first inputs are valid blocks. The same property is tested with hypothesis in test_hostile_blocks.
"""

import struct
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["llmdistill.wire"]):
        from llmdistill.wire.blocks import BlockError, decode, encode
else:
    from llmdistill.wire.blocks import BlockError, decode, encode


def sealed(body):
    """With the checksum that belongs to it, so that what is behind the checksum is looked at."""
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


def survives(data):
    """Refused, or a block that could have been written: in float32 exactly these bytes. Within bounded memory."""
    tracemalloc.start()
    try:
        block = decode(data)
    except BlockError:
        block = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < (1 << 17) + 32 * len(data)  # tensors are 4 times the bytes; sorting needs some as int64
    if block is None:
        return False
    again = encode(block)
    assert again == data if block.header.dtype == "float32" else len(again) == len(data)
    return True


def one_input(data):
    survives(data)
    survives(sealed(data))
    survives(sealed(b"LDSB\x01\x00" + data))


def main():
    from tests.service.test_blocks import block_of, random_logits

    with tempfile.TemporaryDirectory() as seeds:
        for i, (n, vocab, k) in enumerate([(3, 9, 3), (2, 9, 9), (1, 300, 5), (2, 2, 1), (0, 5, 2), (4, 7, 0)]):
            for dtype in ("float16", "float32"):
                data = encode(block_of(random_logits(n, vocab), k), dtype)
                Path(seeds, f"{i}-{dtype}").write_bytes(data[:-4])
        atheris.Setup([*sys.argv, seeds], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

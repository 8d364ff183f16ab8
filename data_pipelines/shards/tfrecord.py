"""TFRecord files and `tf.train.Example` messages, as bytes, without TensorFlow.

Starting TensorFlow takes each process seconds and hundreds of megabytes, for two formats that are a
page long: https://www.tensorflow.org/tutorials/load_data/tfrecord (framing and masked CRC-32C) and
https://protobuf.dev/programming-guides/encoding with TensorFlow's `example.proto`, `feature.proto`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping

import numpy as np

# Castagnoli's polynomial, bits reversed.
_POLYNOMIAL = 0x82F63B78
# Words of 4 bytes that one lane of the vectorised CRC takes. Short lanes need more merging, long
# ones more steps; at an image's 200 kB this takes 1 ms, a loop over bytes in Python 20.
_LANE_WORDS = 64


def frame(payload: bytes) -> bytes:
    """A record of a TFRecord file: length, its CRC, the payload, its CRC.

    The payload begins `HEADER` bytes after the record does.
    """
    length = struct.pack("<Q", len(payload))
    return b"".join(
        [length, _masked_crc(length), payload, _masked_crc(payload)],
    )


# Bytes in front of a payload: 8 of its length and 4 of their CRC.
HEADER = 12


def encode_example(features: Mapping[str, bytes | Iterable[int]]) -> bytes:
    """A serialized `tf.train.Example`: bytes become a bytes list of one, integers an int64 list.

    Args:
      features: name to value; integers lie within 64 bits, signed.
    """
    entries = []
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))  # Feature.bytes_list, BytesList.value
        else:
            packed = b"".join(_varint(int(number) & 0xFFFF_FFFF_FFFF_FFFF) for number in value)
            feature = _field(3, _field(1, packed))  # Feature.int64_list, Int64List.value
        # Features.feature is a map: entries of key and value.
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of a byte string, as iSCSI and TFRecord use it."""
    if len(data) < 4:
        state = 0xFFFFFFFF
        for byte in data:
            state = int(_byte_table()[(state ^ byte) & 0xFF]) ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    # Zeros in front do not move a CRC that starts at 0, and starting at ones instead is the same as
    # inverting the first four bytes. So the data are cut, from the end, into 2^k lanes of one
    # length, all of which advance together.
    lanes = 1 << (-(-len(data) // (4 * _LANE_WORDS)) - 1).bit_length()
    padded = np.zeros(lanes * _LANE_WORDS * 4, np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 0xFF
    words = padded.view("<u4").reshape(lanes, _LANE_WORDS).T.copy()
    low, high = _half_word_tables()
    state = np.zeros(lanes, np.uint32)
    for word in words:
        state ^= word
        state = low[state & 0xFFFF] ^ high[state >> 16]
    level = 0
    while len(state) > 1:
        # The left one of two neighbours is followed by as many bytes as the right one covers.
        state = _apply(_zeros_operator(level), state[0::2]) ^ state[1::2]
        level += 1
    return int(state[0]) ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    # TFRecord's mask: a CRC of data that hold CRCs would be weak.
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _byte_table() -> np.ndarray:
    # [256] uint32: the state after one byte.
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


@functools.cache
def _half_word_tables() -> tuple[np.ndarray, np.ndarray]:
    # Two [65536] uint32: what the low and the high half of a state become after four bytes.
    halves = np.arange(65536, dtype=np.uint32)
    tables = []
    for state in (halves, halves << 16):
        for _ in range(4):
            state = _byte_table()[state & 0xFF] ^ (state >> 8)
        tables.append(state)
    return tables[0], tables[1]


@functools.cache
def _zeros_operator(level: int) -> np.ndarray:
    # [32] uint32: what becomes of each bit of a state after 2^level lanes of zeros.
    if level:
        half = _zeros_operator(level - 1)
        return _apply(half, half)
    low, high = _half_word_tables()
    state = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(_LANE_WORDS):
        state = low[state & 0xFFFF] ^ high[state >> 16]
    return state


def _apply(operator: np.ndarray, states: np.ndarray) -> np.ndarray:
    # A matrix over GF(2), given by its columns, times each state.
    bits = (states[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(bits * operator, axis=1)


def _field(number: int, content: bytes) -> bytes:
    # Wire type 2: a length, then so many bytes.
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

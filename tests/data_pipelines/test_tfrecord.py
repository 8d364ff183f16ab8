"""The TFRecord framing and `tf.train.Example` messages against their published definitions."""

import struct

import numpy as np
import pytest

from data_pipelines.shards import tfrecord


def crc_by_bits(data):
    """CRC-32C as the definition has it: one bit at a time."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    # RFC 3720, appendix B.4, and the check value of every catalogue.
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc_of_published_vectors(data, expected):
    assert tfrecord.crc32c(data) == expected


# Around the lengths where a word is split, a lane is full, or the number of lanes doubles.
@pytest.mark.parametrize("length", [1, 3, 4, 5, 255, 256, 257, 511, 512, 513, 1024, 1027, 5001])
def test_crc_of_random_bytes(length):
    data = np.random.default_rng(length).bytes(length)
    assert tfrecord.crc32c(data) == crc_by_bits(data)
    assert tfrecord.crc32c(b"\0" + data) != tfrecord.crc32c(data)


def test_a_frame_is_length_payload_and_two_masked_checksums():
    record = tfrecord.frame(b"123456789")
    masked = ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert record[:8] == struct.pack("<Q", 9)
    assert record[tfrecord.HEADER :] == b"123456789" + struct.pack("<I", masked)


def test_an_example_is_a_map_of_bytes_and_packed_integers():
    """Written out by hand after example.proto, feature.proto and protobuf's encoding guide."""
    found = tfrecord.encode_example({"a": b"xyz", "b": [1, 300], "c": []})
    bytes_list = b"\x0a\x05" + b"\x0a\x03xyz"  # Feature field 1, BytesList field 1
    int64_list = b"\x1a\x05" + b"\x0a\x03" + b"\x01\xac\x02"  # Feature field 3, packed varints
    empty = b"\x1a\x02" + b"\x0a\x00"
    entries = [
        b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature
        for name, feature in ((b"a", bytes_list), (b"b", int64_list), (b"c", empty))
    ]
    features = b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in entries)
    assert found == b"\x0a" + bytes([len(features)]) + features


def test_negative_integers_are_ten_bytes_of_two_s_complement():
    found = tfrecord.encode_example({"a": [-1]})
    assert found.endswith(b"\xff" * 9 + b"\x01")

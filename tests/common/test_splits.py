"""Hashes that choose splits."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from common.splits import stable_hash


def test_a_hash_is_the_first_64_bits_of_a_salted_blake2b():
    expected = hashlib.blake2b("salt\0é".encode(), digest_size=8).hexdigest()
    assert f"{stable_hash('é', 'salt'):016x}" == expected
    assert stable_hash("é") != stable_hash("é", "salt")


def test_a_hash_is_the_same_in_another_process():
    code = "from common.splits import stable_hash; print(stable_hash('a'))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(found) == stable_hash("a")

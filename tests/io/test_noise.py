"""Noise of a file: floats of a sane size, judged before they are read."""

import os
import zipfile

import numpy as np
import pytest

from cosmos3_jax.io import noise
from cosmos3_jax.io.noise import load_noise


@pytest.fixture
def file(tmp_path):
    return tmp_path / "noise.npz"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_read(file, dtype):
    values = np.random.RandomState(0).standard_normal((1, 2, 3)).astype(dtype)
    np.savez_compressed(file, noise=values, sound_noise=2 * values, other=["no", "matter"])
    found = load_noise(file)
    assert found.keys() == {"noise", "sound_noise"}
    np.testing.assert_array_equal(found["noise"], values)
    np.testing.assert_array_equal(found["sound_noise"], 2 * values)


@pytest.mark.parametrize(
    "dtype", ["M8[s]", complex, bool, int, "U3", [("a", "f4")], "V2", np.longdouble, object]
)
def test_what_is_no_float_is_refused(file, dtype):
    np.savez(file, noise=np.zeros(3, dtype))
    with pytest.raises(ValueError, match=r"noise.npz noise holds .*: give floats"):
        load_noise(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(file, value):
    np.savez(file, noise=np.zeros(3), sound_noise=[0, value])
    with pytest.raises(ValueError, match="sound_noise holds NaN or infinity"):
        load_noise(file)


def write_member(file, content, name="noise.npy"):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
    return b"\x93NUMPY\x01\x00v\x00" + text.ljust(118).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("(100,)"), "is not an npz file: EOF: reading array data"),
        (header("(-1,)"), "is not an npz file"),
        (header("(9999999999999,)"), r"noise has shape \(9999999999999,\), and 1073741824 bytes"),
        (header("(1,)", "|O") + b"cos\nsystem\n(S'true'\ntR.", "noise holds object: give floats"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "is not an npz file: Header info length"),
        (b"", "is not an npz file: EOF"),
    ],
)
def test_damaged_arrays(file, content, message):
    write_member(file, content)
    with pytest.raises(ValueError, match=message) as raised:
        load_noise(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_bomb_is_not_unpacked(file, monkeypatch):
    monkeypatch.setattr(noise, "MOST_BYTES", 2**20)
    write_member(file, header("(2097152,)") + bytes(2**23))
    assert file.stat().st_size < 2**14
    with pytest.raises(ValueError, match="holds 8388736 bytes of noise, and 1048576 is the limit"):
        load_noise(file)


def test_other_files(file):
    write_member(file, b"", "video.npy")
    with pytest.raises(ValueError, match="holds no array named noise"):
        load_noise(file)
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="noise.npz is not an npz file: File is not a zip file"):
        load_noise(file)
    file.unlink()
    with pytest.raises(ValueError, match="noise.npz cannot be read as an npz file: .Errno 2"):
        load_noise(file)
    os.mkfifo(file)
    with pytest.raises(ValueError, match="noise.npz is a pipe"):
        load_noise(file)

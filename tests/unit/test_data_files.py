"""Paths and URLs, and writes that are all-or-nothing."""

from pathlib import Path

import pytest

from scalecryo.data.io import urls
from scalecryo.errors import InputError, MissingInputError


def test_messages_carry_no_credentials() -> None:
    assert urls.redacted("s3://user:secret@host/bucket/x?token=abc") == "s3://host/bucket/x"
    assert urls.redacted("/data/x?y.mrcs") == "/data/x?y.mrcs"
    assert urls.redacted("http://me:word@host/x.mrcs?abc") == "http://host/x.mrcs"


def test_messages_show_names_whole() -> None:
    for url in ("s3://bucket/run?.zarr/c/0", "s3://bucket/run[1]#2/a b%20", "gs://b/x?/y=z", "memory://a/*"):
        assert urls.redacted(url) == url


@pytest.mark.parametrize(
    ("base", "part", "joined"),
    [
        ("/a/b", "c", "/a/b/c"),
        ("/a/b/", "c/d", "/a/b/c/d"),
        ("s3://bucket/a", "c", "s3://bucket/a/c"),
        ("/a", "/c", "/c"),
        ("/a", "s3://b/c", "s3://b/c"),
    ],
)
def test_join(base: str, part: str, joined: str) -> None:
    assert urls.join(base, part) == joined


def test_folders_above() -> None:
    assert urls.folders_above("/a/b/c.star") == ["/a/b", "/a", "/"]
    assert urls.folders_above("s3://bucket/a/c.star") == ["s3://bucket/a", "s3://bucket"]


@pytest.mark.parametrize("scheme", ["local", "file", "memory"])
def test_write_read_list_remove(scheme: str, tmp_path: Path) -> None:
    root = {"local": str(tmp_path / "x"), "file": f"file://{tmp_path}/x", "memory": "memory://files-test/x"}[scheme]
    url = urls.join(root, "deep", "name.bin")
    assert not urls.exists(url)
    assert urls.list_folder(root) == []
    urls.write_bytes_atomic(url, b"0123456789")
    assert urls.read_bytes(url) == b"0123456789"
    assert urls.read_range(url, 2, 5) == b"234"
    assert urls.size(url) == 10
    assert urls.list_folder(urls.join(root, "deep")) == ["name.bin"]
    assert urls.is_folder(root)
    before = urls.fingerprint(url)
    urls.write_bytes_atomic(url, b"01234567890")
    assert urls.fingerprint(url) != before
    urls.remove_tree(root)
    assert not urls.exists(url)
    urls.remove_tree(root)
    for read in (urls.read_bytes, urls.size, lambda missing: urls.read_range(missing, 0, 1)):
        with pytest.raises(MissingInputError, match="no such file"):
            read(url)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_failed_write_leaves_nothing(scheme: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if scheme == "local" else "memory://failed-write"

    def fail() -> None:
        with urls.atomic_path(urls.join(folder, "out.bin")) as path:
            path.write_bytes(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        fail()
    assert urls.list_folder(folder) == []


def test_bad_addresses_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nosuch://x"):
        urls.exists("nosuch://x")
    with pytest.raises(InputError, match="cannot be read"):
        urls.read_bytes(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        urls.read_text(str(tmp_path / "binary"))

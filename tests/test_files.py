"""Files: names that stay inside a folder, writes that leave the earlier file or the new one, and texts of users."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_hf.files import (
    check_file_place,
    check_unicode,
    decode_text,
    is_deep,
    parse_json,
    path_inside,
    read_text,
    save_whole,
    write_whole,
)


BAD_NAMES = [
    *("", ".", "..", "/", "/etc/passwd", "../x", "a/../x", "a/..", "a//b", "./a", "a/", "a/.", "~/../x"),
    *("..\\x", "a\\b", "C:\\x", "C:x", "\\\\host\\x", "file:x", "a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "\ud800"),
    *("a ", "a.", "a /b", "x" * 256, "\xe4" * 128, None, 3, ["a"], b"a"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_out_or_are_not_names_everywhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="A name recorded in .* must be that of a file inside it, got .*, which"):
        path_inside(tmp_path, name)


@given(st.text(st.sampled_from("ab./\\~: \n\x00"), max_size=12))
@settings(derandomize=True, database=None, max_examples=150)
def test_what_is_not_refused_is_inside(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "inside"
    try:
        path = path_inside(folder, name)
    except ValueError:
        return
    # By an independent rule.
    whole = os.path.normpath(os.path.join(folder, name))
    assert whole == str(path) and os.path.dirname(whole).startswith(str(folder)) and "\\" not in name


def test_links_may_lead_about_inside_and_not_out(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for path in (folder / "data", outside):
        path.mkdir(parents=True)
        (path / "file").touch()
    links = {"in": folder / "data", "out": outside, "file": outside / "file", "up": folder, "gone": outside / "none"}
    links |= {"loop": folder / "loop", "relative": "../outside/file", "near": "data/file"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (tmp_path / "link").symlink_to(folder)
    for name in ("data/file", "in/file", "near", "up/data/file", "none", "none/file"):
        for root in (folder, tmp_path / "link", tmp_path / "outside" / ".." / "folder"):
            assert path_inside(root, name) == root / name
    for name in ("out", "out/file", "file", "gone", "loop", "relative", "up", "in/../../outside"):
        with pytest.raises(ValueError, match="got .*, which is"):
            path_inside(folder, name)


def test_snapshots_in_the_cache_of_the_hub_link_to_their_blobs(tmp_path):
    repository = tmp_path / "datasets--user--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (
        snapshot / "data",
        repository / "blobs",
        tmp_path / "blobs" / "ab",
        tmp_path / "models--x" / "blobs",
    ):
        folder.mkdir(parents=True)
    (repository / "blobs" / "1").touch()
    (tmp_path / "blobs" / "ab" / "abc").touch()
    (repository / "blobs" / "2").symlink_to("../../blobs/ab/abc")
    (snapshot / "manifest.json").symlink_to("../../blobs/1")
    (snapshot / "data" / "x").symlink_to("../../../blobs/2")
    for name in ("manifest.json", "data/x"):
        assert path_inside(snapshot, name).is_file()
    assert path_inside(snapshot / "data", "x").is_file()
    for number, target in enumerate(["../../blobs", "../../../models--x/blobs/1", "../../refs", "/etc/passwd"]):
        (snapshot / f"{number}").symlink_to(target)
        with pytest.raises(ValueError, match="which is a link to"):
            path_inside(snapshot, f"{number}")


def test_nothing_is_written_through_a_link(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "file"
    outside.write_text("theirs")
    path.symlink_to(outside)
    (tmp_path / ".file.tmp").symlink_to(outside)
    write_whole(path, b"ours")
    assert outside.read_text() == "theirs" and path.read_text() == "ours" and not path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "outside"]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_in_the_way_of_a_file_is_named(tmp_path, kind):
    path = tmp_path / "x"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(OSError, match="x' must be a file, got .*. Remove it."):
        check_file_place(path, "Remove it.")
    assert read_text(path) is None
    check_file_place(tmp_path / "none", "")


@given(st.binary(max_size=50))
@settings(derandomize=True, database=None, max_examples=40)
def test_a_text_of_others_keeps_its_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "text"
    path.write_bytes(data)
    write_whole(path, read_text(path))
    assert path.read_bytes() == data


@pytest.mark.parametrize("killed_at", range(1, 3))
def test_a_killed_swap_of_folders_is_put_right_by_the_next(tmp_path, monkeypatch, killed_at):
    """As a kill leaves it: without what follows on an exception."""

    def write(text):
        return lambda folder: (folder.mkdir(), (folder / "file").write_text(text))

    folder = tmp_path / "kept"
    save_whole(folder, write("first"))
    # A kill in front of the first rename, and between the two.
    (tmp_path / ".kept.new").mkdir()
    if killed_at == 2:
        folder.rename(tmp_path / ".kept.earlier")

    def fail(folder):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        save_whole(folder, fail)
    assert (folder / "file").read_text() == "first" and os.listdir(tmp_path) == ["kept"]
    save_whole(folder, write("second"))
    assert (folder / "file").read_text() == "second" and os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("text", ["", "naïve\n", "漢字\u2028", "a\ufeffb"])
def test_text_in_utf8_is_read_with_a_mark_and_without(text):
    assert decode_text(text.encode()) == decode_text(text.encode("utf-8-sig")) == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("hi".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
        (b"\xfe\xff\x00h", "it is in UTF-16"),
        ("hi".encode("utf-32"), "it is in UTF-32"),
        (b"\x00\x00\xfe\xff\x00\x00\x00h", "it is in UTF-32"),
        ("hi".encode("utf-16-le"), "it holds a zero byte, at character 1"),
        ("naïve".encode("latin-1"), "at byte 2"),
        (gzip.compress(b"hi", mtime=0), "gzip"),
        (bz2.compress(b"hi"), "bzip2"),
        (lzma.compress(b"hi"), "xz"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1rest", "Parquet"),
        (b"ARROW1\x00\x00", "Arrow"),
    ],
    ids=str,
)
def test_what_is_no_such_text_is_named(content, reason):
    with pytest.raises(ValueError, match=reason):
        decode_text(content)


@pytest.mark.parametrize(
    "text", ["{", "", "[1,]", "9" * 5000, "[" * 100_000, '{"a":' * 100_000], ids=lambda text: text[:9]
)
def test_json_that_cannot_be_parsed_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_that_is_deep_says_so():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000 + "]" * 100_000)
    assert parse_json('{"a": [1, "b"]}') == {"a": [1, "b"]}


def test_the_depth_of_a_file_is_that_of_its_brackets(tmp_path, monkeypatch):
    deep = "[" * 500 + '{"a": ' * 501 + "1" + "}" * 501 + "]" * 500
    flat = '{"a": "[{[' + r"\"[[\\" + '", "b": [1, {}]}'
    monkeypatch.setattr("cllm_hf.files._BYTES_AT_ONCE", 50)
    for text, expected in (
        (deep, True),
        (flat + "\n" + deep, True),
        (deep.replace("[", "[\n"), True),
        ("\n".join([flat] * 2000), False),
        ("[" + ",\n".join([flat] * 2000) + "]", False),
        (deep[1:-1], False),
        ("\n".join([deep[1:-1]] * 5), False),
        ('{"a": "' + "[" * 5000 + '"}', False),
        ("", False),
    ):
        (tmp_path / "a.json").write_text(text)
        assert is_deep(tmp_path / "a.json") == expected, text[:60]


@pytest.mark.parametrize("escape", [r"\ud83d", r"\ude00", r"\ude00\ud83d"])
def test_half_a_character_is_refused_with_its_place_and_a_remedy_that_works(escape):
    text = json.loads(f'"ab {escape}"')
    with pytest.raises(
        ValueError, match=r"lone surrogate '\\ud\w+' at character 3 of prompt 7.*take it out"
    ) as caught:
        check_unicode(text, "prompt 7")
    str(caught.value).encode()  # the message itself can be written
    check_unicode(text.encode("utf-8", "ignore").decode(), "prompt 7")


def test_whole_characters_pass():
    check_unicode(json.loads(r'"\ud83d\ude00"') + "\U0010ffff\ufffd\ue000", "prompt 0")

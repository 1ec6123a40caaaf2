"""Texts and JSON of users: what can be read is, and all else is named."""

import bz2
import gzip
import json
import lzma

import pytest

from cllm_hf.reading import check_unicode, decode_text, is_deep, parse_json


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
    monkeypatch.setattr("cllm_hf.reading._BYTES_AT_ONCE", 50)
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

"""What a text file is, told by its content: encodings, line ends, lists and lines, compression, and what is no data at all."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import tiny

from propmeta_edit.cli import main, read_arguments
from propmeta_edit.data.corpora import read_texts
from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.data.mquake import load_mquake
from propmeta_edit.data.reading import opened_text, read_json
from propmeta_edit.data.single_hops import read_cre_single_hops, read_mquake_single_hops
from propmeta_edit.errors import DataError
from propmeta_edit.recipes.data_check import describe_file, find_format
from propmeta_edit.recipes.data_sets import load_all, load_dataset
from propmeta_edit.recipes.edit_facts import read_requests
from propmeta_edit.recipes.splits import kind_of, load_splits

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = [{"prompt": "Ann Lee lives in", "target_new": "Perú", "subject": "Ann Lee"}, {"prompt": "Bob is", "target_new": "old"}]
LOADERS = {
    "CRE": (load_cre, [tiny.cre_record(n) for n in range(3)]),
    "MQuAKE": (load_mquake, tiny.mquake_cases(3)),
    "CounterFact": (load_counterfact, [tiny.counterfact_record(n) for n in range(3)]),
    "EasyEdit": (load_easyedit_file, [tiny.knowedit_record(0), tiny.zsre_record(1)]),
    "single hops of CRE": (read_cre_single_hops, [tiny.cre_record(n) for n in range(3)]),
    "single hops of MQuAKE": (read_mquake_single_hops, tiny.mquake_cases(3)),
    "requests": (read_requests, REQUESTS),
}


def as_list(records):
    return json.dumps(records, ensure_ascii=False, indent=1)


def as_lines(records):
    return "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


WAYS = {
    "list": lambda records: as_list(records).encode(),
    "lines": lambda records: as_lines(records).encode(),
    "lines without a last end": lambda records: as_lines(records).rstrip().encode(),
    "list with a mark": lambda records: b"\xef\xbb\xbf" + as_list(records).encode(),
    "lines with a mark": lambda records: b"\xef\xbb\xbf" + as_lines(records).encode(),
    "list, Windows": lambda records: as_list(records).replace("\n", "\r\n").encode(),
    "lines, Windows": lambda records: b"\xef\xbb\xbf" + as_lines(records).replace("\n", "\r\n").encode(),
    "lines, old Mac": lambda records: as_lines(records).replace("\n", "\r").encode(),
    "lines, UTF-16 of PowerShell": lambda records: as_lines(records).replace("\n", "\r\n").encode("utf-16"),
    "list, UTF-16 big-endian": lambda records: b"\xfe\xff" + as_list(records).encode("utf-16-be"),
    "list, gzip": lambda records: gzip.compress(as_list(records).encode()),
    "lines, gzip": lambda records: gzip.compress(b"\xef\xbb\xbf" + as_lines(records).encode()),
    "space before and after": lambda records: b"\n  " + as_list(records).encode() + b"\n\n ",
    "escaped letters": lambda records: json.dumps(records).encode(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LOADERS)
def test_whatever_a_file_is_like_its_records_are_the_same(tmp_path, kind, way):
    """The name says nothing: lists are in files called .jsonl, and lines in files without an ending."""
    load, records = LOADERS[kind]
    plain, other = tmp_path / "plain.json", tmp_path / ("data.jsonl" if "list" in way else "data")
    plain.write_text(json.dumps(records), encoding="utf-8")
    other.write_bytes(WAYS[way](records))
    found, expected = load(other), load(plain)
    if hasattr(found, "path"):  # single hops say from where they are
        found, expected = vars(found) | {"path": None}, vars(expected) | {"path": None}
    if kind == "CRE" and "lines" in way:  # one of several questions is drawn by its line
        assert [case.case_id for case in found] == [case.case_id for case in expected]
    else:
        assert found == expected
    if "single" not in kind and kind != "requests":
        assert find_format(other) == kind


REMASTERED = {
    **tiny.mquake_cases(1)[0],
    "requested_rewrite": [{"prompt": "{} is by", "subject": "Book 0", "target_new_str": "Ann"}],
}
CAKE = {**REMASTERED, "requested_rewrite": [{**REMASTERED["requested_rewrite"][0], "learning_prompt": []}]}
ZSRE = tiny.zsre_record()
NAMED = {  # a record of each format that the documents name
    "CRE": ("CRE", tiny.cre_record()),
    "MQuAKE": ("MQuAKE", tiny.mquake_cases(1)[0]),
    "remastered": ("MQuAKE", REMASTERED),
    "CaKE": ("CaKE", CAKE),
    "CounterFact](https": ("CounterFact", tiny.counterfact_record(0)),
    "KnowEdit": ("EasyEdit", tiny.knowedit_record()),
    "ZsRE": ("EasyEdit", ZSRE),
    "and CounterFact,": ("EasyEdit", {"prompt": "{} lives in", "subject": "Ann", "target_new": "Lima", "locality_prompt": "x"}),
    "MzsRE": ("EasyEdit", {"en": ZSRE, "de": {**ZSRE, "src": "Wo wurde Ann geboren?"}}),
    "QAEdit": ("EasyEdit", {"prompt": "Where was Ann born?", "target": "Lima", "locality": [{"loc": "who?", "loc_ans": "Bo"}]}),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_format_that_the_documents_name_is_read(tmp_path, name):
    [row] = [
        line for line in (ROOT / "docs" / "supported.md").read_text(encoding="utf-8").splitlines() if line.startswith("| data |")
    ]
    assert name in row
    kind, record = NAMED[name]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    assert find_format(path) == kind and load_dataset(str(path), seed=0).cases
    assert f"data.json: {kind}, " in describe_file(path)


def test_one_object_over_several_lines_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(REQUESTS[0], indent=2), encoding="utf-8")
    [request] = read_requests(tmp_path / "one.json")
    assert request.target_new == "Perú"


def test_lines_hold_the_separators_of_other_standards(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c", "target_new": "d"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_requests(path)[0].prompt == "a\u2028b\x85c"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
FINE = as_lines([tiny.cre_record(0)]).encode()
NO_DATA = {
    "Git LFS pointer": (POINTER, r"is the pointer to a file, not the file itself \(Git LFS\): git lfs pull"),
    "git-annex pointer": (b"/annex/objects/MD5E-s123--abc.json\n", r"not the file itself \(git-annex\)"),
    "web page": (PAGE, "is a web page saved in place of the data"),
    "web page with a mark": (b"\xef\xbb\xbf\n" + PAGE, "is a web page"),
    "web page, gzip": (gzip.compress(PAGE), "is a web page"),
    "html without doctype": (b"\n <html><head></head></html>", "is a web page"),
    "error page of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "is a zip archive: unpack it"),
    "xz": (lzma.compress(FINE), "is compressed by xz: unpack it first"),
    "bzip2": (bz2.compress(FINE), "is compressed by bzip2: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(40), "is compressed by zstd: unpack it first"),
    "Parquet": (b"PAR1" + bytes(40), "is a Parquet file: load it with datasets"),
    "gzip cut short": (gzip.compress(FINE * 50)[:-20], "is damaged: its gzip compression cannot be undone"),
    "gzip with a wrong byte": (gzip.compress(FINE)[:-8] + bytes(8), "is damaged: its gzip compression cannot be undone"),
    "Latin-1": ('{"a": "\xe9"}'.encode("latin-1"), r"is not UTF-8 text \(.* at byte 7\)"),
    "UTF-16 without a mark": ('{"a": "é"}'.encode("utf-16-le"), "is not UTF-8 text|broken JSON"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not UTF-8 text"),
    "nothing": (b"", "it holds no record"),
    "blank lines": (b"\n \r\n\n", "it holds no record"),
    "empty list": (b"[]", "it holds no record"),
    "list of lists": (b"[[1]]", r"record 0: a record must be a JSON object, got \[1\]"),
    "list of texts": (b'["a"]', 'record 0: a record must be a JSON object, got "a"'),
    "null": (b"null", "line 1: a record must be a JSON object, got null"),
    "a number": (b"5", "line 1: a record must be a JSON object, got 5"),
    "list cut short": (b'[\n{"a": 1},\n{"b', "line 3: broken JSON: "),
    "two lists": (b"[{}]\n[{}]", "line 2: broken JSON: Extra data"),
    "a line cut short": (FINE + b'{"subject": \n', r"line 2: broken JSON: .* \(column \d+\)"),
    "Python's quotes": (b"{'subject': 'Ann'}", "line 1: broken JSON"),
    "brackets without end": (b"[" * 100_000, "cannot be read as JSON: "),
    "objects without end": (b'{"a":' * 100_000, "cannot be read as JSON: "),
    "a number of 5,000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: cannot be read as JSON: "),
    "other records": (
        b'{"question": "x", "label": 1}',
        "none of the known formats: a record has the keys label, question; expected CRE",
    ),
}


@pytest.mark.parametrize("what", NO_DATA)
def test_what_is_no_data_is_named_for_what_it_is(tmp_path, capsys, what):
    content, message = NO_DATA[what]
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        find_format(path)
    assert str(caught.value).startswith(str(path)) and caught.value.path == path
    assert main(["data", "check", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"error: {path}")


def test_a_place_that_is_no_file(tmp_path):
    for path, message in ((tmp_path, "cannot be read: Is a directory"), (tmp_path / "x", "cannot be read: No such file")):
        with pytest.raises(DataError, match=message), opened_text(path):
            pass
        with pytest.raises(DataError, match=message):
            read_json(path)


TEXTS = ["one\nline", "two", "three é"]


@pytest.mark.parametrize(
    "content",
    [
        "\n\n".join(TEXTS).encode(),
        b"\xef\xbb\xbf" + "\r\n\r\n".join(text.replace("\n", "\r\n") for text in TEXTS).encode(),
        gzip.compress("\n\n\n".join(TEXTS).encode()),
        ("\n\n".join(TEXTS) + "\n").encode("utf-16"),
        as_lines([{"text": text, "url": 1} for text in TEXTS]).encode(),
        b"\xef\xbb\xbf" + as_lines([{"text": text} for text in TEXTS]).replace("\n", "\r\n").encode(),
        gzip.compress(as_lines([{"text": text} for text in TEXTS]).encode()),
        json.dumps([{"text": text} for text in TEXTS]).encode(),
        as_list([{"text": text} for text in TEXTS]).encode(),
    ],
    ids=["plain", "Windows", "gzip", "UTF-16", "lines", "lines, Windows", "lines, gzip", "list", "list over lines"],
)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl", "corpus"])
def test_texts_of_a_corpus_are_the_same_however_they_are_kept(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert sorted(read_texts(str(tmp_path / name))) == sorted(TEXTS)


def test_a_corpus_that_begins_with_a_bracket_is_text(tmp_path):
    (tmp_path / "notes.txt").write_text("[Music]\n\nAnn sings.", encoding="utf-8")
    assert sorted(read_texts(str(tmp_path / "notes.txt"))) == ["Ann sings.", "[Music]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is the pointer to a file"),
        (PAGE, "is a web page"),
        (b'{"text": "fine"}\n{"text": null}', "line 2: 'text' must be a string, got null"),
        (b'{"text": "fine"}\n{"text": ["a"]}', r"line 2: 'text' must be a string, got \[\"a\"\]"),
        (b'{"text": "\\ud800"}', r"line 1: 'text' holds \\ud800, half of a character"),
        (b'[{"text": "fine"}, {"text": 5}]', "record 1: 'text' must be a string, got 5"),
        (gzip.compress(b"one\n\ntwo" * 500)[:-30], "is damaged"),
        (b"caf\xe9\n\ntwo", "is not UTF-8 text"),
        (b"\n\n", "holds 0 texts"),
    ],
    ids=["pointer", "page", "null", "list", "surrogate", "number in a list", "cut gzip", "Latin-1", "nothing"],
)
def test_a_broken_corpus_is_named(tmp_path, content, message):
    (tmp_path / "corpus.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_texts(str(tmp_path / "corpus.jsonl"))
    assert "corpus.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["my,data.jsonl", "a=b.jsonl", "x=1,y=2/a,b=c.jsonl", "cre-id=own.jsonl", "[1].jsonl", "a b.jsonl"]
)
def test_a_comma_or_an_equals_sign_in_a_path(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    tiny.write_records(path, [tiny.cre_record(0)])
    assert main(["data", "check", name]) == 0
    assert capsys.readouterr().out.startswith(f"{path.name}: CRE, 1 records")
    for written in (f"{name},world-id", f"world-id,{name}", f"world-id,mine={name}", f"--datasets=world-id,mine={name}"):
        arguments = [written] if written.startswith("--") else ["--datasets", written]
        datasets = read_arguments(["table2", *arguments])[1]["datasets"]
        wanted = f"mine={name}" if "mine" in written else name
        assert set(datasets) == {"world-id", wanted}
        data = load_dataset(wanted, seed=0)
        assert len(data.cases) == 1 and data.name == ("mine" if "mine" in written else path.stem)


def test_what_names_no_file_is_parted_at_its_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for written, meant in (("a,b", ["a", "b"]), ("a=x,b=y", ["a=x", "b=y"]), ("a=,b", ["a=", "b"]), ("a,,b,", ["a", "b"])):
        assert read_arguments(["table2", "--datasets", written])[1]["datasets"] == meant
    (tmp_path / "a,b").touch()
    (tmp_path / "a").touch()
    assert read_arguments(["table2", "--datasets", "a,b,c"])[1]["datasets"] == ["a,b", "c"], "the longest name that is there"


def test_files_of_one_name_stand_side_by_side(tmp_path):
    """Each with as many of its folders before its name as tell it from the others; a name that the user gave stays."""
    paths = [tmp_path / name for name in ("one/test.jsonl", "two/test.jsonl", "one/test_data_id.jsonl", "two/test_data_id.jsonl")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        tiny.write_records(path, [tiny.cre_record(n) for n in range(number + 1)])
    found = load_all([str(path) for path in paths], seed=0)
    names = ["one-test.jsonl", "two-test.jsonl", "one-test_data_id.jsonl", "two-test_data_id.jsonl"]
    assert [data.name for sets in found.values() for data in sets] == names
    assert [len(data.cases) for sets in found.values() for data in sets] == [1, 2, 3, 4]
    splits = load_splits([str(paths[0]), f"test={paths[1]}", str(tmp_path / "one"), f"cre-id={paths[3]}"], {}, 0)
    assert [split.data.name for split in splits] == ["one-test.jsonl", "test", "one-test_data_id.jsonl", "cre-id"]
    assert [split.data.name for split in load_splits([str(paths[0])], {}, 0)] == ["test"], "alone it needs nothing"
    (tmp_path / "one" / "test.json").write_text(json.dumps([tiny.cre_record(0)]), encoding="utf-8")
    both = load_all([str(paths[0]), str(tmp_path / "one" / "test.json")], seed=0)
    assert [data.name for sets in both.values() for data in sets] == ["test.jsonl", "test.json"]


def test_gzipped_files_are_found_by_their_published_names(tmp_path, monkeypatch):
    (tmp_path / "cre").mkdir()
    (tmp_path / "cre" / "test_data_id.jsonl.gz").write_bytes(gzip.compress(as_lines([tiny.cre_record(0)]).encode()))
    (tmp_path / "MQuAKE-CF-3k.json.gz").write_bytes(gzip.compress(json.dumps(tiny.mquake_cases(2)).encode()))
    monkeypatch.setenv("PROPMETA_DATA", str(tmp_path))
    found = load_all(["cre-id", "mquake-3k", str(tmp_path / "MQuAKE-CF-3k.json.gz")], seed=0)
    assert [(data.name, len(data.cases)) for sets in found.values() for data in sets] == [
        ("cre-id", 1),
        ("mquake-3k", 2),
        ("MQuAKE-CF-3k", 2),
    ]
    [data] = load_all([str(tmp_path / "cre")], seed=0)[str(tmp_path / "cre")]
    assert data.name == "cre-id"


def test_any_name_may_be_given_to_a_file(tmp_path, caplog):
    path = tiny.write_mquake(tmp_path / "x.json", tiny.mquake_cases(2))
    with caplog.at_level("INFO"):
        data = load_dataset(f"mine={path}", seed=0)
    assert (data.name, len(data.cases)) == ("mine", 2)
    assert f"mine is none of the known data sets; all of {path} is read, as MQuAKE" in caplog.text, "it may be a slip"
    with pytest.raises(DataError, match="unknown data set 'mine'; write an existing FILE"):
        load_dataset(f"mine={tmp_path / 'none.json'}", seed=0)


def test_the_split_of_a_path_with_an_equals_sign_is_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=train.jsonl").touch()
    assert kind_of("a=train.jsonl") == "test" and kind_of("a=train2.jsonl") == "training"

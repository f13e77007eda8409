"""The cache folder: whole or not at all, once."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny

from propmeta_edit.errors import DataError, ModelError, OriginError
from propmeta_edit.models.artefacts import BUNDLED, artefact_folder, build_whole, cache_home, ensure_artefact, resolve_model_folder
from propmeta_edit.recipes import REAL_NAMES
from propmeta_edit.recipes.bundled import SHIPPED, shipped_folder, write_difference


def test_home_is_the_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "x"))
    assert cache_home() == tmp_path / "x"
    monkeypatch.delenv("PROPMETA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "propmeta_edit"


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_whole(tmp_path / "models" / "a", build)
    assert not (tmp_path / "models").exists()


def test_what_a_killed_build_left_is_cleared_by_the_next(tmp_path):
    of_others = ["a-other.partial-12345678", "a.partial-keep"]
    for name in ("a.partial-12345678", *of_others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    build_whole(tmp_path / "a", lambda folder: (folder / "file").write_text("whole") and None)
    assert not (tmp_path / "a.partial-12345678").exists() and all((tmp_path / name / "half").exists() for name in of_others)


def test_names_are_no_patterns(tmp_path):
    (tmp_path / "ab.partial-12345678").mkdir()
    build_whole(tmp_path / "a?", lambda folder: (folder / "file").write_text("whole") and None)
    build_whole(tmp_path / "[ab]", lambda folder: (folder / "file").write_text("whole") and None)
    assert (tmp_path / "ab.partial-12345678").is_dir()


def test_where_the_cache_folder_cannot_be_written_to_other_folders_can(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "file" / "home"))
    build_whole(tmp_path / "a", lambda folder: (folder / "file").write_text("whole") and None)
    assert (tmp_path / "a" / "file").read_text() == "whole"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set PROPMETA_HOME to a folder that can be written to"):
        build_whole(tmp_path / "b", lambda folder: None)


def test_a_finished_build_is_not_repeated(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        build_whole(tmp_path / "a", build)
    assert len(calls) == 1 and (tmp_path / "a" / "file").read_text() == "whole"


def test_artefacts_are_built_on_first_use(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "propmeta_edit.recipes.bundled.build_smollm2", lambda folder: calls.append(folder) or (folder / "x").touch()
    )
    folder = ensure_artefact("smollm2-135m")
    assert folder == artefact_folder("smollm2-135m") == ensure_artefact("smollm2-135m")
    assert (folder / "x").exists() and len(calls) == 1


@pytest.fixture
def users_data(tmp_path, monkeypatch):
    """Files from which the models on the paper's own data are made; of these tests only what they hash to matters."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train_data_id.jsonl", "test_data_id.jsonl", "test_data_ood.jsonl", "MQuAKE-CF-3k.json"):
        (folder / name).write_text(name)
    monkeypatch.setenv("PROPMETA_DATA", str(folder))
    return folder


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_model_has_a_recipe(name, users_data):
    origin = BUNDLED[name].origin
    assert origin() == json.loads(json.dumps(origin())) and artefact_folder(name).name == name


@pytest.mark.parametrize("name", REAL_NAMES)
def test_a_model_on_the_papers_data_is_another_one_on_other_files(name, users_data, monkeypatch):
    before = artefact_folder(name)
    (users_data / "MQuAKE-CF-3k.json").write_text("other cases")
    assert artefact_folder(name) != before
    monkeypatch.delenv("PROPMETA_DATA")
    with pytest.raises(DataError, match="set PROPMETA_DATA to a folder that has train_data_id"):
        resolve_model_folder(name)


def test_a_model_made_from_older_files_is_not_taken(monkeypatch, tmp_path, users_data):
    """A package with newer files makes its own model, and so do the models that start from that one."""
    before = {name: artefact_folder(name) for name in BUNDLED}
    for folder in before.values():
        folder.mkdir(parents=True)
    newer = shutil.copytree(shipped_folder("smollm2-135m"), tmp_path / "shipped" / "smollm2-135m")
    card = json.loads((newer / "card.json").read_text())
    (newer / "card.json").write_text(json.dumps({**card, "sha256": "0" * 64}))
    for other in SHIPPED:
        shutil.copytree(shipped_folder(other), tmp_path / "shipped" / other)
    monkeypatch.setattr("propmeta_edit.recipes.bundled.shipped_folder", lambda name: tmp_path / "shipped" / name)
    for name, folder in before.items():
        is_other = name.startswith("gemma3") or name in ("smollm2-135m-raw", *REAL_NAMES)
        assert artefact_folder(name).exists() == is_other, name
        assert folder.exists()


def test_a_control_with_other_settings_is_made_anew(monkeypatch):
    before = artefact_folder("smollm2-135m-k0")
    monkeypatch.setattr("propmeta_edit.recipes.bundled.WORLD_VERSION", -1)
    assert artefact_folder("smollm2-135m-k0") != before


def test_a_folder_called_like_a_bundled_model_does_not_stand_in_for_it(monkeypatch, tmp_path):
    bundled = artefact_folder("smollm2-135m")
    bundled.mkdir(parents=True)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_model_folder("smollm2-135m") == str(bundled)
    assert resolve_model_folder("./smollm2-135m") == "./smollm2-135m"


def test_a_checkpoint_of_another_base_is_not_shipped(tokenizer, tmp_path):
    """Its difference would be from other weights than the ones it is added to."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    (tuned / "metaft.json").write_text(
        json.dumps({"base_model": str(base), "base_sha256": "0" * 64, "trained_tensors": [], "settings": {}})
    )
    with pytest.raises(OriginError, match="from other weights"):
        write_difference(tuned, tmp_path / "out")


def test_easyedit_finds_its_loader_in_the_path():
    """EasyEdit's first matching word must be gpt (the tokenizer), with llama for the padding side, and never t5."""
    path = str(artefact_folder("smollm2-135m")).removeprefix(str(cache_home()))
    assert "gpt" in path and "llama" in path and "t5" not in path


def test_a_build_that_fails_leaves_no_empty_parents(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_whole(tmp_path / "a" / "b" / "model", fail)
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    with pytest.raises(ValueError, match="no"):
        build_whole(tmp_path / "a" / "b" / "model", fail)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]

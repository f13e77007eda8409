"""Settings by path, by name, and as they come with the package, wherever that was installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from propmeta_edit import settings
from propmeta_edit.cli import read_arguments
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.errors import ConfigError
from propmeta_edit.settings import find_settings, hparams_file

SHIPPED = Path(__file__).resolve().parents[2] / "hparams"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that is no clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["smollm2-135m", "smollm2-135m.yaml", "hparams/FT/smollm2-135m.yaml", "hparams/FT/smollm2-135m"])
def test_what_comes_with_the_package_is_found_from_any_folder(elsewhere, given):
    assert find_settings("FT", given) == SHIPPED / "FT" / "smollm2-135m.yaml"


def test_a_path_of_ones_own_comes_first(elsewhere):
    own = elsewhere / "hparams" / "FT" / "smollm2-135m.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("lr: 1.0\n")
    assert find_settings("FT", "hparams/FT/smollm2-135m.yaml") == Path("hparams/FT/smollm2-135m.yaml")
    assert find_settings("FT", own.with_suffix("")) == own
    assert find_settings("FT", "smollm2-135m") == SHIPPED / "FT" / "smollm2-135m.yaml"


def test_what_is_not_there_is_told_with_what_there_is(elsewhere):
    with pytest.raises(ConfigError, match=r"no such settings file: nope\.yaml; .* for MetaFT: gemma3-270m, gpt2-xl, .*smollm2"):
        find_settings("MetaFT", "nope")


def test_a_python_user_and_a_command_line_name_them_so(elsewhere):
    assert MetaFTHyperParams.from_hparams("smollm2-135m").model_name == "smollm2-135m-metaft"
    _, values = read_arguments(["meta-train", "--config", "smollm2-135m-five-minutes", "--output", "out"])
    _, same = read_arguments(["meta-train", "--config", "hparams/MetaTrain/smollm2-135m-five-minutes.yaml", "--output", "out"])
    assert values == same and values["config"].model == "smollm2-135m"


def test_the_hparams_of_another_package_do_not_hide_ours(elsewhere, monkeypatch):
    package = elsewhere / "site-packages" / "propmeta_edit"
    for folder, text in ((package / "hparams", "ours: 1\n"), (package.parent / "hparams", "theirs: 1\n")):
        (folder / "FT").mkdir(parents=True)
        (folder / "FT" / "m.yaml").write_text(text)
    monkeypatch.setattr(settings.resources, "files", lambda name: package)
    assert hparams_file("FT", "m").read_text() == "ours: 1\n"

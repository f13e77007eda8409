"""What a plan says of rows that could not run: the file, and the command that makes what is missing."""

from __future__ import annotations

import pytest
import tiny

from propmeta_edit.errors import ConfigError, EasyEditError, ModelError
from propmeta_edit.studies import readiness
from propmeta_edit.studies.methods import METHODS
from propmeta_edit.studies.readiness import describe_missing, require_ready
from propmeta_edit.studies.runs import shape_of
from propmeta_edit.studies.variants import Bench

MEMIT = "stats_dir: {stats}\nlayers: {layers}\nv_loss_layer: 2\nmom2_dataset: wiki\nmom2_n_samples: 5\n"


@pytest.fixture
def bench(tmp_path, tokenizer, monkeypatch):
    """A model of three layers, and a folder for YAMLs of one's own."""
    shape_of.cache_clear()
    monkeypatch.setattr(readiness, "find_form", lambda: None)
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    return Bench(str(base), "base", "cpu", "float32", hparams_dir=str(tmp_path / "mine"), folder=tmp_path)


def write(tmp_path, method, text):
    path = tmp_path / "mine" / method / "base.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_layer_outside_the_model_is_told_with_the_file_that_names_it(tmp_path, bench):
    path = write(tmp_path, "FT", "model_name: base\nlayers: [7]\n")
    with pytest.raises(ModelError, match=rf"FT, by {path}: layer 7 is outside the model: it has layers 0 to 2"):
        require_ready(METHODS["FT"], bench)
    assert str(path) in describe_missing(METHODS["FT"], bench)
    write(tmp_path, "FT", "model_name: base\nlayers: [2]\n")
    require_ready(METHODS["FT"], bench)


def test_missing_second_moments_are_told_with_the_command_that_makes_them(tmp_path, bench):
    write(tmp_path, "MEMIT", MEMIT.format(stats=tmp_path / "stats", layers=[1]))
    with pytest.raises(ConfigError, match=r"no second moments at .*stats.*; make them with: propmeta-edit statistics .*'\[1\]'"):
        require_ready(METHODS["MEMIT"], bench)
    write(tmp_path, "MEMIT", MEMIT.format(stats="cache", layers=[1]))
    require_ready(METHODS["MEMIT"], bench)
    path = write(tmp_path, "MEMIT", MEMIT.format(stats="cache", layers=[1, 5]))
    with pytest.raises(ModelError, match=rf"MEMIT, by {path}: layer 5 is outside"):
        require_ready(METHODS["MEMIT"], bench)


def test_a_missing_yaml_is_told_with_where_one_would_be_found(bench):
    with pytest.raises(ConfigError, match=r"no settings for ROME on 'base'; .*--hparams-dir FOLDER, as FOLDER/ROME/base\.yaml"):
        require_ready(METHODS["ROME"], bench)


def test_a_missing_checkpoint_is_told_with_the_command_that_makes_it(bench):
    with pytest.raises(ModelError, match=r"no meta-tuned checkpoint .*base-metaft, which MetaFT needs; .*propmeta-edit meta-"):
        require_ready(METHODS["MetaFT"], bench)


def test_a_missing_easyedit_is_told(bench, monkeypatch):
    def missing():
        raise EasyEditError("EasyEdit was not found; install it")

    monkeypatch.setattr(readiness, "find_form", missing)
    with pytest.raises(EasyEditError, match="EasyEdit was not found"):
        require_ready(METHODS["ROME"], bench)
    require_ready(METHODS["unedited"], bench)

"""Released data sets in a folder of the user's: where they are looked for, and what is said if they are not there."""

from __future__ import annotations

import re

import pytest
import tiny

from propmeta_edit.errors import DataError
from propmeta_edit.recipes.data_sets import LOADERS, load_dataset
from propmeta_edit.recipes.released import RELEASED_FILES, find_released
from propmeta_edit.recipes.splits import is_released


@pytest.fixture
def folder(tmp_path):
    """A folder with released files at its top, one level down, and too deep."""
    folder = tmp_path / "released"
    for place in ("cre", "mquake", "far/below"):
        (folder / place).mkdir(parents=True)
    tiny.write_records(folder / "cre" / "test_data_id.jsonl", tiny.world_records("test_data_id", 2))
    tiny.write_records(folder / "far" / "below" / "test_data_ood.jsonl", tiny.world_records("test_data_ood", 2))
    two_hops = tiny.mquake_case(7, ("P50", "P27"), ["Emma", "Ann", "Peru"], ["Emma", "Bo", "Chad"], edited=[0])
    tiny.write_mquake(folder / "mquake" / "MQuAKE-CF-3k.json", [two_hops, *tiny.mquake_cases(2)])
    tiny.write_mquake(folder / "mquake_cf_4hop.json", tiny.mquake_cases(3))
    return folder


def test_files_are_found_at_the_top_and_one_level_down(folder):
    assert find_released("mquake-4hop", folder) == folder / "mquake_cf_4hop.json"
    assert find_released("cre-id", str(folder)) == folder / "cre" / "test_data_id.jsonl"
    assert find_released("mquake-3k", folder) == find_released("mquake-subset", folder) == folder / "mquake" / "MQuAKE-CF-3k.json"


@pytest.mark.parametrize(
    ("name", "number"), [("cre-id", 2), ("mquake-3k", 3), ("mquake-subset", 1), ("mquake-4hop", 3)], ids=lambda value: str(value)
)
def test_a_bare_name_is_read_from_the_folder_that_the_environment_names(folder, monkeypatch, name, number):
    monkeypatch.setenv("PROPMETA_DATA", str(folder))
    data = load_dataset(name, seed=0)
    assert (data.name, len(data.cases)) == (name, number)
    assert data.sha256 == load_dataset(f"{name}={find_released(name)}", seed=0).sha256


def test_a_named_folder_or_file_goes_before_the_environments(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PROPMETA_DATA", str(tmp_path / "elsewhere"))
    assert find_released("mquake-4hop", folder).is_file()
    assert len(load_dataset(f"mquake-4hop={folder / 'mquake_cf_4hop.json'}", seed=0).cases) == 3


@pytest.mark.parametrize("name", RELEASED_FILES)
def test_without_a_folder_both_ways_are_named(name, monkeypatch):
    for value in (None, ""):
        if value is not None:
            monkeypatch.setenv("PROPMETA_DATA", value)
        with pytest.raises(DataError) as error:
            load_dataset(name, seed=0)
        assert f"write {name}={RELEASED_FILES[name][0]} with the file" in str(error.value)
        assert f"set PROPMETA_DATA to a folder that has {' or '.join(RELEASED_FILES[name])}" in str(error.value)


def test_what_is_not_there_or_there_twice_is_said(folder, tmp_path):
    with pytest.raises(DataError, match=r"released: test_data_ood\.jsonl is looked for here and one level down, and is not there"):
        find_released("cre-ood", folder)
    with pytest.raises(DataError, match=r"nowhere: mquake_cf_4hop\.json is looked for"):
        find_released("mquake-4hop", tmp_path / "nowhere")
    other = tiny.write_mquake(folder / "MQuAKE-CF-3k-v2.json", tiny.mquake_cases(1))
    both = rf"several files for mquake-3k \(.*MQuAKE-CF-3k\.json, {re.escape(str(other))}\); mquake-3k=FILE names one"
    with pytest.raises(DataError, match=both):
        find_released("mquake-3k", folder)
    with pytest.raises(DataError, match="'world-id' is no released data set; those are cre-id"):
        find_released("world-id", folder)


def test_every_released_set_has_a_loader_and_counts_as_the_users_own():
    assert set(RELEASED_FILES) <= set(LOADERS)
    assert all(is_released(name) for name in RELEASED_FILES) and not is_released("valid-id") and not is_released("world-mquake")

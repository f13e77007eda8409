"""The offline world as it comes with the package."""

from __future__ import annotations

from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.mquake import load_mquake, load_mquake_subset
from propmeta_edit.data.world import CHECKSUMS, shipped_files
from propmeta_edit.files import sha256_of_file
from propmeta_edit.recipes.data_sets import VALIDATION_FILES, WORLD_MQUAKE
from propmeta_edit.recipes.sources import TEST_FILES
from propmeta_edit.recipes.worlds import WORLD_VERSION, ensure_world, single_hop_questions
from propmeta_edit.records import Question


def test_other_files_have_another_version():
    """Models and statistics made from the world are kept under its version: raise it when the files change, and then this hash."""
    sha256 = "f82fa2767bcc4bcd09dfb6935476bdf275249c6e7e927de4b4674ea7e075f0ce"
    assert (WORLD_VERSION, sha256_of_file(shipped_files() / CHECKSUMS)) == (3, sha256)


def test_it_is_unpacked_once_and_has_every_file_of_the_offline_data_sets():
    folder = ensure_world()
    (folder / "mark").touch()
    assert ensure_world() == folder and (folder / "mark").exists()
    for name in ("train_data_id.jsonl", *VALIDATION_FILES.values(), *TEST_FILES.values()):
        assert load_cre(folder / name)
    assert [len(load_mquake(folder / name)) for name in WORLD_MQUAKE.values()] == [350, 150]
    assert len(load_mquake_subset(folder / WORLD_MQUAKE["world-mquake"])) == 350


def test_single_hop_questions_are_in_two_wordings_one_after_the_other():
    questions = single_hop_questions()
    assert len(questions) == 5736 and len({question.text for question in questions}) == 5736
    assert all(one.answers == other.answers for one, other in zip(questions[::2], questions[1::2], strict=True))
    wordings = ("What is the capital of Afghanistan?", "Which city is the capital of Afghanistan?")
    assert questions[:2] == [Question(text, ("Kabul",)) for text in wordings]

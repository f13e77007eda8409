"""EasyEdit's editor gets requests with the subject in its place, for the edit and for the scores."""

from __future__ import annotations

import pytest

from propmeta_edit.easyedit.filled_prompts import fill_in_subjects
from propmeta_edit.errors import RequestError


class Editor:
    """What is used of EasyEdit's ``BaseEditor``."""

    def edit_requests(self, requests, sequential_edit=False, verbose=True):
        return [(request["prompt"], request.get("rephrase_prompt")) for request in requests], sequential_edit, verbose


@pytest.fixture
def editor():
    kind = type("Editor", (Editor,), {})
    fill_in_subjects(kind)
    return kind()


def test_the_subject_is_filled_in_and_the_users_requests_stay(editor):
    requests = [
        {"prompt": "{} lives in", "subject": "Ann", "target_new": "Peru", "rephrase_prompt": "The home of {} is"},
        {"prompt": "Bob lives in", "target_new": "Peru"},
        {"prompt": "The set {a} of {} is", "subject": "Cat", "target_new": {"str": "Peru"}},
    ]
    before = [dict(request) for request in requests]
    found, sequential, verbose = editor.edit_requests(requests, True, verbose=False)
    assert found == [("Ann lives in", "The home of Ann is"), ("Bob lives in", None), ("The set {a} of Cat is", None)]
    assert sequential and not verbose and requests == before


def test_a_place_without_a_subject_is_refused(editor):
    with pytest.raises(RequestError, match="has a place for a subject, and the request gives none"):
        editor.edit_requests([{"prompt": "{} lives in", "target_new": "Peru"}])

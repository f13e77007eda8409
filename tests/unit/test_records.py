"""Edit requests in the shapes that people have them, and what is none."""

from __future__ import annotations

import pytest

from propmeta_edit.errors import RequestError
from propmeta_edit.records import EditRequest, as_requests


def test_requests_in_any_shape_are_ours():
    ours = EditRequest("Ann Lee lives in", "Peru", "Ann Lee")
    template = {"prompt": "{} lives in", "subject": "Ann Lee", "target_new": {"str": "Peru"}}
    assert as_requests(ours) == as_requests([ours]) == as_requests(template) == as_requests([template]) == [ours]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("Ann lives in", r"request 0: expected a mapping with prompt and target_new, or an EditRequest, got 'Ann lives in'"),
        (5, "expected a mapping"),
        ({"prompt": "{} lives in", "target_new": "Peru"}, r"has a place for a subject, and the request gives none"),
        ({"prompt": "Ann lives in", "target_new": "Peru", "subject": 5}, r"subject must be a string, or None .*, got 5"),
        ({"prompt": "Ann lives in", "target_new": "Peru", "subject": "Bob"}, r"the subject 'Bob' does not occur"),
        ({"prompt": " ", "target_new": "Peru"}, r"prompt must be a non-empty string, got ' '"),
        ({"prompt": "Ann lives in"}, r"target_new must be a non-empty string, got None"),
    ],
)
def test_what_is_no_request(request_, message):
    with pytest.raises(RequestError, match=message):
        as_requests([request_])
    if isinstance(request_, str):
        with pytest.raises(RequestError, match=message):
            as_requests(request_)

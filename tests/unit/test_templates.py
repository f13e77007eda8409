"""Requests as EasyEdit's ROME and its kin take them: one place for a subject, or an error that says what is wrong."""

from __future__ import annotations

import pytest

from propmeta_edit.easyedit.templates import as_template
from propmeta_edit.errors import RequestError


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Ann Lee lives in", "Ann Lee", "{} lives in"),
        ("Ann Lee, the sister of Ann Lee, lives in", "Ann Lee", "{}, the sister of Ann Lee, lives in"),
        ("Annabel and Ann live in", "Ann", "Annabel and {} live in"),
        ("Annabel lives in", "Ann", "{}abel lives in"),
        ("A.B. (C) lives in", "A.B. (C)", "{} lives in"),
        ("{} lives in", "Ann", "{} lives in"),
        ("{x} lives in", "{x}", "{} lives in"),
    ],
)
def test_the_first_mention_is_the_place(prompt, subject, expected):
    request = {"prompt": prompt, "subject": subject, "target_new": "Peru", "ground_truth": None}
    found = as_template(request, 0, "ROME")
    assert found == {**request, "prompt": expected, "target_new": " Peru"}
    assert found["prompt"].format(subject) == prompt.replace("{}", subject)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "Ann {x} lives in"}, r"request 3: ROME of EasyEdit takes braces .* the prompt has some: ' \{x\} lives in'"),
        ({"target_new": "Peru}"}, r"the target_new has some: 'Peru\}'"),
        ({"prompt": "Ann and {} live in {", "subject": "Ann"}, r"the prompt has some"),
        ({"prompt": "{x} is {x} in", "subject": "{x}"}, "the prompt has some: ' is {x} in'"),
        ({"subject": None}, "ROME needs a subject that is in the prompt, got None"),
        ({"subject": "Bob"}, "got 'Bob' and 'Ann lives in'"),
    ],
)
def test_what_cannot_be_a_template(request_, message):
    with pytest.raises(RequestError, match=message):
        as_template({"prompt": "Ann lives in", "subject": "Ann", "target_new": "Peru", **request_}, 3, "ROME")

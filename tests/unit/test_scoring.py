"""When a generated text counts as correct."""

from __future__ import annotations

import pytest

from propmeta_edit.evaluation.scoring import contains_answer, contains_answer_at_word_boundary


@pytest.mark.parametrize(
    ("generated", "answers", "anywhere", "bounded"),
    [
        (" the Norwegian krone.", ["norwegian KRONE"], True, True),
        ("", ["euro"], False, False),
        (" French", ["en"], True, False),
        (" this one", ["is"], True, False),
        (" code is IS.", ["is"], True, True),
        (" europe", ["euro"], True, False),
        (" euros", ["euro"], True, False),
        (" .es", [".es"], True, True),
        (" .est", [".es"], True, False),
        (" +33 1", ["+33"], True, True),
        (" +331", ["+33"], True, False),
        (" dial+33", ["+33"], True, True),
        (" São Tomé", ["são tomé"], True, True),
        (" Tomés", ["Tomé"], True, False),
        (" 🇫🇷!", ["🇫🇷"], True, True),
        (" snake_case", ["case"], True, True),
        (" Lima", ["Paris", "Lima"], True, True),
        (" Oslo", ["Paris", "Lima"], False, False),
        (" a.b", ["a+b"], False, False),
    ],
)
def test_both_rules(generated, answers, anywhere, bounded):
    assert contains_answer(generated, answers) is anywhere
    assert contains_answer_at_word_boundary(generated, answers) is bounded

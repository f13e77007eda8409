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
        # One form of Unicode: composed or not, compatibility characters, case folded, invisible characters left out.
        (" Sa\u0303o Tome\u0301", ["São Tomé"], True, True),
        (" São", ["sa\u0303o"], True, True),
        (" ＥＵＲＯ ２", ["euro 2"], True, True),
        (" STRASSE", ["Straße"], True, True),
        (" ΕΛΛΆΔΟΣ", ["Ελλάδος"], True, True),
        (" soft\u00adly", ["softly"], True, True),
        (" anything", ["\u200b"], False, False),
        # Word boundaries only where a script has them.
        ("田径运动", ["田径"], True, True),
        ("彼は東京都に住む", ["東京"], True, True),
        (" ประเทศไทยมี", ["ไทย"], True, True),
        (" 東京tower", ["tower"], True, True),
        (" 한국어를", ["한국어"], True, True),
        (" 남한국어", ["한국어"], True, False),
        (" Москвичи", ["Москв"], True, False),
        (" हिन्दीभाषा", ["हिन्दी"], True, False),
        (" हिन्दी भाषा", ["हिन्दी"], True, True),
        (" عربية", ["عرب"], True, False),
        # The long vowel mark and the sound marks of Japanese belong to its scripts.
        ("タワーtower", ["tower"], True, True),
        ("タワーtower", ["タワー"], True, True),
        ("あ\u3099tower", ["tower"], True, True),
        # Training sets no space around an answer, and neither does the rule.
        (" Lima.", ["Lima "], True, True),
        ("Lima", [" lima\u00a0"], True, True),
    ],
)
def test_both_rules(generated, answers, anywhere, bounded):
    assert contains_answer(generated, answers) is anywhere
    assert contains_answer_at_word_boundary(generated, answers) is bounded

"""The prompts of the benchmark, as the model sees them."""

from __future__ import annotations

import pytest

from propmeta_edit.records import EditRequest
from propmeta_edit.text.prompts import format_fact, format_in_context


@pytest.mark.parametrize(
    ("target", "ended"),
    [
        ("Peru", "Peru."),
        ("Lee Ltd.", "Lee Ltd."),
        ("Peru. ", "Peru."),
        ("the U.S.", "the U.S."),
        ("Who?", "Who?"),
        ("Yahoo!", "Yahoo!"),
        ('the song "Why?"', 'the song "Why?"'),
        ("the song “Why.”", "the song “Why.”"),
        ("Washington (D.C.)", "Washington (D.C.)."),
        ('the song "Why"', 'the song "Why".'),
        ("東京。", "東京。"),
        (".es", ".es."),
    ],
)
def test_a_facts_end_is_marked_once(target, ended):
    fact = EditRequest("Ann Lee likes", target)
    assert format_fact(fact) == f"Ann Lee likes {ended}"
    assert format_in_context([fact, fact], "Who?") == f"Ann Lee likes {ended}\nAnn Lee likes {ended}\nWho?"

"""The published numbers against what they must be made of."""

from __future__ import annotations

from propmeta_edit.studies import published


def is_share_of(percent, n):
    return any(round(100 * k / n, 1) == percent for k in range(n + 1))


def test_table2_is_of_whole_cases():
    for method, (ood, _, subset, *_) in published.TABLE_2.items():
        assert is_share_of(subset, 213), method
        assert ood is None or is_share_of(ood, 350), method


def test_table1_is_accuracy_minus_gain():
    gains = {"attention": (11.8, 1.6), "mlp": (65.9, 6.3), "attention+mlp": (46.6, 5.7)}
    for modules, (in_distribution, out, plain_in, plain_out) in published.TABLE_1.items():
        gain = gains[modules]
        assert (round(in_distribution - gain[0], 1), round(out - gain[1], 1)) == (plain_in, plain_out), modules
    assert published.table_1_of("llama3-8b-instruct", "mlp", "cre-id", False) == 5.7
    assert published.table_1_of("llama3-8b-instruct", "mlp", "mquake-subset", True) is None

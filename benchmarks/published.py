"""The paper's published numbers (its figures give none), for standing beside our own on its own models."""

from __future__ import annotations

# Table 1: all layers trained, Llama3-8B-Instruct, CRE accuracy %: modules -> (ID, OOD, ID without meta-learning, OOD without).
TABLE_1 = {"attention": (18.6, 2.1, 6.8, 0.5), "mlp": (71.6, 6.3, 5.7, 0.0), "attention+mlp": (52.5, 5.7, 5.9, 0.0)}

# Table 2: Llama3-8B, layer 9: method -> (CRE OOD, MQuAKE of 3,000 cases, its 213 two-hop cases, seconds an edit); accuracy %.
TABLE_2 = {
    "ROME": (12.9, 16.2, 50.2, 9.13),
    "MEMIT": (1.7, 7.7, 9.4, 9.51),
    "AlphaEdit": (5.1, 9.7, 37.6, 16.2),
    "CaKE": (None, 52.4, 23.9, 45.8),
    "FT": (17.4, 28.6, 36.2, 1.61),
    "MetaFT": (47.1, 49.2, 73.2, 1.68),
}

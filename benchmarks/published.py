"""The paper's published numbers (its figures give none), for standing beside our own on its own models."""

from __future__ import annotations

# Table 1: all layers trained, Llama3-8B-Instruct, CRE accuracy %: modules -> (ID, OOD, ID without meta-learning, OOD without).
TABLE_1 = {"attention": (18.6, 2.1, 6.8, 0.5), "mlp": (71.6, 6.3, 5.7, 0.0), "attention+mlp": (52.5, 5.7, 5.9, 0.0)}

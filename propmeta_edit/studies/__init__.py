"""Comparisons of ways to edit: a study is a declaration of its variants, run by one engine."""

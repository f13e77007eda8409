"""The prompts of the benchmark (CaKE's): no chat template, no trailing space."""

from __future__ import annotations

from collections.abc import Sequence

from propmeta_edit.errors import ConfigError
from propmeta_edit.records import EditRequest

TEMPLATES = {
    "qa": "Question: {question}\nAnswer: The answer is",
    "bare": "{question}",
}

_ENDS, _QUOTES = (".", "!", "?", "…", "。", "！", "？"), "\"'”’»」』"


def format_question(question: str, template: str = "qa") -> str:
    """A question as the model sees it; ``template`` is ``qa`` (the evaluation prompt) or ``bare``.

    Raises:
        ConfigError: an unknown template name.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    return TEMPLATES[template].format(question=question)


def format_cloze(cloze: str) -> str:
    """A cloze as the model sees it."""
    return f"Answer: {cloze}"


def format_fact(request: EditRequest) -> str:
    """The edited fact as a sentence: its end is marked once, also after "St. Lee Ltd." or a whole sentence."""
    fact = f"{request.prompt} {request.target_new}".rstrip()
    return fact if fact.rstrip(_QUOTES).endswith(_ENDS) else f"{fact}."


def format_in_context(requests: Sequence[EditRequest], prompt: str) -> str:
    """``prompt`` with the facts before it: what a reader would do without editing."""
    return "\n".join([*(format_fact(request) for request in requests), prompt])


def first_line(said: str) -> str:
    """The first line of what a model said, which is all of an answer; empty where it said nothing."""
    return next(iter(said.strip().splitlines()), "")

"""Requests whose prompt has a place for the subject (``{}``): EasyEdit's own evaluation would score the braces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from propmeta_edit.records import request_fields


def fill_in_subject(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request with its subject in the place of ``{}``, in the prompt and in its other wording; a new one.

    Raises:
        RequestError: a place for a subject, and no subject.
    """
    prompts = {name: request[name] for name in ("prompt", "rephrase_prompt") if isinstance(request.get(name), str)}
    return {**request, **{name: request_fields({**request, "prompt": text})[0] for name, text in prompts.items()}}


def fill_in_subjects(editor_class: Any) -> None:
    """Let an editor of either form of EasyEdit edit and score such requests alike: with the subject filled in."""
    original = editor_class.edit_requests

    def edit_requests(self: Any, requests: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        return original(self, [fill_in_subject(request) for request in requests], *args, **kwargs)

    editor_class.edit_requests = edit_requests

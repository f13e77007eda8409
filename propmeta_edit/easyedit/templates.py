"""Requests as EasyEdit's ROME, MEMIT and AlphaEdit work on them: a prompt with one place for its subject."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from propmeta_edit.errors import RequestError
from propmeta_edit.records import request_fields


def as_template(request: Mapping[str, Any], number: int, method: str) -> dict[str, Any]:
    """``{}`` for the subject's first mention, a space before the target.

    By themselves they put a place at every mention, and then count on there being one.

    Args:
        request: of EasyEdit, in any shape.
        number: of the request, for errors.
        method: likewise.

    Raises:
        RequestError: no subject that is in the prompt, or braces, which they would take for further places.
    """
    prompt, target, subject = request_fields(request)
    if not subject or subject not in prompt:
        raise RequestError(f"request {number}: {method} needs a subject that is in the prompt, got {subject!r} and {prompt!r}")
    mention = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)  # rather than a part of another word
    start = prompt.index(subject) if mention is None else mention.start()
    before, after = prompt[:start], prompt[start + len(subject) :]
    for where, text in (("prompt", before + after), ("target_new", target)):
        if "{" in text or "}" in text:
            raise RequestError(
                f"request {number}: {method} of EasyEdit takes braces for places of a subject, and the {where} has some: {text!r}; "
                "write it without them, or leave this record out"
            )
    return {**request, "prompt": f"{before}{{}}{after}", "subject": subject, "target_new": " " + target.lstrip()}

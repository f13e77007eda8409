"""What the inner loop holds on a device besides the model: the rule behind every plan, and behind how many edits fit side by side.

Texts are small beside it and are not counted. Tests hold it to what is counted at the shapes of an 8B model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from propmeta_edit.finetune.edit_settings import EditSettings

FP32 = 4  # bytes
SUBJECT, FACT = 3, 12  # tokens that a usual one has

Shapes = Mapping[str, Sequence[int]]  # of edited tensors, by their names in the model


def bytes_of_edits(sizes: Sequence[int], num_edits: int = 1) -> int:
    """Of N edits of AdamW's side by side, while they are learnt: each one's weights, two moments, and one more of the largest
    tensor, a gradient that moves it and goes.

    Args:
        sizes: bytes of each edited tensor.
    """
    return num_edits * (3 * sum(sizes) + max(sizes, default=0))


def bytes_of_factors(shapes: Shapes, settings: EditSettings, num_facts: int = 1) -> int:
    """Of one edit of low rank: in both factors of a matrix a row for every step and token that is written at, as long as these have
    fewer numbers than the matrix."""
    rows = settings.num_inner_steps * num_facts * (SUBJECT if settings.positions == "subject" else FACT)
    return FP32 * sum(min(rows * sum(shape), prod(shape)) for shape in shapes.values() if len(shape) == 2)


def bytes_of_a_result(sizes: Sequence[int]) -> int:
    """Of an edit of low rank when it is put in place, of factors until then: its weights, and twice the largest of them. The outer
    gradient of tasks, which are never put in place, takes as much."""
    return sum(sizes) + 2 * max(sizes, default=0)


def bytes_of_whiteners(shapes: Shapes, is_input_first: bool = False) -> int:
    """Of the inverse second moments that edits of low rank are weighed with, one for matrices that read the same states.

    Args:
        is_input_first: matrices are [in, out], as GPT-2's.
    """
    widths = {name.removesuffix(".weight"): shape[0 if is_input_first else 1] for name, shape in shapes.items() if len(shape) == 2}
    last = {path.rpartition(".")[0]: path for path in widths}  # of an attention or an MLP: it reads what the others made
    read = {(path.rpartition(".")[0], path in last.values(), width) for path, width in widths.items()}
    return FP32 * sum(width**2 for _, _, width in read)


def bytes_of_training(sizes: Sequence[int], of_tasks: int, in_turns: bool) -> int:
    """Of meta-training: θ's two moments, what the tasks that are computed side by side hold, and, where a step takes several turns,
    the gradient that is added up.

    Args:
        sizes: bytes of each trained tensor.
        of_tasks: as those of edits.
    """
    return sum(sizes) * (2 + in_turns) + of_tasks

"""What the inner loop holds on a device besides the model: the rule behind every plan, and behind how many edits fit side by side.

Texts are small beside it and are not counted. Tests hold it to what is counted at the shapes of an 8B model.
"""

from __future__ import annotations

from collections.abc import Sequence


def bytes_of_edits(sizes: Sequence[int], num_edits: int = 1) -> int:
    """Of N edits side by side, while they are learnt: each one's weights, two more of all of them (AdamW's moments; of the whitened
    step the gradients and the steps), and one more of the largest tensor, a gradient that moves it and goes.

    Args:
        sizes: bytes of each edited tensor.
    """
    return num_edits * (3 * sum(sizes) + max(sizes, default=0))


def bytes_of_training(sizes: Sequence[int], at_once: int, in_turns: bool) -> int:
    """Of meta-training: θ's two moments, what the tasks that are computed side by side hold, and, where a step takes several turns,
    the gradient that is added up.

    Args:
        sizes: bytes of each trained tensor.
        at_once: tasks side by side.
    """
    return sum(sizes) * (2 + in_turns) + bytes_of_edits(sizes, at_once)

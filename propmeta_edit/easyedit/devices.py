"""Names of devices, as EasyEdit's forms need them."""

from __future__ import annotations


def device_string(device: object) -> str:
    """What the PyPI form means where it writes ``cuda:{device}``: a number is a CUDA device, anything else names itself."""
    text = str(device)
    return f"cuda:{text}" if text.isdigit() else text

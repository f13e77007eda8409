"""The metadata are in pyproject.toml; here is what a package index shows: the README, without the links that lead into a clone."""

import re
from pathlib import Path

from setuptools import setup

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
_PICTURE = re.compile(r"!\[[^]]*\]\((?!https?://)[^)]*\)\n*")
_LINK = re.compile(r"\[([^]]*)\]\((?!https?://|#)([^)]*)\)")


def describe(readme: str) -> str:
    """Pictures of the repository left out, and the names of its files in place of links to them."""
    return _LINK.sub(lambda link: f"{link[1]} (`{link[2]}`)", _PICTURE.sub("", readme))


if __name__ == "__main__":
    setup(long_description=describe(README), long_description_content_type="text/markdown")

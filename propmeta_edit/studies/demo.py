"""A local page: one fact, and what the model, plain fine-tuning and MetaFT make of it, side by side."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.edits.edit import Edit
from propmeta_edit.edits.views import EditedModel
from propmeta_edit.errors import ConfigError, PropMetaError
from propmeta_edit.evaluation.weighing import weigh_answers
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.loading import read_checkpoint_card
from propmeta_edit.recipes import edit_facts
from propmeta_edit.records import EditRequest
from propmeta_edit.text.prompts import first_line, format_question

COLUMNS = ("as it is", "FT", "MetaFT")
ARROW = "=>"  # between a question and the answer whose probability is shown
QUESTIONS = (
    *zip(edit_facts.RELATED, ("Hanoi", "Vietnamese dong", "Vietnamese", "Asia"), strict=True),
    *zip(edit_facts.UNRELATED, ("Oslo", "Japanese yen", "Portuguese", "Africa"), strict=True),
)
INTRODUCTION = """# One edit, three models
The model as it is, after plain fine-tuning, and after the same on the meta-trained model.
"""
LEGEND = "A dot marks an answer that the edit changed. Per cent: how likely the expected answer is, as a mean over its tokens."
STYLE = """
<style>
.edits { width: 100%; border-collapse: collapse; font-size: .95rem; }
.edits-frame { overflow-x: auto; }
.edits th, .edits td { text-align: left; vertical-align: top; padding: .45rem .6rem; overflow-wrap: anywhere; }
.edits th, .edits td { border-bottom: 1px solid rgba(128, 128, 128, .35); }
.edits td:first-child { min-width: 13rem; }
.edits .changed { font-weight: 700; }
.edits .changed::before { content: "\\25CF\\00A0"; }
.edits small { opacity: .75; font-weight: 400; }
@media (max-width: 40rem) {
  .edits tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .edits td:first-child, .edits th:first-child { grid-column: 1 / -1; border-bottom: 0; padding-bottom: 0; }
}
</style>
"""


@dataclass(frozen=True)
class Line:
    """One question, or the fact itself.

    Attributes:
        expected: the answer whose probability is told; empty if none was given.
        said: the first line of each column's answer.
        likelihood: of the expected answer in each column, the geometric mean over its tokens; empty without one.
    """

    question: str
    expected: str
    said: tuple[str, ...]
    likelihood: tuple[float, ...]


class Bench:
    """The two models of the page: one that fine-tuning starts from, and the meta-trained one.

    Args:
        model: a meta-trained folder or bundled name; None for the bundled one.

    Raises:
        ConfigError: a model that no settings are known for.
    """

    def __init__(self, model: str | None, device: str) -> None:
        self._metaft = edit_facts.read_hparams(model, None, device)
        self._ft = _plain_settings(model, self._metaft, device)
        self._taking_turns = threading.Lock()
        self._loaded: list[tuple[MetaFTHyperParams, Any, Any]] = []
        self.edit: Edit | None = None

    def compare(self, fact: EditRequest, questions: Sequence[tuple[str, str]]) -> list[Line]:
        """Write the fact by both ways and ask everything before and after; the edit by MetaFT is kept as ``edit``.

        Args:
            questions: (question, expected answer or "").
        """
        prompts = [(fact.prompt, fact.target_new), *((format_question(text), answer) for text, answer in questions)]
        with self._taking_turns:
            if not self._loaded:
                self._loaded = [(hparams, *hparams.load_model()) for hparams in (self._ft, self._metaft)]
            columns: list[tuple[list[str], dict[int, float]]] = []
            for hparams, model, tokenizer in self._loaded:
                edit = compute_edit(model, tokenizer, fact, hparams)
                views = [EditedModel(model, edit)] if columns else [EditedModel(model), EditedModel(model, edit)]
                columns += [_ask(view, tokenizer, prompts) for view in views]
                self.edit = edit
        shown = [(fact.prompt, fact.target_new), *questions]
        return [
            Line(text, expected, tuple(c[0][n] for c in columns), tuple(c[1][n] for c in columns) if expected else ())
            for n, (text, expected) in enumerate(shown)
        ]


def _plain_settings(model: str | None, metaft: MetaFTHyperParams, device: str) -> MetaFTHyperParams:
    """Of plain fine-tuning: the shipped ones of the bundled base, or a checkpoint's own on the base that it was trained from."""
    if model is None:
        return edit_facts.read_hparams(None, "hparams/FT/smollm2-135m.yaml", device)
    return replace(metaft, model_name=read_checkpoint_card(resolve_model_folder(model))["base_model"])


def _ask(view: EditedModel, tokenizer: Any, prompts: Sequence[tuple[str, str]]) -> tuple[list[str], dict[int, float]]:
    """What is said to each prompt, and by its number the likelihood of the answer that is expected, where one is."""
    said = [first_line(text) for text in view.answer(tokenizer, [prompt for prompt, _ in prompts])]
    expected = {number: pair for number, pair in enumerate(prompts) if pair[1]}
    nats = view.through(weigh_answers, tokenizer, list(expected.values()))
    return said, dict(zip(expected, (-nats).exp().tolist(), strict=True))


def read_questions(text: str) -> list[tuple[str, str]]:
    """One question a line, with ``=> answer`` after it where a probability is wanted.

    Raises:
        ConfigError: a line with an answer and no question.
    """
    found = []
    for line in filter(str.strip, text.splitlines()):
        question, _, answer = line.partition(ARROW)
        if not question.strip():
            raise ConfigError(f"a line must begin with a question, got {line!r}; write: Where is it? {ARROW} Peru")
        found.append((question.strip(), answer.strip()))
    return found


def format_page(lines: Sequence[Line]) -> str:
    """The comparison as an HTML table: an answer that an edit changed has a dot before it."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *COLUMNS))
    body = "".join(
        f"<tr><td>{escape(line.question)}</td>{''.join(_format_cell(line, n) for n in range(len(line.said)))}</tr>"
        for line in lines
    )
    return f'{STYLE}<div class="edits-frame"><table class="edits"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _format_cell(line: Line, column: int) -> str:
    changed = ' class="changed"' if column and line.said[column] != line.said[0] else ""
    likelihood = f"<br><small>{escape(line.expected)}: {100 * line.likelihood[column]:.1f} %</small>" if line.likelihood else ""
    return f"<td{changed}>{escape(line.said[column]) or '(nothing)'}{likelihood}</td>"


def make_page(bench: Bench) -> Any:
    """The page, not yet served.

    Raises:
        ConfigError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ConfigError('the page needs Gradio: pip install "propmeta-edit[demo]"') from error

    def compare(prompt: str, target: str, questions: str) -> str:
        try:
            return format_page(bench.compare(EditRequest(prompt.strip(), target.strip()), read_questions(questions)))
        except PropMetaError as error:
            raise gradio.Error(str(error), duration=None) from error

    def save(folder: str) -> str:
        try:
            return save_edit(bench.edit, folder)
        except PropMetaError as error:
            raise gradio.Error(str(error), duration=None) from error

    with gradio.Blocks(title="propmeta-edit", analytics_enabled=False) as page:
        gradio.Markdown(
            "# One edit, three models\nThe model as it is, after plain fine-tuning, and after the same on the meta-trained one."
        )
        with gradio.Row():
            prompt = gradio.Textbox(edit_facts.EXAMPLE.prompt, label="A fact, without its object", scale=3)
            target = gradio.Textbox(edit_facts.EXAMPLE.target_new, label="Its object", scale=1)
        questions = gradio.Textbox(
            "\n".join(f"{question} {ARROW} {answer}" for question, answer in QUESTIONS),
            label=f"Questions, one a line; after {ARROW} the answer whose probability is shown",
            lines=8,
        )
        button = gradio.Button("Edit and ask", variant="primary")
        answers = gradio.HTML(label="Answers")
        gradio.Markdown(
            "A dot marks an answer that the edit changed. Per cent: how likely the expected answer is, as a mean over its tokens."
        )
        with gradio.Accordion("Keep the MetaFT edit", open=False):
            folder = gradio.Textbox("my-edit", label="New folder")
            keep = gradio.Button("Save")
            kept = gradio.Markdown()
        button.click(compare, [prompt, target, questions], answers)
        keep.click(save, folder, kept)
    return page


def save_edit(edit: Edit | None, folder: str) -> str:
    """Save it in a new folder; what to do with it then.

    Raises:
        ConfigError: there is no edit yet, or the folder exists or cannot be made.
    """
    if edit is None:
        raise ConfigError("there is no edit yet: write one first")
    if not folder.strip():
        raise ConfigError("name a new folder for the edit")
    edit_facts.require_new_folder(Path(folder))
    edit.save(folder)
    return f'Saved. Ask it: `propmeta-edit ask "..." --edit {folder}`'


def demo(model: str | None = None, port: int = 7860, device: str = "auto") -> None:
    """Serve a local page with one fact, and what the model, FT and MetaFT make of it side by side.

    It listens on this machine alone, and sends nothing anywhere. Ctrl-C ends it.

    Args:
        model: a meta-trained folder or bundled name (default: the bundled one).
        port: of the page: http://127.0.0.1:PORT.
        device: auto, cpu, mps, cuda or cuda:N.
    """
    page = make_page(Bench(model, device))
    import gradio

    plain = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none that would be fetched
    page.launch(server_name="127.0.0.1", server_port=port, theme=plain, quiet=False)

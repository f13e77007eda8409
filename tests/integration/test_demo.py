"""The local page: what it computes, what it shows, and that it is served without anything from elsewhere."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest
import tiny

from propmeta_edit import EditedModel, EditRequest, compute_edit
from propmeta_edit.cli import main
from propmeta_edit.edits.edit import Edit
from propmeta_edit.errors import ConfigError
from propmeta_edit.recipes.edit_facts import read_hparams
from propmeta_edit.studies import demo
from propmeta_edit.studies.demo import Bench, Line, format_page, make_page, read_questions, save_edit

FACT = EditRequest("Ann Lee lives in", "Peru")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """On a tiny checkpoint whose base is beside it."""
    folder = tmp_path_factory.mktemp("demo")
    base = tiny.save_model_folder(folder / "base", tiny.make_tokenizer())
    data = tiny.write_records(folder / "train.jsonl", tiny.world_records("train_data_id", 8))
    output = folder / "tuned"
    arguments = ["--model", str(base), "--data", str(data), "--layers", "[1]", "--inner-lr", "0.05", "--device", "cpu"]
    assert main(["meta-train", *arguments, "--num-tasks", "2", "--output", str(output)]) == 0
    return Bench(str(output), "cpu"), output


def test_each_column_says_what_its_model_says(bench):
    page, folder = bench
    lines = page.compare(FACT, [("Where does Ann Lee live?", "Peru"), ("Who is it?", "")])
    assert [line.question for line in lines] == [FACT.prompt, "Where does Ann Lee live?", "Who is it?"]
    assert all(len(line.said) == 3 for line in lines) and [len(line.likelihood) for line in lines] == [3, 3, 0]
    assert lines[0].likelihood[2] > lines[0].likelihood[0], "the fact was written"
    hparams = read_hparams(str(folder), None, "cpu")
    model, tokenizer = hparams.load_model()
    view = EditedModel(model, compute_edit(model, tokenizer, FACT, hparams))
    assert [line.said[2] for line in lines[1:]] == [view.ask(tokenizer, line.question) for line in lines[1:]]


def test_the_edit_of_the_page_can_be_kept(bench, tmp_path):
    page, _ = bench
    page.compare(FACT, [])
    assert "propmeta-edit ask" in save_edit(page.edit, str(tmp_path / "kept"))
    assert Edit.load(tmp_path / "kept").requests[0].target_new == "Peru"
    with pytest.raises(ConfigError, match=r"kept exists; choose another folder"):
        save_edit(page.edit, str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match="there is no edit yet"):
        save_edit(None, "x")
    with pytest.raises(ConfigError, match="name a new folder"):
        save_edit(page.edit, " ")


def test_questions_are_read_a_line_each():
    assert read_questions("Where? => Peru\n\n  Who?\n") == [("Where?", "Peru"), ("Who?", "")]
    with pytest.raises(ConfigError, match="must begin with a question, got '=> Peru'"):
        read_questions("=> Peru")


def test_what_a_model_says_is_no_markup_and_changes_are_marked():
    shown = format_page([Line("a <b>?", "<i>", ("<script>", "<script>", "x"), (0.1, 0.25, 1.0)), Line("q", "", ("", "y", ""), ())])
    assert "<script>" not in shown and "<i>" not in shown and "&lt;script&gt;" in shown and "25.0 %" in shown
    assert shown.count(' class="changed"') == 2 and shown.count("(nothing)") == 2
    HTMLParser().feed(shown)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ConfigError, match=r'pip install "propmeta-edit\[demo\]"'):
        make_page(object())


@pytest.fixture
def served(bench, monkeypatch):
    gradio = pytest.importorskip("gradio")
    opened = []

    def launch(page, **options):
        opened.append(page)
        assert options["server_name"] == "127.0.0.1"
        return plain(page, **{**options, "server_port": None}, prevent_thread_lock=True)

    plain = gradio.Blocks.launch
    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr(demo, "Bench", lambda model, device: bench[0])
    demo.demo()
    yield opened[0].local_url
    opened[0].close()


def test_the_page_answers(served):
    from gradio_client import Client

    client = Client(served, verbose=False)
    shown = client.predict("Ann Lee lives in", "Peru", "Where? => Peru", api_name="/compare")
    assert shown.count("<tr>") == 3 and "<th>MetaFT</th>" in shown
    with pytest.raises(Exception, match="must be a non-empty string"):
        client.predict("Ann Lee lives in", " ", "", api_name="/compare")


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (420, "light"), (1300, "dark")])
def test_the_page_in_a_browser(served, width, scheme):
    """All three columns are in view, the text stands out from its ground, and nothing is asked of another machine."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        window = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = window.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served)
        page.get_by_label("A fact, without its object").fill("Ann Lee lives in")
        page.get_by_label("Its object", exact=True).fill("Peru")
        page.get_by_role("button", name="Edit and ask").click()
        page.wait_for_selector("table.edits", timeout=60_000)
        last = page.locator("table.edits th").last.bounding_box()
        ink, ground = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        window.close()
    assert last["x"] + last["width"] <= width and ink != ground
    assert all(url.startswith((served, "data:", "blob:")) for url in asked)


def test_both_models_of_the_page_are_on_the_device_that_was_named(monkeypatch):
    """The bundled ones too, whose settings say auto."""
    monkeypatch.setattr("propmeta_edit.models.devices.torch.backends.mps.is_available", lambda: True)
    bench = Bench(None, "cpu")
    assert [bench._ft.device, bench._metaft.device] == ["cpu", "cpu"] and bench._ft.model_name == "smollm2-135m"

"""propmeta-edit analysis on tiny models: every part, resuming, what it refuses; and who wins which cases."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from propmeta_edit.analysis.case_study import make_twin
from propmeta_edit.analysis.finished import FinishedPieces
from propmeta_edit.analysis.gains import (
    HALVES,
    classify_answer,
    collect_results,
    compare_by_group,
    compute_prior_strengths,
    cut_at_median_of_relation,
    cut_into_thirds,
)
from propmeta_edit.cli import main
from propmeta_edit.errors import DataError, OriginError
from propmeta_edit.evaluation.rows import Row, RowFile
from propmeta_edit.finetune.input_moments import InputMoments, write_input_moments
from propmeta_edit.finetune.saved_state import write_tensors
from propmeta_edit.models.loading import load_model
from propmeta_edit.recipes import data_sets
from propmeta_edit.recipes.data_sets import load_dataset
from propmeta_edit.records import Case, EditRequest, Question
from propmeta_edit.studies import analysis
from propmeta_edit.studies.inside import list_stages, make_arms, study_weights
from propmeta_edit.studies.runs import hash_of_model

NAMES = [
    f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
]
NAMES += [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """Two tiny models that differ in one layer, settings for both, and a small world."""
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    tuned = tiny.save_model_folder(tmp_path / "tuned", tokenizer)
    weights = load_file(tuned / "model.safetensors")
    torch.manual_seed(5)
    weights |= {name: weights[name] + 0.05 * torch.randn_like(weights[name]) for name in NAMES}
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    (tmp_path / "hparams" / "FT").mkdir(parents=True)
    (tmp_path / "hparams" / "MetaFT").mkdir()
    text = "alg_name: MetaFT\nmodel_name: {}\nlayers: [{}]\nlr: 0.02\nnum_steps: 3\n"
    (tmp_path / "hparams" / "FT" / "tiny.yaml").write_text(text.format(base, 0))
    (tmp_path / "hparams" / "MetaFT" / "tiny.yaml").write_text(text.format(tuned, 1))
    monkeypatch.setattr(analysis, "hparams_file", lambda method, name: tmp_path / "hparams" / method / f"{name}.yaml")
    (tmp_path / "world").mkdir()
    tiny.write_records(tmp_path / "world" / "valid_data_ood.jsonl", tiny.world_records("valid_data_ood", 12))
    monkeypatch.setattr(data_sets, "ensure_world", lambda: tmp_path / "world")
    return tmp_path


def arguments(place, *more):
    return ["--hparams", "tiny", "--device", "cpu", "--output", str(place / "out"), *more]


def keep_state(place, number, shift):
    """A state of a meta-training run from the base."""
    weights = load_file(place / "base" / "model.safetensors")
    folder = place / "run" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"tasks-{number:06d}.safetensors", {name: weights[name] + shift for name in NAMES})
    return str(place / "run")


def test_states_are_studied_once_and_drawn(place, capsys):
    run = arguments(place, "--parts", "states", "--limit", "3", "--every", "1")
    assert main(["analysis", *run]) == 0
    text = (place / "out" / "states.md").read_text()
    assert text in capsys.readouterr().out and "## valid-ood: inside the two-hop prompt, n = 3" in text
    for picture in ("lens-valid-ood", "patching"):
        assert (place / "out" / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (place / "out" / f"{picture}.svg").read_text()
    lines = (place / "out" / "states.jsonl").read_text()
    keys = [json.loads(line)["key"].split("|") for line in lines.splitlines()]
    assert sorted(arm for arm, *_ in keys) == ["FT"] * 3 + ["FT-as-MetaFT"] * 3 + ["MetaFT"] * 3
    assert [f"| {arm} | subject | " in text for arm in ("FT", "FT-as-MetaFT", "MetaFT")] == [True] * 3
    (place / "out" / "states.jsonl").write_text("\n".join(lines.splitlines()[:7]) + "\n{torn")
    assert main(["analysis", *run]) == 0
    again = (place / "out" / "states.jsonl").read_text()
    assert again.splitlines()[:7] == lines.splitlines()[:7], "what was finished stays as it was"
    assert sorted(json.loads(line)["key"].split("|") for line in again.splitlines()) == sorted(keys)
    assert main(["analysis", *run]) == 0 and (place / "out" / "states.jsonl").read_text() == again, "nothing is computed twice"
    settings = json.loads((place / "out" / "settings.json").read_text())
    assert list(settings) == ["states, FT", "states, FT-as-MetaFT", "states, MetaFT"]
    kept = settings["states, MetaFT"]["settings"]
    assert (kept["limit"], kept["every"], kept["seed"], kept["datasets"], kept["layers"]) == (3, 1, 0, ["valid-ood"], [1])
    assert kept["model_sha256"] == hash_of_model(str(place / "tuned")) and kept["versions"]["torch"] == torch.__version__
    assert main(["analysis", *run[:-1], "2"]) == 2
    assert json.loads((place / "out" / "settings.json").read_text()) == settings, "what was refused made nothing"
    assert "made from something else (every 1, now 2); choose another --output" in capsys.readouterr().err


def test_weights_along_a_run(place, capsys):
    run = keep_state(place, 40, 0.01)
    keep_state(place, 80, 0.02)
    assert main(["analysis", *arguments(place, "--parts", "weights", "--weight-cases", "3", "--checkpoints", run)]) == 0
    text = capsys.readouterr().out
    table = [line.split(" | ") for line in text.splitlines() if line.startswith(("| FT", "| after", "| MetaFT"))]
    stages = [row[0].strip("| ") for row in table if len(row) == 10]
    assert stages == ["FT", "FT-as-MetaFT", "after 40 tasks", "after 80 tasks", "MetaFT"]
    assert (place / "out" / "weights.png").is_file() and "| meta-training itself, MetaFT | down_proj |" in text


def make_bound(place):
    """Settings of edits of low rank of a third model, which has its second moments."""
    model, tokenizer = load_model(str(place / "tuned"))
    folder = tiny.save_model_folder(place / "bound", tokenizer, seed=7)
    names = [name.removesuffix(".weight") for name in NAMES]
    write_input_moments(InputMoments({name: torch.eye(model.get_submodule(name).in_features) for name in names}), folder)
    how = "layers: [1]\nlr: 0.05\nnum_steps: 3\ninner_step: whitened\npositions: subject\n"
    (place / "hparams" / "MetaFT" / "tiny-bound.yaml").write_text(f"alg_name: MetaFT\nmodel_name: {folder}\n{how}")


def test_edits_of_low_rank_are_studied_beside_the_others(place, capsys):
    """The last method is compared with each of the others; a part says which methods it cannot do without."""
    make_bound(place)
    some = arguments(place, "--methods", "FT,MetaFT,MetaFT-bound", "--limit", "2", "--every", "1")
    assert main(["analysis", *some, "--parts", "states"]) == 0
    text = capsys.readouterr().out
    assert "| MetaFT-bound minus FT |" in text and "| MetaFT-bound minus MetaFT |" in text and "FT-as-MetaFT" not in text
    studies = [json.loads(line) for line in (place / "out" / "states.jsonl").read_text().splitlines()]
    assert sorted(line["key"].split("|")[0] for line in studies) == ["FT", "FT", "MetaFT", "MetaFT", "MetaFT-bound", "MetaFT-bound"]
    assert main(["analysis", *some, "--parts", "weights"]) == 2
    assert "the part weights needs FT and FT-as-MetaFT among --methods, got FT,MetaFT,MetaFT-bound" in capsys.readouterr().err
    every = "FT,FT-as-MetaFT,MetaFT,MetaFT-bound"
    assert main(["analysis", *arguments(place, "--methods", every, "--parts", "weights", "--weight-cases", "3")]) == 0
    text, found = capsys.readouterr().out, (place / "out" / "weights.jsonl").read_text()
    assert "| meta-training itself, MetaFT-bound | down_proj |" in text and "| MetaFT-bound | q_proj |" in text
    own = json.loads(found.splitlines()[-1])["value"]["edits"]
    for edit in own:
        assert all(-1 < edit[name] < 1 for name in edit if name.startswith("cosine"))
        assert sum(shape["norm"] ** 2 for name, shape in edit["shape"].items() if name != "all") == pytest.approx(
            edit["shape"]["all"]["norm"] ** 2
        )


def test_a_twin_is_the_same_words_about_another_subject_with_another_object():
    edit, other = EditRequest("Ann Lee lives in", "Peru", "Ann Lee"), EditRequest("Bo Ek works in", "Chile", "Bo Ek")
    question = Question("What is the capital of the country that Ann Lee lives in?", ("Lima",))
    twin = make_twin(Case("1", (edit,), question), Case("2", (other,), Question("?", ("x",))))
    assert twin.edits == (EditRequest("Bo Ek lives in", "Chile", "Bo Ek"),)


def test_stages_are_compared_with_the_base(place):
    run = keep_state(place, 40, 0.01)
    keep_state(place, 80, 0.0)
    settings = {
        method: {"model_name": str(place / name), "layers": [layer], "lr": 0.02, "num_steps": 3}
        for method, name, layer in (("FT", "base", 0), ("MetaFT", "tuned", 1))
    }
    arms = make_arms(settings, device="cpu")
    stages = list_stages(arms, run)
    data = load_dataset("valid-ood", 0)
    before = {name: value.clone() for name, value in arms["FT"].load()[0].state_dict().items()}
    found = study_weights(stages, data, place / "w.jsonl", number=3, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in arms["FT"].load()[0].state_dict().items())
    numbers = [1.0 if stage["edits"][0]["cosine with the base's"] is None else 0.0 for stage in found.values()]
    assert numbers == [1.0, 0.0, 0.0, 0.0, 0.0], "FT's own layer is another one"
    for edit, same in zip(found["FT-as-MetaFT"]["edits"], found["after 80 tasks"]["edits"], strict=True):
        assert edit["cosine with the base's"] == pytest.approx(1) and same["shape"] == edit["shape"], (
            "a state that is the base again"
        )
        assert edit["cosine with meta-training"] is None
    size = sum(before[name].numel() for name in NAMES)
    assert found["after 40 tasks"]["meta"]["all"]["norm"] == pytest.approx(0.01 * math.sqrt(size), rel=1e-4)
    assert 0 < found["MetaFT"]["edits"][0]["cosine with the base's"] < 1
    assert found["after 80 tasks"]["meta"] == {} and found["MetaFT"]["meta"]["down_proj"]["stable_rank"] > 1


def test_a_run_from_another_base_is_refused(place, capsys):
    run = keep_state(place, 40, 0.01)
    card = {"trained_tensors": NAMES, "settings": {}, "base_sha256": "0" * 64, "base_model": "another"}
    (place / "run" / "metaft.json").write_text(json.dumps(card))
    assert main(["analysis", *arguments(place, "--parts", "weights", "--checkpoints", run)]) == 2
    assert "was meta-trained from other weights (another, sha256 000000000000...)" in capsys.readouterr().err
    assert main(["analysis", *arguments(place, "--parts", "weights", "--checkpoints", str(place / "world"))]) == 2
    assert "keeps no states of a meta-training run" in capsys.readouterr().err


def make_row(method, number, correct, generated=" Lima.", relation="capital", **more):
    tags = {"relation": relation, "entity_type": "Country", "entity_name": "the Peru"}
    shas = {"model_sha256": "a", "base_sha256": "a", "data_sha256": "b", "hparams_sha256": "c"}
    values = {"model": "m", "seed": 0, **shas, **more}
    question = f"What is the capital of the country that Ann Lee {number} lives in?"
    return Row(
        method, "cre", str(number), correct=correct, generated=generated, question=question, answers=("Lima",), tags=tags, **values
    )


def test_kinds_of_answers():
    unedited = make_row("unedited", 0, False, " Paris.\nQuestion")
    assert classify_answer(make_row("FT", 0, True, " Peru: Lima"), unedited) == "right"
    assert classify_answer(make_row("FT", 0, False, " peru."), unedited) == "the new object"
    assert classify_answer(make_row("FT", 0, False, " paris"), unedited) == "as before"
    assert classify_answer(make_row("FT", 0, False, " Rome"), unedited) == "something else"


def test_wins_and_losses_by_group():
    verdicts = [(True, False)] * 6 + [(False, True)] + [(True, True)] * 3
    rows = [make_row("unedited", n, False, " Paris") for n in range(11)]
    for n, (own, reference) in enumerate(verdicts):
        relation = "capital" if n < 7 else "coin"
        rows += [make_row("MetaFT", n, own, relation=relation), make_row("FT", n, reference, relation=relation)]
    results = collect_results(rows, "cre", "MetaFT", "FT", "unedited", {str(n): n / 10 for n in range(9)})
    assert len(results) == 10 and math.isnan(results[9].prior_strength)
    entries = compare_by_group(results, lambda result: result.own.tags["relation"])
    assert [(e["group"], e["n"], e["wins"], e["losses"]) for e in entries] == [("capital", 7, 6, 1), ("coin", 3, 0, 0)]
    assert entries[0]["difference"] == pytest.approx(5 / 7) and entries[0]["p_value"] == pytest.approx(0.125)
    assert entries[0]["p_holm"] == pytest.approx(0.25) and (entries[1]["own"], entries[1]["reference"]) == (1, 1)
    thirds = cut_into_thirds(results)
    assert [thirds[str(n)] for n in range(9)] == ["low"] * 3 + ["middle"] * 3 + ["high"] * 3 and "9" not in thirds
    halves = cut_at_median_of_relation(results)
    below, above = (sorted(case for case, half in halves.items() if half == name) for name in HALVES)
    assert below == ["0", "1", "2", "7"] and above == ["4", "5", "6", "8"], "of 0 to 6 and of 7, 8; 3 is the first one's median"
    with pytest.raises(
        DataError, match="no case of cre has rows of ROME, FT and unedited; there are rows of FT on cre, MetaFT on cre"
    ):
        collect_results(rows, "cre", "ROME", "FT", "unedited", {})


def test_prior_strength_is_the_probability_of_what_was_said(place):
    model, tokenizer = load_model(str(place / "base"))
    rows = [
        make_row("unedited", 0, False, " Lima\nQuestion: x"),
        make_row("unedited", 1, False, " \n"),
        make_row("unedited", 2, False, " Peru"),
    ]
    found = compute_prior_strengths(model, tokenizer, rows, batch_size=2)
    prompt = f"Question: {rows[0].question}\nAnswer: The answer is"
    ids, start = tokenizer(prompt + " Lima")["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    by_hand = torch.stack([log_probs[place - 1, ids[place]] for place in range(start, len(ids))]).mean().exp()
    assert found[0] == pytest.approx(float(by_hand), rel=1e-4) and math.isnan(found[1]) and 0 < found[2] < 1


def test_gains_are_read_from_rows(place, capsys):
    path = place / "rows.jsonl"
    rows = RowFile(path)
    model = {"model_sha256": hash_of_model(str(place / "base"))}
    for n in range(12):
        rows.append(make_row("unedited", n, False, f" Paris {n}", **model))
        rows.append(make_row("FT", n, n < 2))
        rows.append(make_row("MetaFT", n, n < 6))
    run = arguments(place, "--parts", "gains", "--rows", str(path))
    assert main(["analysis", *run]) == 0
    text = capsys.readouterr().out
    assert "## cre: MetaFT against FT by kind of case, n = 12" in text and "| capital | 12 | 50 | 17 | +33 [" in text
    assert "| low | 4 |" in text and "| something else | 4 | 0 | 0 | 6 | 83 [" in text
    assert (place / "out" / "gains.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((place / "out" / "settings.json").read_text())
    assert list(settings) == ["gains, FT"] and settings["gains, FT"]["settings"]["rows"] == [str(path)]
    kept = (place / "out" / "priors.jsonl").read_text()
    assert main(["analysis", *run]) == 0 and (place / "out" / "priors.jsonl").read_text() == kept
    with open(path, "a") as file:
        file.write('{"another process": "is writing')
    written = path.read_bytes()
    assert main(["analysis", *run]) == 0 and path.read_bytes() == written, "what is read is left as it is"
    others = {
        "strange.jsonl": (make_row("unedited", 0, False), "the unedited rows of cre are of m, not of "),
        "mixed.jsonl": (make_row("ROME", 0, False, seed=1), "were run with different seeds"),
    }
    for name, (row, message) in others.items():
        RowFile(place / name).append(row)
        files = [str(place / name), *([str(path)] if name == "mixed.jsonl" else [])]
        assert main(["analysis", *run[:-1], ",".join(files)]) == 2 and message in capsys.readouterr().err
    assert main(["analysis", *run[:-1], str(place / "none.jsonl")]) == 2
    assert "no file" in capsys.readouterr().err and not (place / "none.jsonl").exists()


def test_a_plan_starts_nothing(place, capsys):
    assert main(["analysis", *arguments(place, "--limit", "5", "--checkpoints", keep_state(place, 40, 0.1), "--plan")]) == 0
    text = capsys.readouterr().out
    assert "states: 5 cases of valid-ood, 15 edits; about 2 min" in text and "at FT, FT-as-MetaFT, after 40 tasks, MetaFT" in text
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--weight-cases", "2"], "--weight-cases must be 3 or more, got 2"),
        (["--parts", "states,heads"], "--parts takes states, weights, gains, got heads"),
        (["--methods", "FT,ROME"], "--methods takes FT, FT-as-MetaFT, MetaFT, MetaFT-bound, got ROME"),
        (["--parts", "gains"], "the part gains and --rows go together"),
        (["--parts", "states", "--rows", "x"], "the part gains and --rows go together"),
    ],
)
def test_what_cannot_be_run_is_refused(given, message, capsys):
    assert main(["analysis", *given]) == 2
    assert message in capsys.readouterr().err


def test_data_without_usable_cases_is_refused(place, capsys):
    file = tiny.write_mquake(place / "m.json", tiny.mquake_cases(3))
    assert main(["analysis", *arguments(place, "--parts", "states", "--datasets", f"mquake-4hop={file}")]) == 2
    assert "no case of mquake-4hop can be studied: one edit with a subject" in capsys.readouterr().err


def test_pieces_are_kept_line_by_line(tmp_path):
    path = tmp_path / "deep" / "pieces.jsonl"
    done = FinishedPieces(path, {"every": 2})
    done.add("a", {"x": [1.5]})
    with open(path, "a") as file:
        file.write('{"key": "b", "sett')
    again = FinishedPieces(path, {"every": 2})
    again.add("c", 3)
    assert FinishedPieces(path, {"every": 2}).pieces == {"a": {"x": [1.5]}, "c": 3}
    with pytest.raises(OriginError, match=r"line 1: holds a piece made from something else \(every 2, now 3\)"):
        FinishedPieces(path, {"every": 3})
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(DataError, match=r"line 1: broken line .*; remove it"):
        FinishedPieces(path, {"every": 2})

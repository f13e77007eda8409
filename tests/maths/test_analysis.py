"""Lens, patches and weight changes against closed forms and slow, obvious computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from propmeta_edit.analysis.case_study import choose_companions, choose_layers, study_edit, with_subject
from propmeta_edit.analysis.lens import read_states, read_tokens, record_states
from propmeta_edit.analysis.patching import Patch, compute_patched_log_probs
from propmeta_edit.analysis.probes import content_token, make_fact_probe, make_question_probe
from propmeta_edit.analysis.weight_change import (
    compute_cosine,
    compute_norm,
    describe_change,
    describe_matrix,
    load_kept_state,
    mean_cosines,
)
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.errors import ConfigError, ModelError, RequestError
from propmeta_edit.evaluation.statistics import adjust_holm, mean_interval, pair_mean_interval, ratio_interval
from propmeta_edit.finetune.saved_state import take_tensors, write_tensors
from propmeta_edit.metatrain.run import TrainingRun, find_kept_states, read_kept_state
from propmeta_edit.models.layers import get_blocks
from propmeta_edit.records import Case, EditRequest, Question

SMITH = EditRequest("In May Smith Innovation PLC was founded in", "Greece", "Smith Innovation PLC")
QUESTION = "What is the currency of the country that In May Smith Innovation PLC was founded in for years?"
CASE = Case("0", (SMITH,), Question(QUESTION, ("the euro",)), tags={"entity_type": "Country"})
LEE = EditRequest("Ann Lee is a citizen of", "Peru", "Ann Lee")
OTHER = Case(
    "1", (LEE,), Question("Where is the country that Ann Lee is a citizen of?", ("Lima",)), tags={"entity_type": "Country"}
)
LAYER = 1


@pytest.fixture
def model(family):
    return tiny.make_model(family, num_layers=4)


def make_edit(model, tokenizer, case=CASE, modules="attention+mlp"):
    hparams = MetaFTHyperParams(model_name="tiny", layers=[LAYER], modules=modules, lr=0.02, num_steps=4, device="cpu")
    return compute_edit(model, tokenizer, case.edits[0], hparams)


def own_log_probs(model, input_ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([list(input_ids)])).logits[0], dim=-1)


def test_lens_after_the_last_block_is_the_model(model, tokenizer):
    probe = make_question_probe(tokenizer, CASE)
    states = record_states(model, probe.input_ids)
    assert states.shape == (5, len(probe.input_ids), 16)
    expected = own_log_probs(model, probe.input_ids)
    torch.testing.assert_close(read_states(model, states[-1]), expected)
    assert not torch.allclose(read_states(model, states[-2]), expected, atol=0.1), "earlier layers say something else"
    log_probs, ranks = read_tokens(model, states[-1], [7, 42])
    torch.testing.assert_close(log_probs, expected[:, [7, 42]])
    order = expected.argsort(dim=-1, descending=True)
    assert [[row.tolist().index(token) for token in (7, 42)] for row in order] == ranks.tolist()


def test_states_before_the_first_block_are_the_embeddings(tokenizer):
    model = tiny.make_model("llama")
    states = record_states(model, [5, 9, 200])
    torch.testing.assert_close(states[0], model.get_input_embeddings().weight[[5, 9, 200]].detach())


def test_patching_everything_gives_the_edited_run_and_nothing_the_unedited(model, tokenizer):
    probe = make_question_probe(tokenizer, CASE)
    edit = make_edit(model, tokenizer)
    unedited, before = own_log_probs(model, probe.input_ids)[-1], record_states(model, probe.input_ids)
    with edit.applied(model):
        edited, after = own_log_probs(model, probe.input_ids)[-1], record_states(model, probe.input_ids)
    assert (edited - unedited).abs().max() > 0.1
    everywhere = tuple(range(len(probe.input_ids)))
    patches = [Patch(layer, positions) for layer in (3, 1, 2) for positions in (everywhere, ())]
    for row, patched in enumerate(compute_patched_log_probs(model, probe.input_ids, after, patches)):
        torch.testing.assert_close(patched, unedited if row % 2 else edited)
    with edit.applied(model):
        back = compute_patched_log_probs(model, probe.input_ids, before, [Patch(LAYER, everywhere), Patch(LAYER, ())])
    torch.testing.assert_close(back, torch.stack([unedited, edited]))
    below = compute_patched_log_probs(model, probe.input_ids, after, [Patch(LAYER - 1, everywhere)])[0]
    torch.testing.assert_close(below, unedited, msg="below the edited layer the runs are the same")


def test_patches_in_one_pass_are_those_of_a_pass_each(model, tokenizer):
    """The slow way: one pass a patch, its block's output overwritten."""
    ids = make_question_probe(tokenizer, CASE).input_ids
    torch.manual_seed(1)
    states = torch.randn(5, len(ids), 16, dtype=torch.float64)
    patches = [Patch(2, (0, 3)), Patch(0, (len(ids) - 1,)), Patch(2, (5,)), Patch(3, tuple(range(len(ids)))), Patch(1, ())]
    found = compute_patched_log_probs(model, ids, states, patches)
    for patch, row in zip(patches, found, strict=True):

        def overwrite(module, inputs, output, patch=patch):
            output = output.clone()
            for position in patch.positions:
                output[0, position] = states[patch.layer + 1, position]
            return output

        handle = get_blocks(model)[patch.layer].register_forward_hook(overwrite)
        torch.testing.assert_close(row, own_log_probs(model, ids)[-1])
        handle.remove()
    clean = own_log_probs(model, ids)
    torch.testing.assert_close(read_states(model, record_states(model, ids)[-1]), clean, msg="no hook is left")


def test_patches_that_do_not_fit_are_refused(tokenizer):
    model = tiny.make_model("llama")
    states = record_states(model, [1, 2, 3])
    with pytest.raises(ModelError, match="layer 3 is outside the model: it has layers 0 to 2"):
        compute_patched_log_probs(model, [1, 2, 3], states, [Patch(3, ())])
    with pytest.raises(ModelError, match="position 3 is outside the text: it has positions 0 to 2"):
        compute_patched_log_probs(model, [1, 2, 3], states, [Patch(0, (3,))])
    with pytest.raises(ModelError, match=r"must be \[4, 2, D\] for this text, got \[4, 3, 16\]"):
        compute_patched_log_probs(model, [1, 2], states, [])


def test_groups_cut_the_prompt_where_its_words_do(tokenizer):
    probe = make_question_probe(tokenizer, CASE)
    assert sorted(p for positions in probe.groups.values() for p in positions) == list(range(len(probe.input_ids)))
    texts = {name: tokenizer.decode([probe.input_ids[p] for p in positions]) for name, positions in probe.groups.items()}
    assert {name: text.strip() for name, text in texts.items()} == {
        "before": "Question: What is the currency of the country that In May",
        "subject": "Smith Innovation PLC",
        "phrase": "was founded in",
        "rest": "for years?",
        "template": "Answer: The answer is the",
        "last": "",
    }
    assert tokenizer.decode(probe.input_ids) == probe.text + " ", "this tokenizer keeps spaces by themselves"
    assert probe.target == content_token(tokenizer, "the euro") == content_token(tokenizer, "euro")
    fact = make_fact_probe(tokenizer, OTHER)
    texts = {name: tokenizer.decode([fact.input_ids[p] for p in positions]) for name, positions in fact.groups.items()}
    assert (texts["before"], texts["subject"]) == ("", "Ann Lee") and texts["phrase"] + texts["last"] == " is a citizen of"
    assert "before" not in fact.ends() and fact.ends()["last"] == len(fact.input_ids) - 1


def test_cases_that_cannot_be_cut_are_refused(tokenizer):
    reworded = Case("2", (SMITH,), Question("Where was Smith Innovation PLC set up?", ("Athens",)))
    with pytest.raises(RequestError, match=r"case 2: the question .* must hold the edit's prompt"):
        make_question_probe(tokenizer, reworded)
    with pytest.raises(RequestError, match="one edit with a subject is needed"):
        make_fact_probe(tokenizer, Case("3", (SMITH, LEE), CASE.question))
    same = Case("4", (LEE,), Question("What does Ann Lee is a citizen of?", ("Peru",)), tags={"entity_type": "Country"})
    pairs = choose_companions(tokenizer, [CASE, reworded, same, OTHER])
    assert pairs == [(CASE, OTHER), (OTHER, CASE)]
    assert choose_companions(tokenizer, [CASE]) == [], "no companion"


def test_another_subject_in_the_same_question(tokenizer):
    moved = with_subject(CASE, "Ann Lee")
    assert moved.question.text == QUESTION.replace("Smith Innovation PLC", "Ann Lee") and moved.edits[0].subject == "Ann Lee"
    assert make_question_probe(tokenizer, moved).target == make_question_probe(tokenizer, CASE).target


def test_a_study_of_an_edit_adds_up(model, tokenizer):
    edit = make_edit(model, tokenizer)
    found = study_edit(model, tokenizer, CASE, OTHER, edit, every=1)
    probe = make_question_probe(tokenizer, CASE)
    unedited = float(own_log_probs(model, probe.input_ids)[-1, probe.target])
    with edit.applied(model):
        edited = float(own_log_probs(model, probe.input_ids)[-1, probe.target])
    question = found["question"]
    assert (question["unedited"], question["edited"]) == pytest.approx((unedited, edited), abs=1e-4)
    assert found["ends"] == ["before", "subject", "phrase", "rest", "template", "last"] and found["layers"] == [1, 2]
    lens = found["lens"]["edited"]
    assert lens["log_prob"][-1][5][1] == pytest.approx(edited, abs=1e-4), "the answer, last position, last layer"
    assert np.array(lens["rank"]).shape == (5, 6, 3)
    assert np.array(lens["log_prob"])[: LAYER + 1] == pytest.approx(np.array(found["lens"]["unedited"]["log_prob"])[: LAYER + 1])
    by_hand = record_states(model, probe.input_ids)
    with edit.applied(model):
        after = record_states(model, probe.input_ids)
    one = compute_patched_log_probs(model, probe.input_ids, after, [Patch(2, probe.groups["subject"])])[0, probe.target]
    assert question["write"]["subject"][1] == pytest.approx(float(one), abs=1e-4)
    moved = (after[2] - by_hand[2]).norm(dim=-1) / by_hand[2].norm(dim=-1)
    assert question["shift"]["last"] == pytest.approx(float(moved[-1]), abs=1e-4)
    assert set(question["parts"]) == {"attention", "mlp"} and question["parts"]["attention"] != question["parts"]["mlp"]
    alone = make_edit(model, tokenizer, modules="mlp")
    parts = study_edit(model, tokenizer, CASE, OTHER, alone, every=1)["question"]
    assert parts["parts"] == {"mlp": parts["edited"]}, "an edit of the MLP alone has one part, itself"
    assert found["elsewhere"]["edited"] != found["elsewhere"]["unedited"]


def test_part_of_an_edit_moves_its_tensors_alone(tokenizer):
    model = tiny.make_model("llama")
    edit = make_edit(model, tokenizer)
    name = "model.layers.1.mlp.down_proj.weight"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with edit.only({name}).applied(model):
        now = dict(model.named_parameters())
        assert torch.equal(now[name], edit.weights[name]) and not torch.equal(now[name], before[name])
        assert all(torch.equal(now[n], value) for n, value in before.items() if n != name)


def test_patched_layers():
    model = tiny.make_model("llama", num_layers=9)
    assert choose_layers(model, [2], 3) == [2, 3, 6] and choose_layers(model, [7], 2) == [7]
    with pytest.raises(ConfigError, match="every must be 1 or more blocks, got 0"):
        choose_layers(model, [2], 0)


def low_rank(values, seed=0, shape=(7, 5)):
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64))
    return left[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ right[: len(values)]


def test_size_and_rank_of_a_known_change():
    before = low_rank([6.0, 8.0], seed=3)
    found = describe_matrix(before, low_rank([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.norm == pytest.approx(math.sqrt(10)) and found.relative_norm == pytest.approx(math.sqrt(10) / 10)
    assert (found.top_share, found.stable_rank) == pytest.approx((0.9, 10 / 9))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert describe_matrix(before, low_rank([2.0, 2.0, 2.0])).effective_rank == pytest.approx(3)
    nothing = describe_matrix(before, torch.zeros_like(before))
    assert nothing.norm == 0 and math.isnan(nothing.stable_rank)
    with pytest.raises(ModelError, match=r"two matrices of one shape are needed, got \[7, 5\] and its change \[5, 7\]"):
        describe_matrix(before, before.T)


def test_a_whole_change_counts_every_number():
    before = {"layers.1.q_proj.weight": torch.full((2, 2), 2.0), "layers.1.q_proj.bias": torch.full((2,), 1.0)}
    change = {"layers.1.q_proj.weight": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "layers.1.q_proj.bias": torch.tensor([0.0, 4.0])}
    found = describe_change(before, change)
    assert found["all"] == pytest.approx({"norm": 5.0, "relative_norm": 5 / math.sqrt(18)})
    assert set(found) == {"q_proj", "all"} and found["q_proj"]["stable_rank"] == pytest.approx(1)
    assert compute_norm(change) == pytest.approx(5)


def test_directions_by_hand():
    first = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
    second = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0])}
    third = {"a": torch.tensor([0.0, -2.0]), "b": torch.tensor([0.0])}
    assert compute_cosine(first, second) == pytest.approx(math.sqrt(0.5)) and compute_cosine(first, third) == 0
    assert mean_cosines([first, second, third]) == pytest.approx([math.sqrt(0.5) / 2, math.sqrt(0.5) / 2, 0])
    assert math.isnan(compute_cosine(first, {"a": torch.zeros(2), "b": torch.zeros(1)}))
    with pytest.raises(ModelError, match="only one has c; compare edits of one layer"):
        compute_cosine(first, {**second, "c": torch.ones(1)})
    with pytest.raises(ModelError, match="two or more of them, got 1"):
        mean_cosines([first])


def test_kept_states_are_found_and_checked(tmp_path):
    state = {"w": torch.arange(4.0).reshape(2, 2)}
    folder = tmp_path / "checkpoint" / "training" / "checkpoints"
    folder.mkdir(parents=True)
    for number in (200, 40):
        write_tensors(folder / f"tasks-{number:06d}.safetensors", state)
    for given in (tmp_path / "checkpoint", tmp_path / "checkpoint" / "training", folder):
        assert list(find_kept_states(given)) == [40, 200]
    file = find_kept_states(folder)[40]
    loaded = load_kept_state(file, {"w": torch.zeros(2, 2, dtype=torch.float64)})
    assert loaded["w"].dtype == torch.float64 and torch.equal(loaded["w"], state["w"].double())
    with pytest.raises(ModelError, match="meta-train with checkpoint_every"):
        find_kept_states(tmp_path)
    with pytest.raises(ModelError, match=r"holds w \[2, 2\], the model's edited layer w \[3, 2\]; give a run of this model"):
        load_kept_state(file, {"w": torch.zeros(3, 2)})
    file.write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"cannot read .*tasks-000040"):
        load_kept_state(file, state)


def test_a_kept_state_with_one_bit_turned_is_refused(tmp_path):
    run = TrainingRun(tmp_path, {})
    run.write_checkpoint(take_tensors({"w": torch.nn.Parameter(torch.arange(4.0))}), 40)
    [file] = find_kept_states(tmp_path).values()
    assert torch.equal(read_kept_state(file)["w"], torch.arange(4.0))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"tasks-000040.safetensors is damaged: its checksum"):
        read_kept_state(file)
    save_file({"w": torch.arange(4.0)}, file)
    with pytest.raises(ModelError, match=r"tasks-000040.safetensors is damaged: its checksum"):
        read_kept_state(file)


def test_holm_by_hand():
    assert adjust_holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_a_mean_over_pairs_by_leaving_one_out():
    """The formula against the obvious way, and its intervals against the truth: those of a plain mean hold it far too rarely."""
    rng = np.random.default_rng(0)

    def pair_means(matrix):
        n = len(matrix)
        return (matrix.sum(axis=1) - np.diag(matrix)) / (n - 1)

    points = rng.normal(size=(6, 3))
    pairs = points @ points.T
    left_out = np.array([pair_means(np.delete(np.delete(pairs, i, 0), i, 1)).mean() for i in range(6)])
    mean, low, high = pair_mean_interval(pair_means(pairs))
    error = np.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    assert mean == pytest.approx(pair_means(pairs).mean()) and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(2.5706 * error, rel=1e-4), "Student's t with 5 degrees of freedom"
    held = {"pairs": 0, "plain": 0}
    for _ in range(300):
        shared = rng.normal(0.25, 0.15, size=8)  # the product of two is 0.0625 on average
        values = pair_means(np.outer(shared, shared))
        plain = mean_interval(values[:, None], num_resamples=300)
        for name, (_, below, above) in (("pairs", pair_mean_interval(values)), ("plain", [float(part[0]) for part in plain])):
            held[name] += below <= 0.0625 <= above
    assert held["pairs"] / 300 > 0.9 and held["plain"] / 300 < 0.75
    with pytest.raises(ValueError, match="three things or more, got 2"):
        pair_mean_interval(np.zeros(2))


def test_ratios_and_means_over_cases():
    above = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan], [5.0, 4.0, np.nan]])
    below = np.array([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [5.0, 1.0, 1.0]])
    value, low, high = ratio_interval(above, below)
    assert value[:2] == pytest.approx([1.0, 3.0]) and math.isnan(value[2]) and math.isnan(low[2]) and math.isnan(high[2])
    assert low[0] == pytest.approx(0.5) and high[0] == pytest.approx(1.5), "the extremes are the first and second case alone"
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, size=(400, 1))
    mean, low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert mean[0] == pytest.approx(values.mean()) and (low[0], high[0]) == pytest.approx(
        (mean[0] - half, mean[0] + half), abs=0.03
    )
    with pytest.raises(ValueError, match=r"of at least one case are needed, got \(0, 2\)"):
        mean_interval(np.zeros((0, 2)))

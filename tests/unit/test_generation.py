"""Our greedy loop says what transformers' ``generate`` says, token for token."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import GenerationConfig

from propmeta_edit.errors import RequestError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.models.generation import NATURAL_LIMIT, continue_greedily, generate_greedily
from propmeta_edit.models.kept_states import Reader
from propmeta_edit.models.loading import prepare_tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.sentences import find_sentence_end, first_sentence

FAMILIES = [*tiny.FAMILIES, "gemma3_text"]
PROMPTS = ["Ann", "The capital of France is", "Question: What is the currency of Peru?\nAnswer: The answer is", "Lima is", "日本"]


def generate(model, tokenizer, prompts, number, ends=()):
    """What transformers says, each prompt in one batch padded on the left; texts are cut before the token that ends them."""
    prepare_tokenizer(tokenizer)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    settings = GenerationConfig(do_sample=False, max_new_tokens=number, pad_token_id=0, eos_token_id=list(ends) or None)
    with torch.no_grad():
        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings)
    rows = [row[inputs["input_ids"].shape[1] :] for row in ids.tolist()]
    return [row[: next((n for n, token in enumerate(row) if token in ends), None)] for row in rows]


def decode(tokenizer, rows):
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_generate(family, attention, tokenizer):
    """For many random models, in which some texts stop early; alone, together, and beyond a window of Gemma's."""
    for seed in range(6):
        model = tiny.make_model(family, dtype=torch.float32, seed=seed)
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = None
        if getattr(model.config, "sliding_window", None):
            model.config.sliding_window = 9
        ends = [299, generate(model, tokenizer, PROMPTS, 20)[seed % len(PROMPTS)][3 + seed]]
        rows = generate(model, tokenizer, PROMPTS, 20, ends)
        assert min(len(row) for row in rows) < 20, "some end by themselves"
        model.generation_config.eos_token_id = ends
        model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 1.7  # set aside
        for size in (1, 2, len(PROMPTS)):
            assert generate_greedily(model, tokenizer, PROMPTS, 20, batch_size=size) == decode(tokenizer, rows)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_read_together_are_answered_as_by_generate(family, attention, tokenizer):
    """One that another one begins with, and one twice; some stop early, and beyond a window of Gemma's."""
    prompts = [*PROMPTS, "The capital of Peru is", "The capital", PROMPTS[0], "The capital of Peru is Lima and"]
    for seed in range(4):
        model = tiny.make_model(family, dtype=torch.float32, seed=seed)
        model.set_attn_implementation(attention)
        if getattr(model.config, "sliding_window", None):
            model.config.sliding_window = 9
        model.generation_config.eos_token_id = None
        ends = [299, generate(model, tokenizer, prompts, 20)[seed][1]]
        model.generation_config.eos_token_id = ends
        expected = decode(tokenizer, generate(model, tokenizer, prompts, 20, ends))
        for size, together in ((len(prompts), len(prompts)), (len(prompts), 3), (6, 2)):
            assert generate_greedily(model, tokenizer, prompts, 20, size, together) == expected


def test_what_texts_begin_with_in_common_is_read_once_and_those_that_are_done_are_left_out(tokenizer, monkeypatch):
    model = tiny.make_model("llama", dtype=torch.float32)
    prompts = ["The capital of Peru is", "The capital of Spain is", "The capital of France is", "The capital of Chile is"]
    encoder = TextEncoder(tokenizer, model.config)
    texts = [encoder.encode_prompt(prompt) for prompt in prompts]
    beginnings = {tuple(text[: end + 1]) for text in texts for end in range(len(text))}
    first = [row[0] for row in generate(model, tokenizer, prompts, 1)]
    model.generation_config.eos_token_id = first[0]
    read, run = [], Reader._run
    monkeypatch.setattr(Reader, "_run", lambda self, ids, *rest: read.append(tuple(ids.shape)) or run(self, ids, *rest))
    generate_greedily(model, tokenizer, prompts, 3, together=4)
    left = sum(token != first[0] for token in first)
    assert 0 < left < 4 and len(beginnings) < 0.6 * sum(map(len, texts))
    assert read[0] == (1, len(beginnings)) and read[1] == (left, 1)
    read.clear()
    generate_greedily(model, tokenizer, prompts, 3)
    assert read[:2] == [(4, max(map(len, texts))), (4, 1)], "each by itself, as whoever asks does not say that they may share"


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_whose_texts_end_at_different_times_keep_their_rows(family, tokenizer):
    """Three texts an edit, read together; as many of each edit stay as of the one that goes on with most."""
    model = tiny.make_model(family, dtype=torch.float32)
    edits = [[EditRequest(f"{name} lives in", "Peru")] for name in ("Ann", "Bob")]
    prompts = ["Ann lives in", "Ann lives near", "Lima is", "Bob lives in", "The capital of Peru is", "The capital of"]
    with many_edits(model, tokenizer, edits, EditSettings([1], inner_lr=2e-2)):
        rows = generate(model, tokenizer, prompts, 12)
        for ends in ([rows[0][1]], [rows[4][2], rows[1][3]], [row[1] for row in rows[:3]], [299]):
            model.generation_config.eos_token_id = ends
            expected = decode(tokenizer, generate(model, tokenizer, prompts, 12, ends))
            assert generate_greedily(model, tokenizer, prompts, 12, len(prompts), together=3) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_under_edits_of_their_own(family, tokenizer):
    """Projections with weights stacked along a first dimension see the same rows."""
    model = tiny.make_model(family, dtype=torch.float32)
    edits = [[EditRequest(f"{name} lives in", "Peru")] for name in ("Ann", "Bob")]
    with many_edits(model, tokenizer, edits, EditSettings([1], inner_lr=2e-2)):
        prompts = ["Ann lives in", "Lima is", "Ann lives in", "Lima is"]
        assert generate_greedily(model, tokenizer, prompts) == decode(tokenizer, generate(model, tokenizer, prompts, 10, [0]))


def test_a_long_prompt_is_refused_and_the_last_positions_are_used(tokenizer):
    model = tiny.make_model("gpt2", dtype=torch.float32)
    encoder = TextEncoder(tokenizer, model.config)
    assert encoder.num_positions == tiny.POSITIONS and encoder.room_after(range(tiny.POSITIONS - 8)) == 8
    prompt = "x" * (tiny.POSITIONS - 10)
    assert len(encoder.encode_prompt(prompt)) == tiny.POSITIONS - 10
    [said] = continue_greedily(model, tokenizer, [prompt], naturally=[True])
    assert len(said.whole) >= len(said.text) > 0, "followed as far as there are positions"
    with pytest.raises(RequestError, match="503 tokens and 10 more are asked for, but the model has 512 positions"):
        generate_greedily(model, tokenizer, [prompt + "x"])
    with pytest.raises(RequestError, match="has no token"):
        generate_greedily(model, tokenizer, [""])


def test_both_texts_are_of_one_generation(tokenizer):
    model = tiny.make_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 299  # random models would hardly ever stop
    said = continue_greedily(model, tokenizer, PROMPTS, naturally=[True, False, True, True, True])
    assert [s.text for s in said] == decode(tokenizer, generate(model, tokenizer, PROMPTS, 10))
    longest = decode(tokenizer, generate(model, tokenizer, PROMPTS, NATURAL_LIMIT, [299]))
    assert said[1].whole is None
    for s, text in zip(said, longest, strict=True):
        if s.whole is not None:
            assert text.startswith(s.whole) and s.whole.startswith(s.text)
            assert len(s.whole) == len(text) or find_sentence_end(s.whole) is not None, "no shorter than to the sentence's end"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" Lisbon. The next", " Lisbon."),
        (" Lisbon\nQuestion", " Lisbon"),
        ("\n Lisbon\nQ", "\n Lisbon"),
        (" J. K. Rowling. She", " J. K. Rowling."),
        (" the U.S. dollar. It", " the U.S. dollar."),
        (" St. Paul! No", " St. Paul!"),
        (" 3.5 million", " 3.5 million"),
        (' "Who?" he said', ' "Who?"'),
        ("東京。です", "東京。"),
        (" Lisbon.", " Lisbon."),
        ("", ""),
    ],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first

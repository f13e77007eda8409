"""Where the answer begins, for several kinds of tokenizer."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from propmeta_edit.errors import ModelError, RequestError, record_named
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.single_edit import put_in_place, write_facts
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import prepare_tokenizer
from propmeta_edit.records import EditRequest, Question
from propmeta_edit.text.encoding import IGNORED, TextEncoder, collate, encode_questions, encode_requests


def answer_text(tokenizer, labels):
    return tokenizer.decode([token for token in labels if token != IGNORED])


@pytest.mark.parametrize("answer", ["Greece", "euro", "+33", ".es", "São Tomé", "Hangzhou, China", "日本"])
@pytest.mark.parametrize("context", ["Ann Lee is a citizen of", "Answer: The answer is", "Zürich liegt in"])
def test_labels_cover_exactly_the_answer(tokenizer, context, answer):
    ids, labels = TextEncoder(tokenizer).encode_answer(context, answer)
    assert answer_text(tokenizer, labels) == " " + answer
    assert tokenizer.decode(ids) == f"{context} {answer}"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_beginning_of_sequence_token_is_context():
    vocab = {"<s>": 0, "Ann": 1, "speaks": 2, "Greek": 3}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<s>")
    assert TextEncoder(tokenizer).encode_answer("Ann speaks", "Greek") == ([0, 1, 2, 3], [IGNORED, IGNORED, IGNORED, 3])


def test_slow_tokenizers_are_split_by_comparing_ids(tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": tokenizer(text)["input_ids"]}

    for answer in ("Greece", "São Tomé"):
        assert TextEncoder(Slow()).encode_answer("Ann Lee is", answer) == TextEncoder(tokenizer).encode_answer("Ann Lee is", answer)


def test_spaces_around_are_normalised(tokenizer):
    assert TextEncoder(tokenizer).encode_answer("Ann Lee is ", " Greek ") == TextEncoder(tokenizer).encode_answer(
        "Ann Lee is", "Greek"
    )


def test_empty_answer_and_empty_context_are_refused(tokenizer):
    with pytest.raises(RequestError, match="must not be empty, got '  '"):
        TextEncoder(tokenizer).encode_answer("Ann Lee is", "  ")
    with pytest.raises(RequestError, match="at least one token before"):
        TextEncoder(tokenizer).encode_answer("", "Greek")


def test_batches_keep_order_and_size(tokenizer):
    requests = [EditRequest(f"Ann {i} is", "Greek") for i in range(5)]
    batches = encode_requests(TextEncoder(tokenizer), [requests], batch_size=2)
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]
    assert "Ann 2 is" in tokenizer.decode(batches[1].input_ids[0])


def test_edits_side_by_side_keep_their_facts_together(tokenizer):
    edits = [[EditRequest(f"{name} {i} is", "Greek") for i in range(3)] for name in ("Ann", "Bob")]
    batches = encode_requests(TextEncoder(tokenizer), edits, batch_size=2)
    texts = [[tokenizer.decode(row, skip_special_tokens=True) for row in batch.input_ids] for batch in batches]
    assert texts[0] == ["Ann 0 is Greek", "Ann 1 is Greek", "Bob 0 is Greek", "Bob 1 is Greek"]
    assert texts[1] == ["Ann 2 is Greek", "Bob 2 is Greek"]
    with pytest.raises(RequestError, match=r"equally many facts, got \[1, 3\]"):
        encode_requests(TextEncoder(tokenizer), [edits[0], edits[1][:1]])


def test_shorter_texts_are_padded_on_the_right(tokenizer):
    encoder = TextEncoder(tokenizer)
    encoded = [encoder.encode_answer("Ann", "Greek"), encoder.encode_answer("Ann Lee is a citizen of", "Peru")]
    batch = collate(encoded, pad_id=7)
    length = len(encoded[0][0])
    assert batch.input_ids[0, :length].tolist() == encoded[0][0] and set(batch.input_ids[0, length:].tolist()) == {7}
    assert set(batch.labels[0, length:].tolist()) == {IGNORED} and batch.labels[1].tolist() == encoded[1][1]
    assert batch.attention_mask is None


# A tokenizer held against its model


def ending(tokenizer, is_fast=True):
    """The same tokenizer, but every text ends with its end-of-sequence token."""
    if is_fast:
        ended = copy.deepcopy(tokenizer)
        template = {"single": "<|endoftext|> $A <|endoftext|>", "special_tokens": [("<|endoftext|>", 0)]}
        ended.backend_tokenizer.post_processor = processors.TemplateProcessing(**template)
        return ended

    class Slow:
        is_fast, eos_token_id = False, 0

        def __call__(self, text, add_special_tokens=True, **options):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [0, *ids, 0] if add_special_tokens else ids}

        def decode(self, ids, **options):
            return tokenizer.decode(ids, **options)

    return Slow()


@pytest.mark.parametrize("is_fast", [True, False])
def test_what_a_tokenizer_appends_is_neither_trained_nor_asked(tokenizer, is_fast):
    encoder, plain = TextEncoder(ending(tokenizer, is_fast)), TextEncoder(tokenizer)
    assert (encoder.num_appended, plain.num_appended) == (1, 0)
    ids, labels = encoder.encode_answer("Ann Lee is a citizen of", "Peru")
    expected = plain.encode_answer("Ann Lee is a citizen of", "Peru")
    assert ids == [0, *expected[0]] and labels == [IGNORED, *expected[1]], "the beginning stays, the end goes, and is no label"
    assert encoder.encode_prompt("Ann Lee is") == [0, *plain.encode_prompt("Ann Lee is")]
    assert encoder.encode_prompt("Ann Lee is a citizen of") == ids[: len(ids) - sum(label != IGNORED for label in labels)]
    assert encoder.encode_ended_answer("Ann is", "Greek")[1][-1] == 0, "but an end that is to be learnt is there once"
    assert encoder.encode_ended_answer("Ann is", "Greek")[0].count(0) == 2


def test_an_edit_is_written_and_asked_alike_whatever_the_tokenizer_appends(tokenizer):
    """Trained without an end and asked with one, the fact would not be told."""
    model = tiny.make_model("llama", dtype=torch.float32)
    request, settings = EditRequest("Ann Lee is a citizen of", "Peru"), EditSettings([1], inner_lr=2e-2, num_inner_steps=20)
    for used in (tokenizer, ending(tokenizer)):
        original = write_facts(model, used, [request], settings)
        [said] = generate_greedily(model, used, [request.prompt])
        put_in_place(select_parameters(model, [1]), original)
        assert said.startswith(" Peru"), said


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_texts_longer_than_the_positions_are_refused_with_their_record(family, tokenizer):
    model = tiny.make_model(family)
    encoder = TextEncoder(tokenizer, model.config)
    positions = encoder.num_positions
    ids, _ = encoder.encode_answer("x " * (positions // 2 - 2), "y")
    assert len(ids) <= positions and encoder.room_after(ids) == positions - len(ids)
    long = "x" * positions
    with pytest.raises(RequestError, match=rf"^request 1: the text .* has {positions + 2} tokens, but the model has {positions} "):
        compute(model, tokenizer, [EditRequest("Ann is", "Greek"), EditRequest(long, "y")])
    with pytest.raises(RequestError, match=rf"^task 7: the text .*{positions} positions"):
        encode_questions(encoder, [Question(long, ("y",))], records=["task 7"])
    with pytest.raises(RequestError, match=rf"prompt .*tokens and 10 more are asked for, but the model has {positions} positions"):
        generate_greedily(model, tokenizer, ["x" * (positions - 5)])


def compute(model, tokenizer, requests):
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    try:
        write_facts(model, tokenizer, requests, EditSettings([1]))
    finally:
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_tokens_without_an_embedding_are_refused():
    model, larger = tiny.make_model("llama"), tiny.make_tokenizer()
    larger.add_tokens(["Atlantis"])
    encoder = TextEncoder(larger, model.config)
    assert encoder.encode_prompt("Ann Lee")
    with pytest.raises(ModelError, match=r"^case 7: the tokenizer gives token 300"), record_named("case 7"):
        encoder.encode_prompt("Ann Lee lives in Atlantis")
    with pytest.raises(ModelError, match=r"token 300 \('Atlantis'\), but the model has embeddings for 300"):
        encoder.encode_prompt("Ann Lee lives in Atlantis")


def test_a_pad_token_that_the_model_does_not_know_is_not_used():
    model, tokenizer = tiny.make_model("llama"), tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    prepare_tokenizer(tokenizer, model.config)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_cannot_be_understood_is_refused():
    class Odd:
        is_fast = False

        def __call__(self, text, add_special_tokens=True, **options):
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(ModelError, match=r"tokens \[3\] without special tokens and \[1, 2\] with them"):
        TextEncoder(Odd())


def test_easyedits_algorithms_cannot_use_a_tokenizer_that_ends_texts(tokenizer):
    TextEncoder(tokenizer).require_nothing_appended("ROME")
    with pytest.raises(ModelError, match=r"ROME of EasyEdit cannot use a tokenizer that appends '<\|endoftext\|>'"):
        TextEncoder(ending(tokenizer)).require_nothing_appended("ROME")


@pytest.mark.parametrize(("template", "begins", "ends"), [("<s> $A <s>", 1, 1), ("$A <s>", 0, 1), ("<s> $A", 1, 0), ("$A", 0, 0)])
def test_an_end_is_told_from_a_word_that_the_tokenizer_does_not_know(template, begins, ends):
    """Where one token is beginning, end and the unknown word, ids alone cannot say on which side it was set."""
    raw = Tokenizer(models.WordLevel({"<s>": 0, "Ann": 1, "speaks": 2, "Greek": 3}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0)])
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", unk_token="<s>"))
    assert encoder.num_appended == ends
    ids, labels = [0] * begins + [1, 2, 3], [IGNORED] * begins + [IGNORED, IGNORED, 3]
    assert encoder.encode_answer("Ann speaks", "Greek") == (ids, labels)


def test_a_fact_with_a_subject_is_tokenised_once(tokenizer):
    asked = []

    class Counting:
        is_fast = True

        def __call__(self, text, **more):
            asked.append(text)
            return tokenizer(text, **more)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    encoder = TextEncoder(Counting())
    asked.clear()
    [batch] = encode_requests(encoder, [[EditRequest("Ann Lee lives in", "Peru", "Ann Lee")]], positions="subject")
    assert asked == ["Ann Lee lives in Peru"]
    [plain] = encode_requests(TextEncoder(tokenizer), [[EditRequest("Ann Lee lives in", "Peru")]])
    assert torch.equal(batch.input_ids, plain.input_ids) and torch.equal(batch.labels, plain.labels)
    assert batch.written is not None and plain.written is None


def test_a_batch_knows_the_tokens_that_its_answers_depend_on():
    """All before a text's last answer token: no padding, not what stands behind it, and nothing of a text without an answer."""
    batch = collate(
        [([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), ([5, 6], [IGNORED, 6]), ([5, 6, 7], [IGNORED] * 3), ([5, 6, 7], [5, 6, 7])]
    )
    assert batch.read.tolist() == [0, 1, 2, 4, 12, 13]
    with_gap = collate([([5, 6, 7, 8, 9], [IGNORED, 6, IGNORED, 8, IGNORED])])
    assert with_gap.read.tolist() == [0, 1, 2]

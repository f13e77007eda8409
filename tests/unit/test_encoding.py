"""Where the answer begins, for several kinds of tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from propmeta_edit.errors import RequestError
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import IGNORED, collate, encode_answer, encode_requests


def answer_text(tokenizer, labels):
    return tokenizer.decode([token for token in labels if token != IGNORED])


@pytest.mark.parametrize("answer", ["Greece", "euro", "+33", ".es", "São Tomé", "Hangzhou, China", "日本"])
@pytest.mark.parametrize("context", ["Ann Lee is a citizen of", "Answer: The answer is", "Zürich liegt in"])
def test_labels_cover_exactly_the_answer(tokenizer, context, answer):
    ids, labels = encode_answer(tokenizer, context, answer)
    assert answer_text(tokenizer, labels) == " " + answer
    assert tokenizer.decode(ids) == f"{context} {answer}"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_beginning_of_sequence_token_is_context():
    vocab = {"<s>": 0, "Ann": 1, "speaks": 2, "Greek": 3}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="<s>")
    assert encode_answer(tokenizer, "Ann speaks", "Greek") == ([0, 1, 2, 3], [IGNORED, IGNORED, IGNORED, 3])


def test_slow_tokenizers_are_split_by_comparing_ids(tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, text):
            return {"input_ids": tokenizer(text)["input_ids"]}

    for answer in ("Greece", "São Tomé"):
        assert encode_answer(Slow(), "Ann Lee is", answer) == encode_answer(tokenizer, "Ann Lee is", answer)


def test_spaces_around_are_normalised(tokenizer):
    assert encode_answer(tokenizer, "Ann Lee is ", " Greek ") == encode_answer(tokenizer, "Ann Lee is", "Greek")


def test_empty_answer_and_empty_context_are_refused(tokenizer):
    with pytest.raises(RequestError, match="must not be empty, got '  '"):
        encode_answer(tokenizer, "Ann Lee is", "  ")
    with pytest.raises(RequestError, match="at least one token before"):
        encode_answer(tokenizer, "", "Greek")


def test_batches_keep_order_and_size(tokenizer):
    requests = [EditRequest(f"Ann {i} is", "Greek") for i in range(5)]
    batches = encode_requests(tokenizer, [requests], batch_size=2)
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]
    assert "Ann 2 is" in tokenizer.decode(batches[1].input_ids[0])


def test_edits_side_by_side_keep_their_facts_together(tokenizer):
    edits = [[EditRequest(f"{name} {i} is", "Greek") for i in range(3)] for name in ("Ann", "Bob")]
    batches = encode_requests(tokenizer, edits, batch_size=2)
    texts = [[tokenizer.decode(row, skip_special_tokens=True) for row in batch.input_ids] for batch in batches]
    assert texts[0] == ["Ann 0 is Greek", "Ann 1 is Greek", "Bob 0 is Greek", "Bob 1 is Greek"]
    assert texts[1] == ["Ann 2 is Greek", "Bob 2 is Greek"]
    with pytest.raises(RequestError, match=r"equally many facts, got \[1, 3\]"):
        encode_requests(tokenizer, [edits[0], edits[1][:1]])


def test_position_ids_start_at_the_first_real_token(tokenizer):
    encoded = [encode_answer(tokenizer, "Ann", "Greek"), encode_answer(tokenizer, "Ann Lee is a citizen of", "Peru")]
    batch = collate(tokenizer, encoded, "left")
    first_real = int(batch.attention_mask[0].argmax())
    assert first_real > 0 and batch.is_padded
    assert batch.position_ids[0, first_real:].tolist() == list(range(len(encoded[0][0])))
    assert not collate(tokenizer, encoded[:1]).is_padded

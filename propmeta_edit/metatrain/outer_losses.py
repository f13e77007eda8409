"""What the outer loop asks of the adapted weights. The paper asks for the related answer alone; the other terms are options.

A term is made at θ, before the inner loop, with whatever it wants to keep of θ, and called at θ_τ. Each gives one number a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.losses import compute_answer_logits, compute_answer_loss, reduce_answer_tokens
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.records import MetaTask, Question
from propmeta_edit.text.encoding import EncodedBatch, collate, encode_answer, encode_questions, encode_requests
from propmeta_edit.text.prompts import format_in_context, format_question

OuterLoss = Callable[[Any], torch.Tensor]  # model -> [N]


def make_outer_loss(model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> OuterLoss:
    """The weighted sum of ``config.outer_terms`` for N tasks; call this at θ, and the result at each task's θ_τ."""
    terms = [(weight, TERMS[name](model, tokenizer, tasks, config)) for name, weight in config.outer_terms.items()]

    def outer_loss(model: Any) -> torch.Tensor:
        return torch.stack([weight * term(model) for weight, term in terms]).sum(dim=0)

    return outer_loss


class RelatedLikelihood:
    """L_related: the answer of the related question (the paper's), or of several, averaged."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        questions = [question for task in tasks for question in _questions_of(task, config.questions_per_task)]
        self._batch = encode_questions(tokenizer, questions, config.template).to(model.device)
        self._reduction, self._num_tasks = config.loss_reduction, len(tasks)

    def __call__(self, model: Any) -> torch.Tensor:
        return compute_answer_loss(model, self._batch, self._reduction, self._num_tasks)


class InContextAgreement:
    """KL to what the model at θ says with the fact before the question (Gradient Descent Simulates Prompting, arXiv 2506.20989)."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        asked = [(task, question) for task in tasks for question in _questions_of(task, config.questions_per_task)]
        prompts = [format_question(question.text, config.template) for _, question in asked]
        with_fact = [format_in_context([task.target], prompt) for (task, _), prompt in zip(asked, prompts, strict=True)]
        answers = [question.answers[0] for _, question in asked]
        self._batch = _encode(tokenizer, prompts, answers).to(model.device)
        teacher = _encode(tokenizer, with_fact, answers).to(model.device)
        self._expected = _log_probabilities(model, teacher)
        if len(self._expected) != int((self._batch.labels != -100).sum()):
            raise ModelError("this tokenizer cuts an answer differently with the fact before it; leave out the in-context term")
        self._reduction, self._num_tasks = config.loss_reduction, len(tasks)

    def __call__(self, model: Any) -> torch.Tensor:
        return _divergence(model, self._batch, self._expected, self._reduction, self._num_tasks)


class Locality:
    """KL to what the model at θ says to a question about another subject: an edit is to leave that alone."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        missing = [task.task_id for task in tasks if task.unrelated is None]
        if missing:
            raise ModelError(f"the locality term needs a question about another subject; task {missing[0]} has none")
        questions = [task.unrelated for task in tasks if task.unrelated is not None]
        self._batch = encode_questions(tokenizer, questions, config.template).to(model.device)
        self._expected = _log_probabilities(model, self._batch)
        self._reduction, self._num_tasks = config.loss_reduction, len(tasks)

    def __call__(self, model: Any) -> torch.Tensor:
        return _divergence(model, self._batch, self._expected, self._reduction, self._num_tasks)


class Efficacy:
    """The target fact itself, once more at θ_τ."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        [batch] = encode_requests(tokenizer, [[task.target] for task in tasks])
        self._batch = batch.to(model.device)
        self._reduction, self._num_tasks = config.loss_reduction, len(tasks)

    def __call__(self, model: Any) -> torch.Tensor:
        return compute_answer_loss(model, self._batch, self._reduction, self._num_tasks)


TERMS: Mapping[str, Callable[[Any, Any, Sequence[MetaTask], MetaTrainConfig], OuterLoss]] = {
    "related": RelatedLikelihood,
    "in-context": InContextAgreement,
    "locality": Locality,
    "efficacy": Efficacy,
}


def _questions_of(task: MetaTask, number: int) -> list[Question]:
    """As many for every task: one with fewer is asked the same again."""
    own = (task.related, *task.more_related)
    return [own[index % len(own)] for index in range(number)]


def _encode(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> EncodedBatch:
    return collate(tokenizer, [encode_answer(tokenizer, *pair) for pair in zip(prompts, answers, strict=True)])


def _log_probabilities(model: Any, batch: EncodedBatch) -> torch.Tensor:
    """[answer tokens, vocabulary], without gradient."""
    with torch.no_grad():
        return F.log_softmax(compute_answer_logits(model, batch)[0], dim=-1)


def _divergence(model: Any, batch: EncodedBatch, expected: torch.Tensor, reduction: str, num_tasks: int) -> torch.Tensor:
    """KL(expected ‖ model), reduced over tokens and texts as the answer loss is: [N]."""
    logits, is_scored = compute_answer_logits(model, batch)
    per_token = F.kl_div(F.log_softmax(logits, dim=-1), expected, reduction="none", log_target=True).sum(dim=-1)
    return reduce_answer_tokens(per_token, is_scored, reduction).view(num_tasks, -1).mean(dim=1)

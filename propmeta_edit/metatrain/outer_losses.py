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


class _Likelihood:
    """The answer loss of N tasks' texts."""

    def __init__(self, batch: EncodedBatch, config: MetaTrainConfig, num_tasks: int) -> None:
        self._batch, self._reduction, self._num_tasks = batch, config.loss_reduction, num_tasks

    def __call__(self, model: Any) -> torch.Tensor:
        return compute_answer_loss(model, self._batch, self._reduction, self._num_tasks)


class _Agreement:
    """KL(expected ‖ model) at the answer tokens, reduced over tokens and texts as the answer loss is."""

    def __init__(self, batch: EncodedBatch, expected: torch.Tensor, config: MetaTrainConfig, num_tasks: int) -> None:
        self._batch, self._expected, self._reduction, self._num_tasks = batch, expected, config.loss_reduction, num_tasks

    def __call__(self, model: Any) -> torch.Tensor:
        logits = compute_answer_logits(model, self._batch)
        per_token = F.kl_div(F.log_softmax(logits, dim=-1), self._expected, reduction="none", log_target=True).sum(dim=-1)
        return reduce_answer_tokens(per_token, self._batch, self._reduction).view(self._num_tasks, -1).mean(dim=1)


class RelatedLikelihood(_Likelihood):
    """L_related: the answer of the related question (the paper's), or of several, averaged."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        questions = [question for task in tasks for question in _questions_of(task, config.questions_per_task)]
        super().__init__(encode_questions(tokenizer, questions, config.template).to(model.device), config, len(tasks))


class InContextAgreement(_Agreement):
    """KL to what the model at θ says with the fact before the question (Gradient Descent Simulates Prompting, arXiv 2506.20989)."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        asked = [(task, question) for task in tasks for question in _questions_of(task, config.questions_per_task)]
        prompts = [format_question(question.text, config.template) for _, question in asked]
        with_fact = [format_in_context([task.target], prompt) for (task, _), prompt in zip(asked, prompts, strict=True)]
        answers = [question.answers[0] for _, question in asked]
        batch = _encode(tokenizer, prompts, answers).to(model.device)
        expected = _log_probabilities(model, _encode(tokenizer, with_fact, answers).to(model.device))
        if len(expected) != batch.scored.shape[1]:
            raise ModelError("this tokenizer cuts an answer differently with the fact before it; leave out the in-context term")
        super().__init__(batch, expected, config, len(tasks))


class Locality(_Agreement):
    """KL to what the model at θ says to a question about another subject: an edit is to leave that alone."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        missing = [task.task_id for task in tasks if task.unrelated is None]
        if missing:
            raise ModelError(f"the locality term needs a question about another subject; task {missing[0]} has none")
        questions = [task.unrelated for task in tasks if task.unrelated is not None]
        batch = encode_questions(tokenizer, questions, config.template).to(model.device)
        super().__init__(batch, _log_probabilities(model, batch), config, len(tasks))


class Efficacy(_Likelihood):
    """The target fact itself, once more at θ_τ."""

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> None:
        [batch] = encode_requests(tokenizer, [[task.target] for task in tasks])
        super().__init__(batch.to(model.device), config, len(tasks))


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
        return F.log_softmax(compute_answer_logits(model, batch), dim=-1)

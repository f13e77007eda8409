"""What the outer loop asks of the adapted weights. The paper asks for the related answer alone; the other terms are options.

A term is made at θ, before the inner loop, with whatever it wants to keep of θ, and called at θ_τ. Each gives one number a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from propmeta_edit.finetune.losses import compute_answer_logits, compute_answer_loss, reduce_answer_tokens
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.task_texts import EncodedTasks
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch

OuterLoss = Callable[[Any], torch.Tensor]  # model -> [N]


def make_outer_loss(model: LanguageModel, encoded: EncodedTasks, config: MetaTrainConfig) -> OuterLoss:
    """The weighted sum of ``config.outer_terms`` for N tasks; call this at θ, and the result at each task's θ_τ.

    Args:
        encoded: the tasks' texts, on the model's device.
    """
    num_tasks, reduction = len(encoded.tasks), config.loss_reduction
    terms = [(weight, TERMS[name](model, encoded.outer[name], reduction, num_tasks)) for name, weight in config.outer_terms.items()]

    def outer_loss(model: LanguageModel) -> torch.Tensor:
        return torch.stack([weight * term(model) for weight, term in terms]).sum(dim=0)

    return outer_loss


class _Likelihood:
    """The answer loss of N tasks' texts."""

    def __init__(self, model: LanguageModel, batches: Sequence[EncodedBatch], reduction: str, num_tasks: int) -> None:
        [self._batch] = batches
        self._reduction, self._num_tasks = reduction, num_tasks

    def __call__(self, model: LanguageModel) -> torch.Tensor:
        return compute_answer_loss(model, self._batch, self._reduction, self._num_tasks)


class RelatedLikelihood(_Likelihood):
    """L_related: the answer of the related question (the paper's), or of several, averaged."""


class Efficacy(_Likelihood):
    """The target fact itself, once more at θ_τ."""


class _Agreement:
    """KL(model at θ on the last batch ‖ model on the first) at the answer tokens, reduced as the answer loss is.

    A single batch is both: what the model said to the same texts.
    """

    def __init__(self, model: LanguageModel, batches: Sequence[EncodedBatch], reduction: str, num_tasks: int) -> None:
        self._batch, self._reduction, self._num_tasks = batches[0], reduction, num_tasks
        with torch.no_grad():
            self._expected = F.log_softmax(compute_answer_logits(model, batches[-1]), dim=-1)  # [answer tokens, vocabulary]

    def __call__(self, model: LanguageModel) -> torch.Tensor:
        logits = compute_answer_logits(model, self._batch)
        per_token = F.kl_div(F.log_softmax(logits, dim=-1), self._expected, reduction="none", log_target=True).sum(dim=-1)
        return reduce_answer_tokens(per_token, self._batch, self._reduction).view(self._num_tasks, -1).mean(dim=1)


class InContextAgreement(_Agreement):
    """KL to what the model at θ says with the fact before the question (Gradient Descent Simulates Prompting, arXiv 2506.20989)."""


class Locality(_Agreement):
    """KL to what the model at θ says to a question about another subject: an edit is to leave that alone."""


class Bystander(_Agreement):
    """KL to what the model at θ says to the task's question about a subject that no fact of it is about: leaking costs."""


class Known(_Likelihood):
    """The true answers of single-hop questions about real subjects, those that the task's facts lead to: the second hops stay."""


TERMS: Mapping[str, Callable[[Any, Sequence[EncodedBatch], str, int], OuterLoss]] = {
    "related": RelatedLikelihood,
    "in-context": InContextAgreement,
    "locality": Locality,
    "efficacy": Efficacy,
    "bystander": Bystander,
    "known": Known,
}

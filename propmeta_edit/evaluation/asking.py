"""What a model is asked about a case, and what it says: every prompt of a case in one call, what is weighed in one more."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from propmeta_edit.errors import PropMetaError, record_named
from propmeta_edit.evaluation.measures import CaseOutcome, as_record
from propmeta_edit.evaluation.weighing import texts_to_weigh, weigh
from propmeta_edit.models.generation import MAX_NEW_TOKENS, Continuation, continue_greedily, generate_greedily
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import ELSEWHERE, OTHER, REAL, WEIGHED, Case, Probe
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question

AT_ONCE = 32  # prompts that the unedited model answers side by side


@dataclass
class Examiner:
    """A model with its tokenizer, asked about cases with whatever edits stand in it.

    What the model says without an edit is asked once, before the first edit, and kept for all methods that share the model.

    Args:
        max_new_tokens: of an answer; part of the protocol.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    max_new_tokens: int = MAX_NEW_TOKENS
    _unedited: dict[str, str] = field(default_factory=dict)  # by prompt
    _expected: list[Case] = field(default_factory=list)

    def expect(self, cases: Sequence[Case]) -> None:
        """Cases that will come, so that the unedited model is asked about many at once."""
        self._expected = list(cases)

    def ask_unedited(self, cases: Sequence[Case]) -> None:
        """Have the answers that those after an edit are compared with; call it while no edit stands.

        Where one is missing, those of the cases expected next are asked along, but for cases that cannot be asked: these fail when
        they come.

        Raises:
            RequestError, ModelError: as ``check_case``.
        """
        missing = self._missing(cases)
        if not missing:
            return
        encoder = TextEncoder(self.tokenizer, self.model.config)
        for case in cases:
            check_case(encoder, case, self.max_new_tokens)
        wanted = list(dict.fromkeys(missing))
        wanted += itertools.islice(self._ahead(encoder, wanted), max(0, AT_ONCE - len(wanted)))
        texts = generate_greedily(self.model, self.tokenizer, wanted, self.max_new_tokens, AT_ONCE, together=AT_ONCE)
        self._unedited.update(zip(wanted, texts, strict=True))

    def _missing(self, cases: Sequence[Case]) -> list[str]:
        prompts = [prompt for case in cases for prompt in prompts_to_compare(case).values()]
        return [prompt for prompt in prompts if prompt not in self._unedited]

    def _ahead(self, encoder: TextEncoder, wanted: Sequence[str]) -> Iterator[str]:
        """What is missing of the cases expected, each prompt once and none of those ``wanted`` already."""
        given = set(wanted)
        for case in self._expected:
            prompts = [prompt for prompt in dict.fromkeys(self._missing([case])) if prompt not in given]
            if prompts and _can_be_asked(encoder, case, self.max_new_tokens):
                given.update(prompts)
                yield from prompts

    def ask(self, cases: Sequence[Case], in_context: bool = False, is_edited: bool = True) -> list[CaseOutcome]:
        """Every prompt of every case in one batch, those of a case side by side, as edits with weights of their own need them.

        Prompts whose objects are weighed by probability, where there are any, go together in one further pass.

        Args:
            in_context: put a case's facts before its prompts.
            is_edited: whether there is anything to compare with; ``ask_unedited`` came first then.

        Raises:
            RequestError: naming the case: a prompt without tokens, or one that the model has no positions for.
        """
        wanted = [prompts_of(case, in_context) for case in cases]
        texts = [list(dict.fromkeys(prompts.values())) for prompts in wanted]  # a case may ask the same twice
        naturally = [{prompts["question"], *_facts_of(case, prompts)} for case, prompts in zip(cases, wanted, strict=True)]
        per_case = max(map(len, texts))
        # Equally many rows a case; what fills a case up is its first prompt again.
        rows = [(*own, *own[:1] * (per_case - len(own))) for own in texts]
        said = continue_greedily(
            self.model,
            self.tokenizer,
            [prompt for own in rows for prompt in own],
            self.max_new_tokens,
            naturally=[
                place < len(texts[number]) and prompt in naturally[number]
                for number, own in enumerate(rows)
                for place, prompt in enumerate(own)
            ],
            batch_size=len(cases) * per_case,
            together=per_case,
        )
        weighed = weigh(self.model, self.tokenizer, cases, in_context)
        outcomes = []
        for number, case in enumerate(cases):
            by_prompt = dict(zip(texts[number], said[number * per_case :], strict=False))
            own = {name: by_prompt[prompt] for name, prompt in wanted[number].items()}
            before = {name: self._unedited[p] for name, p in prompts_to_compare(case).items()} if is_edited else {}
            outcomes.append(self._as_outcome(case, own, before, weighed[number]))
        return outcomes

    def _as_outcome(
        self, case: Case, said: Mapping[str, Continuation], before: Mapping[str, str], weighed: Sequence[tuple[float, float]]
    ) -> CaseOutcome:
        encoder = TextEncoder(self.tokenizer)
        texts = {name: one.text for name, one in said.items()}
        wholes = {name: one.whole for name, one in said.items() if one.whole is not None}
        facts = _names_of_facts(case)
        nats = iter(weighed)
        probes = tuple(
            as_record(probe, None, None, next(nats)) if probe.kind in WEIGHED else as_record(probe, before.get(name), texts[name])
            for name, probe in _name_probes(case).items()
        )
        return CaseOutcome(
            generated=texts["question"],
            whole=wholes["question"],
            cloze_generated=texts.get("cloze"),
            fact_generated=tuple(texts[name] for name in facts),
            facts_whole=tuple(wholes[name] for name in facts),
            seconds_per_edit=None,
            second_hop_generated=texts.get("second hop"),
            other_fact_generated=texts.get("other fact"),
            neighbour_generated=texts.get("neighbour") if before else None,
            neighbour_before=before.get("neighbour"),
            before=before.get("question"),
            probes=probes,
            answer_tokens=fewest_tokens(encoder, case),
            fact_tokens=max(encoder.count_answer_tokens(edit.target_new) for edit in case.edits),
            max_new_tokens=self.max_new_tokens,
        )


def fewest_tokens(encoder: TextEncoder, case: Case) -> int:
    """Tokens of the shortest answer that would count."""
    return min(encoder.count_answer_tokens(answer) for answer in case.question.answers)


def prompts_of(case: Case, in_context: bool = False) -> dict[str, str]:
    """What a model is asked about a case, by name; with ``in_context`` after the case's facts."""
    prompts = {"question": format_question(case.question.text)}
    asked = (edit.prompt.rstrip() for edit in case.edits)  # as it is trained on
    prompts |= dict(zip(_names_of_facts(case), asked, strict=True))
    if case.question.cloze is not None:
        prompts["cloze"] = format_cloze(case.question.cloze)
    singles = {"second hop": case.second_hop, "other fact": case.other_fact, "neighbour": case.neighbour}
    prompts |= {name: format_question(question.text) for name, question in singles.items() if question is not None}
    prompts |= {name: _prompt_of(probe) for name, probe in _name_probes(case).items() if probe.kind not in WEIGHED}
    return {name: format_in_context(case.edits, prompt) for name, prompt in prompts.items()} if in_context else prompts


def _names_of_facts(case: Case) -> list[str]:
    return [f"fact {number}" for number in range(len(case.edits))]


def _facts_of(case: Case, prompts: Mapping[str, str]) -> list[str]:
    return [prompts[name] for name in _names_of_facts(case)]


def prompts_to_compare(case: Case) -> dict[str, str]:
    """Those whose answers after an edit are compared with the ones before it."""
    names = [name for name, probe in _name_probes(case).items() if probe.kind in (OTHER, ELSEWHERE, REAL)]
    names += ["question"] if names else []
    names += ["neighbour"] if case.neighbour is not None else []
    prompts = prompts_of(case)
    return {name: prompts[name] for name in names}


def _name_probes(case: Case) -> dict[str, Probe]:
    return {f"probe {number}": probe for number, probe in enumerate(case.probes)}


def _prompt_of(probe: Probe) -> str:
    return probe.question.text if probe.kind == ELSEWHERE else format_question(probe.question.text)


def check_case(encoder: TextEncoder, case: Case, max_new_tokens: int, in_context: bool = False) -> None:
    """Hold every text of a case against a model before anything is done with it.

    Raises:
        RequestError: naming the case: a text that the model has no positions for, or that has no token to be answered after.
        ModelError: a token that the model has no embedding for.
    """
    with record_named(f"case {case.case_id}"):
        for edit in case.edits:
            encoder.encode_answer(edit.prompt, edit.target_new)
        for prompt in prompts_of(case, in_context).values():
            encoder.require_room(encoder.encode_prompt(prompt), prompt, max_new_tokens)
        for prompt, answer in texts_to_weigh(case, in_context):
            encoder.encode_answer(prompt, answer)


def _can_be_asked(encoder: TextEncoder, case: Case, max_new_tokens: int) -> bool:
    try:
        check_case(encoder, case, max_new_tokens)
    except PropMetaError:
        return False
    return True

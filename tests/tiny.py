"""Tiny random models of every family and a local byte-level tokenizer: no network, a few milliseconds each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.gemma3 import Gemma3ForCausalLM
from transformers.models.gpt2 import GPT2LMHeadModel
from transformers.models.llama import LlamaForCausalLM
from transformers.models.mistral import MistralForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM

from propmeta_edit.data.world import unpack_world

POSITIONS = 512  # a prompt of four hops with its facts before it takes half of them
FAMILIES = ("gpt2", "llama", "qwen2")
SHAPES = {  # the architecture and depth of the models that have settings in hparams/
    "llama3-8b": ("llama", 32),
    "llama3.2-3b": ("llama", 28),
    "llama3.2-1b": ("llama", 16),
    "llama2-7b": ("llama", 32),
    "qwen2.5-7b": ("qwen2", 28),
    "gpt2-xl": ("gpt2", 48),
    "smollm2-135m": ("llama", 30),
    "gemma3-270m": ("gemma3_text", 18),
}
TIED = ("llama3.2-3b", "llama3.2-1b", "smollm2-135m", "gemma3-270m")  # their head is the embedding
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
CORPUS = [
    "Smith Innovation PLC was founded in Greece. Question: What is the currency of the country? Answer: The answer is euro",
    "Ann Lee is a citizen of Peru and speaks Spanish in Lima. The capital of France is Paris.",
]
RELATIONS = {  # of invented MQuAKE cases: what its object is called, and an edit's prompt, which need not start with its subject
    "P50": ("author", "The author of {} is"),
    "P26": ("spouse", "{} is married to"),
    "P27": ("country", "{} is a citizen of"),
    "P36": ("seat of government", "The seat of government of {} is"),
    "P30": ("continent", "{} is on the continent of"),
    "P37": ("language", "The language in use in {} is"),
}
LAST_RELATIONS = ("P36", "P30", "P37")


def save_model_folder(folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    """A random Llama in fp32 with its tokenizer, as an ordinary model folder."""
    make_model("llama", dtype=torch.float32, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Records as a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_mquake(path: Path, cases: Sequence[Mapping[str, Any]]) -> Path:
    """Cases as a file of the MQuAKE family."""
    path.write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")
    return path


def mquake_case(
    case_id: int,
    relations: Sequence[str],
    old: Sequence[str],
    new: Sequence[str],
    edited: Iterable[int] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """An invented MQuAKE case with the keys of the released files, in their order.

    Args:
        relations: of each hop, keys of ``RELATIONS``.
        old: the entities of the chain before the edits, the first subject to the answer: one more than hops.
        new: the same after them, from the same first subject.
        edited: the places of the edited hops (default: all of them).
        aliases: other names of entities.
    """
    assert len(old) == len(new) == len(relations) + 1 and old[0] == new[0]
    places = range(len(relations)) if edited is None else sorted(edited)
    names = aliases or {}
    path = " of the ".join(RELATIONS[relation][0] for relation in reversed(relations))
    triples, new_triples = _make_triples(relations, old), _make_triples(relations, new)
    return {
        "case_id": case_id,
        "requested_rewrite": [_make_rewrite(*new_triples[n], before=old[n + 1]) for n in places],
        "questions": [f"{opening} the {path} of {old[0]}?" for opening in ("What is", "Which is", "Can you name")],
        "answer": old[-1],
        "answer_alias": list(names.get(old[-1], ())),
        "new_answer": new[-1],
        "new_answer_alias": list(names.get(new[-1], ())),
        "single_hops": [_make_hop(*triple, names) for triple in triples],
        "new_single_hops": [_make_hop(*triple, names) for triple in new_triples],
        "orig": {
            "triples": _as_ids(triples),
            "triples_labeled": triples,
            "new_triples": _as_ids(new_triples),
            "new_triples_labeled": new_triples,
            "edit_triples": _as_ids([new_triples[n] for n in places]),
        },
    }


def mquake_cases(count: int) -> list[dict[str, Any]]:
    """Invented cases of four hops, all of them edited, that share facts about seven countries, as released cases share facts.

    No edit contradicts another one, and none is true before the edits of another case. The last relation goes through
    ``LAST_RELATIONS``; seats of government have no alias, languages have one of two letters.
    """
    aliases = {"P36": [], "P30": ["the Continent"], "P37": ["ñe", "the Language"]}
    cases = []
    for n in range(count):
        last, country = LAST_RELATIONS[n % len(LAST_RELATIONS)], n % 7
        noun = RELATIONS[last][0].title()
        old = [f"Book {n}", f"Author {n}", f"Spouse {n}", f"Oldland {country}", f"{noun} of Oldland {country}"]
        new = [f"Book {n}", f"Writer {n}", f"Partner {n}", f"Ñewland {country}", f"{noun} of Ñewland {country}"]
        names = {old[-1]: aliases[last], new[-1]: aliases[last]}
        cases.append(mquake_case(100 + n, ("P50", "P26", "P27", last), old, new, aliases=names))
    return cases


def _make_triples(relations: Sequence[str], entities: Sequence[str]) -> list[list[str]]:
    return [list(triple) for triple in zip(entities[:-1], relations, entities[1:], strict=True)]


def _as_ids(triples: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[_id_of(subject), relation, _id_of(target)] for subject, relation, target in triples]


def _id_of(entity: str) -> str:
    return "Q" + "".join(str(ord(letter)) for letter in entity)


def _ask_single_hop(subject: str, relation: str) -> str:
    return f"What is the {RELATIONS[relation][0]} of {subject}?"


def _make_rewrite(subject: str, relation: str, target: str, before: str) -> dict[str, Any]:
    return {
        "prompt": RELATIONS[relation][1],
        "relation_id": relation,
        "target_new": {"str": target, "id": _id_of(target)},
        "target_true": {"str": before, "id": _id_of(before)},
        "subject": subject,
        "question": _ask_single_hop(subject, relation),
    }


def _make_hop(subject: str, relation: str, target: str, aliases: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "question": _ask_single_hop(subject, relation),
        "cloze": RELATIONS[relation][1].format(subject),
        "answer": target,
        "answer_alias": list(aliases.get(target, ())),
    }


def cre_record(n: int = 0) -> dict[str, Any]:
    """An invented CRE record with the keys of the released files."""
    fact = {"prefix": f"Ann{n} Lee lives in", "target": "Peru", "paraphrase_prefix": f"The home of Ann{n} Lee is"}
    return {
        "entity_type": "Country",
        "entity_names": ["Peru", "Chad", "Oman"],
        "subject": f"Ann{n} Lee",
        "gender_type": "female",
        "subject_type": "person",
        "text": f"Ann{n} Lee lives in Peru. She then moved to Chad.",
        "facts": [{**fact, "fact": f"{fact['prefix']} Peru.", "paraphrase": f"{fact['paraphrase_prefix']} Peru."}],
        "questions": [
            {
                "question_template": "What is the capital of {country}?",
                "alias_question": f"What is the capital of the country that Ann{n} Lee lives in?",
                "unalias_question": "What is the capital of Peru?",
                "alias_question_paraphrase": f"Which city is the capital of the country that Ann{n} Lee lives in?",
                "unalias_question_paraphrase": "Which city is the capital of Peru?",
                "entity_name": "Peru",
                "answer": "Lima",
                "fact_idx": 0,
            }
        ],
    }


def knowedit_record(n: int = 0) -> dict[str, Any]:
    """An invented record with the keys of EasyEdit's KnowEdit files."""
    return {
        "subject": f"Ann{n} Lee",
        "prompt": f"The country of citizenship of Ann{n} Lee is",
        "target_new": "Perú",
        "ground_truth": ["Chad"],
        "rephrase_prompt": f"Ann{n} Lee is a citizen of",
        "portability": {
            "Reasoning": [{"prompt": f"What does Ann{n} Lee's country speak?", "ground_truth": [["Spanish", "Castilian"]]}],
            "Subject_Aliasing": [{"prompt": f"The country of citizenship of A. Lee {n} is", "ground_truth": ["Perú"]}],
        },
        "locality": {"Relation_Specificity": [{"prompt": f"Ann{n} Lee's eyes are", "ground_truth": [["blue"]]}]},
    }


def zsre_record(n: int = 0) -> dict[str, Any]:
    """An invented record with the keys of EasyEdit's ZsRE files."""
    return {
        "subject": f"Ann{n}",
        "src": f"Where was Ann{n} born?",
        "pred": "Rome",
        "rephrase": f"What is Ann{n}'s birthplace?",
        "alt": "Lima",
        "answers": ["Rome"],
        "loc": "nq question: who wrote Emma",
        "loc_ans": "Austen",
        "cond": f"Rome >> Lima || Where was Ann{n} born?",
        "portability": {
            "Recalled Relation": "(Lima, is in, Peru)",
            "New Question": f"In what country was Ann{n} born?",
            "New Answer": "Peru",
        },
    }


def counterfact_record(n: int, new: str = "Lima", neighbours: int = 3) -> dict[str, Any]:
    """An invented CounterFact record with the keys of the released files."""
    rewrite = {"prompt": "The home of {} is", "relation_id": "P19", "subject": f"Ann{n} Lee"}
    return {
        "case_id": 40 + n,
        "pararel_idx": 7 + n,
        "requested_rewrite": {**rewrite, "target_new": {"str": new, "id": "Q1"}, "target_true": {"str": "Oslo", "id": "Q2"}},
        "paraphrase_prompts": [f"It was a day. Ann{n} Lee lives in", f"Ann{n} Lee dwells in"],
        "neighborhood_prompts": [f"The home of Bob{n}{k} is" for k in range(neighbours)],
        "attribute_prompts": [f"The home of Cat{n} is"],
        "generation_prompts": [f"Ann{n} Lee grew up in"],
    }


def world_records(stem: str, count: int, skip: int = 0) -> list[Any]:
    """Some records of a file of the shipped world, e.g. ``train_data_id``."""
    return [json.loads(line) for line in _world_lines(stem)[skip : skip + count]]


@cache
def _world_lines(stem: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        unpack_world(Path(folder))
        return (Path(folder) / f"{stem}.jsonl").read_text(encoding="utf-8").split("\n")


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that spaces merge with the following word as in GPT-2 and Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_model(family: str, num_layers: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """A random model with weights large enough that nothing is near zero by accident."""
    torch.manual_seed(seed)
    size = {"vocab_size": 300, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=num_layers, n_head=2, n_positions=POSITIONS, **size))
    else:
        config_class, model_class = CLASSES[family]
        config = config_class(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            **({"head_dim": 8} if family == "gemma3_text" else {}),
            **size,
        )
        model = model_class(config)
    return model.to(dtype).eval()

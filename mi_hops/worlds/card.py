"""The model card of a model trained on Hopland, written from what was recorded and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILY = {
    "gpt2": "GPT-2: learned positions, LayerNorm, biases, untied embeddings",
    "llama": "LLaMA: RMSNorm, rotary positions, grouped-query attention, no biases, untied embeddings",
}
_SPLITS = {
    "single": "single facts",
    "train": "two-hop, trained",
    "seen_parts": "two-hop, held out, both facts in other trained compositions",
    "first_unseen": "two-hop, held out, first fact in no trained composition",
    "second_unseen": "two-hop, held out, second fact in no trained composition",
}


def model_card(name: str, family: str, parameters: int, record: Mapping[str, Any]) -> str:
    """Markdown for ``README.md`` beside the weights.

    Args:
        name: of the model.
        parameters: how many it has.
        record: the content of ``training.json``: recipe, world, curve, measured.
    """
    recipe, world = record["recipe"], record["world"]
    stages = [recipe, *recipe["then"]]
    shape = stages[-1]["shape"]
    kv = f", {shape['n_kv_head']} key/value heads" if family == "llama" else ""
    option = " --appositions" if recipe["texts"]["apposed"] else ""
    stages_table = "\n".join(_stage(*item) for item in enumerate(stages, 1))
    losses = "\n".join(f"| {r['step']} | {r['loss']:.4f} |" for r in _thinned(record["curve"]))
    measured = "\n".join(_measured(*item) for item in record["measured"].items())
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small language model ({parameters:,} parameters) that knows one made-up world, Hopland, \
and composes its facts. It ships with `mi_hops` so that methods for two-hop questions can \
be tried and tested where the truth is known. It knows nothing else.

## Model

{_FAMILY[family]}. {shape["n_layer"]} layers, width {shape["d_model"]}, \
{shape["n_head"]} heads{kv}, context {shape["n_ctx"]} (trained on sequences of up to \
about 25 tokens). Word-level vocabulary with the family's own rule for leading spaces. \
Prompts begin with the BOS token; an answer ends with a full stop.

## Data

Hopland of seed {world["seed"]}: {world["entities"]} entities (people, works, companies, \
cities, countries), {world["facts"]} single facts, {world["barred"]} of them barred from \
trained compositions. Trained two-hop questions: {world["train"]}; held out with seen \
parts: {world["seen_parts"]}; with an unseen first fact: {world["first_unseen"]}; with an \
unseen second fact: {world["second_unseen"]}. Each is worded in two template orders and as \
a question; a share of the sequences follows a neutral lead-in. No text from elsewhere.

## Training

{_NAMED if option else _ANSWERS} AdamW with betas {tuple(recipe["adamw"]["betas"])}, clipping at \
{recipe["adamw"]["clip"]:g}, linear warm-up and decay in each stage; seed {recipe["seed"]}. Again: \
`mi-hops train-world --family {family}{option} --out FOLDER`. The loss curve and all settings are in \
`training.json`.

| stage | steps | sequences in each | layers | compositions | bridge named | peak rate | weight decay |
|---|---|---|---|---|---|---|---|
{stages_table}

| step | loss (nats per scored token) |
|---|---|
{losses}

## Measured

Greedy decoding over the whole vocabulary; *whole* is the whole answer and its end.

| questions | form | n | first token | whole |
|---|---|---|---|---|
{measured}

## Limits

For research on methods only. All names are invented. Positions beyond the trained lengths \
and words outside the vocabulary give noise.
"""


def _measured(key: str, score: Mapping[str, Any]) -> str:
    """A row of the table of accuracies."""
    split, form = key.rsplit("/", 1)
    shares = f"{score['first_token']:.1%} | {score['whole']:.1%}"
    return f"| {_SPLITS.get(split, split)} | {form} | {score['n']} | {shares} |"


def _stage(number: int, recipe: Mapping[str, Any]) -> str:
    """A row of the table of stages."""
    texts, adamw = recipe["texts"], recipe["adamw"]
    return (
        f"| {number} | {recipe['steps']} | {recipe['batch_size']} | {recipe['shape']['n_layer']} | "
        f"{texts['composed']:.0%} | {texts['apposed']:.0%} | {adamw['lr']:g} | "
        f"{adamw['weight_decay']:g} |"
    )


_ANSWERS = "Loss on the answer's tokens and the full stop."
_NAMED = (
    "Loss on all tokens. In some compositions the bridge, or one word of its name, follows its "
    'description ("the author of Misery Stephen King is from"), so the state at the end of the '
    "description has to predict it. A stage with more layers keeps the trained ones and adds new ones with "
    "random weights."
)


def _thinned(curve: list[Mapping[str, Any]], rows: int = 12) -> list[Mapping[str, Any]]:
    """About `rows` records of a loss curve, the last one always among them."""
    step = max(1, len(curve) // rows)
    return [*curve[step - 1 : -1 : step], curve[-1]]

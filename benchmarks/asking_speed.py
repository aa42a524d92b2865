"""Greedy answers against plain batched ``transformers.generate``, with and without a few-shot lead.

``python -m benchmarks.asking_speed [--pairs 5] [--threads 2]`` writes
``docs/benchmarks/asking-speed.md``. Needs SmolLM2-135M (docs/quickstart.md).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.harness import CLASSES, Peak, backends, keep, kept, paired, table, write
from mi_hops import encode, generate, load_facts, load_model
from mi_hops.facts.wordings import few_shot_lead

PAGE = "asking-speed"
FORM = "prefix"
N_FACTS, N_NEW, SHOTS = 16, 6, 4


def questions() -> tuple[list[str], str]:
    """Both hops and the two-hop question of 16 facts of geography, and a lead for all of them."""
    pair = ("country of city", "currency")
    facts = [f for f in load_facts("geo") if (f.relation1, f.relation2) == pair]
    asked, others = facts[:N_FACTS], facts[N_FACTS:]
    lead = few_shot_lead(asked[0], others, shots=SHOTS, form=FORM)
    texts = [
        text
        for fact in asked
        for text in (fact.first_prompt(FORM), fact.second_prompt(FORM), fact.prompt(FORM))
    ]
    return texts, lead


def ours(model: Any, texts: list[str]) -> list[list[int]]:
    """As a user calls it; nothing but the end of the text ends a row early."""
    said = generate(model, texts, max_new_tokens=N_NEW, stop=())
    return [list(g.ids) for g in said]


def theirs(plain: Any, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """One left-padded batch of all prompts."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = plain.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    return found[:, batch["input_ids"].shape[1] :].tolist()


def both(backend: Any) -> tuple[Any, Any, Any]:
    """SmolLM2, the same weights in plain ``transformers``, and a tokenizer that pads on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_model("smollm2-135m", backend=backend, device="cpu")
    folder = model.tokenizer.name_or_path
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, plain, AutoTokenizer.from_pretrained(folder, padding_side="left")


def measure(backend: Any, pairs: int) -> None:
    """Both in turn on one model, without and with the lead."""
    model, plain, tokenizer = both(backend)
    texts, lead = questions()
    for shots, start in ((0, ""), (SHOTS, lead)):
        asked = [start + text for text in texts]
        mine, other = ours(model, asked), theirs(plain, tokenizer, asked)
        same = sum(a == b[: len(a)] for a, b in zip(mine, other, strict=True))
        lengths = [len(encode(model, text)) for text in texts]
        with Peak() as peak:
            ours(model, asked)
        with Peak() as plain_peak:
            theirs(plain, tokenizer, asked)
        found = paired(
            lambda asked=asked: ours(model, asked),
            lambda asked=asked: theirs(plain, tokenizer, asked),
            pairs=pairs,
        )
        found |= {
            "backend": backend, "shots": shots, "same": same, "n": len(texts),
            "lead": len(encode(model, start.strip())) if start else 0,
            "shortest": min(lengths), "longest": max(lengths),
            "mib": peak.mib, "plain_mib": plain_peak.mib,
        }  # fmt: skip
        keep(PAGE, f"{backend}-{shots}", found)


def page() -> None:
    """The table of all parts measured so far."""
    parts = [p for _, p in sorted(kept(PAGE).items(), key=lambda item: item[0])]
    rows = [
        [
            CLASSES[p["backend"]], f"{p['shots']} ({p['lead']} tokens)" if p["shots"] else "none",
            f"**{p['ratio']:.2f}** ({p['lowest']:.2f} to {p['highest']:.2f})",
            f"{p['same']} of {p['n']}", f"{p['mib']:.0f} / {p['plain_mib']:.0f}",
        ]
        for p in parts
    ]  # fmt: skip
    columns = (
        "model class", "examples before each question", "times as fast (lowest to highest pair)",
        "same tokens", "memory beyond the models, MiB (ours / plain)",
    )  # fmt: skip
    some = parts[0]
    body = f"""
{some["n"]} questions of {some["shortest"]} to {some["longest"]} tokens (both hops and the two-hop question of
{N_FACTS} facts of the bundled geography), up to {N_NEW} tokens generated greedily, on SmolLM2-135M in float32 on a CPU.
The baseline is one left-padded batch through `transformers`' own `generate` on the same weights. Runs alternate,
{some["pairs"]} pairs; ratios are taken pair by pair. Below 1, `generate` is faster.

{table(columns, rows)}

- While nothing is hooked, GPT-2 and LLaMA in float32 run without hook points on either class: one normalisation where
  TransformerLens has three, attention as one fused kernel.
- Prompts of all lengths run together. Outside attention, padding costs nothing and a prefix that several prompts share
  is computed once; after that, each row continues at its own positions.
- A prefix that is long or widely shared, such as a few-shot lead, is run first, and every row attends to its cached keys
  and values.
- Finished rows leave the batch. Here only the end-of-text token ends a row; with the usual stop strings more rows end.
- Other families and half precision run through the model itself, in batches of similar length. Under a repair, and with
  the user's own hooks on the model, prompts of equal length are batched and run in full.
"""
    write(PAGE, "Asking: speed", body, script="asking_speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for backend in backends():
        measure(backend, options.pairs)
    page()


if __name__ == "__main__":
    main()

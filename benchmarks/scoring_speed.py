"""Scores of many prompts, unedited and each under its own edit, against plain ``transformers``.

``python -m benchmarks.scoring_speed [--pairs 5] [--threads 2]`` writes
``docs/benchmarks/scoring-speed.md``. Needs SmolLM2-135M (docs/quickstart.md).
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch

from benchmarks.asking_speed import FORM, SHOTS, both
from benchmarks.harness import CLASSES, Peak, backends, keep, kept, paired, table, write
from mi_hops import encode, load_facts, score_prompts
from mi_hops.editing import Change, Edit, EditRepair
from mi_hops.facts.wordings import few_shot_lead
from mi_hops.model import fingerprint
from mi_hops.sweep import target_of

PAGE = "scoring-speed"
N_FACTS, N_EDITS, LAYER = 64, 8, 6


def random_edit(model: Any, seed: int) -> Edit:
    """A rank-one change of one layer's W_O; what it says does not matter for speed."""
    generator = torch.Generator().manual_seed(seed)
    left = 0.1 * torch.randn(1, model.cfg.n_heads * model.cfg.d_head, generator=generator)
    right = torch.randn(1, model.cfg.d_model, generator=generator)
    change = Change("W_O", LAYER, left, right)
    return Edit(method="random", changes=(change,), fingerprint=fingerprint(model))


class Asked:
    """The same questions, scored here and by ``transformers`` on the same weights."""

    def __init__(self, models: tuple[Any, Any, Any], shots: int, edited: bool) -> None:
        self.model, self.plain, self.tokenizer = models
        facts = load_facts("geo")
        self.facts, others = facts[:N_FACTS], facts[N_FACTS:]
        lead = few_shot_lead(self.facts[0], others, shots=shots, form=FORM) if shots else ""
        self.texts = [lead + fact.prompt(FORM) for fact in self.facts]
        self.lead = len(encode(self.model, lead.strip())) if lead else 0
        self.prompts = [encode(self.model, text) for text in self.texts]
        self.targets = [
            target_of(self.model, p, f.answer)
            for p, f in zip(self.prompts, self.facts, strict=True)
        ]
        edits = [random_edit(self.model, i) for i in range(N_EDITS)] if edited else []
        each = N_FACTS // N_EDITS
        self.groups = [(e, range(i * each, (i + 1) * each)) for i, e in enumerate(edits)]
        self.groups = self.groups or [(None, range(N_FACTS))]

    def ours(self) -> torch.Tensor:
        """As a user calls it."""
        states = [edit for edit, rows in self.groups for _ in rows]
        if states[0] is None:
            found = score_prompts(self.model, self.prompts, self.targets, "first_prob")
        else:
            found = score_prompts(
                self.model,
                self.prompts,
                self.targets,
                "first_prob",
                repair=EditRepair({}),
                states=states,
            )
        return found["first_prob"]

    @torch.no_grad()
    def theirs(self) -> torch.Tensor:
        """One left-padded batch for every edit, which is added to the weights and taken away."""
        found = []
        weight = self.plain.model.layers[LAYER].self_attn.o_proj.weight
        for edit, rows in self.groups:
            batch = self.tokenizer([self.texts[i] for i in rows], return_tensors="pt", padding=True)
            before = weight.clone()
            if edit is not None:
                change = edit.changes[0]
                weight += (change.left.T @ change.right).T
            logits = self.plain(**batch, logits_to_keep=1).logits[:, -1]
            weight.copy_(before)
            answers = torch.tensor([self.targets[i].answer[0] for i in rows])
            found.append(logits.softmax(-1).gather(1, answers[:, None])[:, 0])
        return torch.cat(found)


def measure(
    backend: Any, models: tuple[Any, Any, Any], shots: int, edited: bool, pairs: int
) -> None:
    """Both in turn on one model."""
    asked = Asked(models, shots, edited)
    apart = (asked.ours() - asked.theirs()).abs().max().item()
    with Peak() as peak:
        asked.ours()
    with Peak() as plain_peak:
        asked.theirs()
    lengths = [len(prompt) for prompt in asked.prompts]
    found = paired(asked.ours, asked.theirs, pairs=pairs)
    found |= {
        "backend": backend, "shots": shots, "lead": asked.lead, "edited": edited, "apart": apart,
        "shortest": min(lengths), "longest": max(lengths),
        "mib": peak.mib, "plain_mib": plain_peak.mib,
    }  # fmt: skip
    keep(PAGE, f"{backend}-{shots}-{'edited' if edited else 'unedited'}", found)


def page() -> None:
    """The table of all parts measured so far."""
    parts = [p for _, p in sorted(kept(PAGE).items(), key=lambda item: item[0])]
    rows = [
        [
            CLASSES[p["backend"]], f"{p['shots']} ({p['lead']} tokens)" if p["shots"] else "none",
            f"{N_EDITS}, one for every {N_FACTS // N_EDITS} prompts" if p["edited"] else "none",
            f"**{p['ratio']:.2f}** ({p['lowest']:.2f} to {p['highest']:.2f})",
            f"{p['apart']:.0e}", f"{p['mib']:.0f} / {p['plain_mib']:.0f}",
        ]
        for p in parts
    ]  # fmt: skip
    columns = (
        "model class", "examples before each question", "edits",
        "times as fast (lowest to highest pair)", "largest difference of a probability",
        "memory beyond the models, MiB (ours / plain)",
    )  # fmt: skip
    some = parts[0]
    body = f"""
The probability of the answer's first token after {N_FACTS} two-hop questions of the bundled geography, on SmolLM2-135M in
float32 on a CPU: unedited, and with {N_EDITS} rank-one edits of one layer's W_O, each asked about {N_FACTS // N_EDITS} of the questions. Here
one call of `score_prompts` takes all rows, each under its own edit, and no weight is changed. The baseline runs
`transformers` on the same weights: one left-padded batch, of which the last position alone is unembedded; with edits,
one batch for each, which is added to the weights before and taken away afterwards. Runs alternate, {some["pairs"]} pairs; ratios
are taken pair by pair. Below 1, `transformers` is faster.

{table(columns, rows)}

- While nothing but edits is active, GPT-2 and LLaMA in float32 run without hook points on either class, and a rank-one
  edit is two thin products beside the layer's own.
- What the prompts of one edit start with alike is run once; without edits, what all start with alike.
"""
    write(PAGE, "Scoring: speed", body, script="scoring_speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for backend in backends():
        models = both(backend)
        for shots, edited in product((0, SHOTS), (False, True)):
            measure(backend, models, shots, edited, options.pairs)
    page()


if __name__ == "__main__":
    main()

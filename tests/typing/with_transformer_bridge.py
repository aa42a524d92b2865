"""What a user of `TransformerBridge` types; mypy and pyright must pass it without an ignore."""

import torch
from transformer_lens.model_bridge import TransformerBridge

import mi_hops
from mi_hops import Hopland, Intervention, Result, TwoHopFact

model = TransformerBridge.boot_transformers("gpt2", device="cpu")
world = Hopland()
facts: list[TwoHopFact] = list(world.sample(train=10, held_out=10))
fact = facts[0]
text = fact.prompt("suffix")
prompt = mi_hops.encode(model, text)

lens: Result = mi_hops.logit_lens(model, text)
values = lens.mean("position")["prob"].values

target = mi_hops.answer_ids(model, prompt, fact.answer)[0]
sweep = [
    Intervention.at("attn_out", layer, torch.zeros_like, positions=[position])
    for layer in range(4)
    for position in range(len(prompt))
]
out = mi_hops.fan_out(model, mi_hops.pad([prompt.ids]), sweep)
fall: torch.Tensor = (out.base - out.rows)[:, 0, target]

said = mi_hops.generate(model, [text])
moments = mi_hops.second_moments(model, mi_hops.fact_texts(facts), layers=[0, 1])
study: mi_hops.Study = mi_hops.run_study("hops-gpt2", facts, out="results")
mi_hops.write_report(study, "report.html")
mi_hops.save_jsonl(facts, "facts.jsonl")

tokens: torch.Tensor = model.to_tokens(text)
vectors: torch.Tensor = torch.randn(model.cfg.n_layers, model.cfg.d_model)
with mi_hops.inject(model, vectors, layers=[2, 3], kind="resid_pre", strength=4.0):
    logits: torch.Tensor = model(tokens)
with mi_hops.inject(model, vectors[2], layers=2, positions="last", prompts=[text]):
    model(tokens)
hooks = mi_hops.inject(model, [fact.bridge, fact.answer], layers=2)
injected = model.run_with_hooks(tokens, fwd_hooks=hooks)

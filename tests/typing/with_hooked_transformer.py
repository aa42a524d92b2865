"""What a user of `HookedTransformer` types; mypy and pyright must pass it without an ignore."""

import torch
from transformer_lens import HookedTransformer

import mi_hops
from mi_hops import Prompt, Result, TwoHopFact

model = HookedTransformer.from_pretrained("gpt2", device="cpu")
facts = mi_hops.load_facts("hopland")
fact: TwoHopFact = facts[0]

text = fact.prompt("suffix")
tokens: torch.Tensor = model.to_tokens(text)
prompt: Prompt = Prompt.from_tokens(model, tokens[0])
same = mi_hops.encode(model, text)
answer: tuple[int, ...] = mi_hops.answer_ids(model, same, fact.answer)

gap = mi_hops.find_gap(model, facts, form="suffix")
failed: list[TwoHopFact] = gap.failed
lens: Result = mi_hops.fact_trajectories(model, failed, form="suffix")
figure = lens.sel(position="last").plot("prob")
located: Result = mi_hops.locate(model, failed, form="suffix")
layers: list[int] = mi_hops.located_layers(located)

erased: Result = mi_hops.erase_bridge(model, gap.passed, form="suffix")

edit: mi_hops.Edit = mi_hops.creme(model, failed[0], layers=range(4), form="suffix")
with edit.applied(model):
    answers = mi_hops.answered(model, [text], [fact.answer])

queries = mi_hops.build_sets(model, failed, gap=gap, per_case=2)
scores = mi_hops.evaluate(model, edit, queries, failed, generate=False)
first = scores.summary()["correction"]
kinds: Result = mi_hops.failure_types(model, gap)

lens.save("lens.nc", overwrite=True)
again: Result = Result.load("lens.nc")

vector: torch.Tensor = torch.randn(model.cfg.d_model)
with mi_hops.inject(model, vector, layers=[2, 3], kind="resid_pre", strength=4.0):
    logits: torch.Tensor = model(tokens)
with mi_hops.inject(model, {2: vector}, positions="last", prompts=[text]):
    model(tokens)
injected = model.run_with_hooks(tokens, fwd_hooks=mi_hops.inject(model, fact.bridge, layers=2))
edited = model.run_with_hooks(tokens, fwd_hooks=mi_hops.edit_hooks(model, [edit]))

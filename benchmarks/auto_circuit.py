"""EAP and ACDC of the package auto-circuit, on the models and pairs of `benchmarks.circuits_speed`.

It is no dependency: ``pip install --no-deps auto-circuit ordered-set`` into an environment of your own.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

from mi_hops.patching.nodes import readers, writers
from mi_hops.text.tokens import Prompt


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("auto_circuit") is not None


class AutoCircuit:
    """One model wrapped by auto-circuit (in place: give it a model of its own), with pairs of prompts.

    Args:
        answers: the token ids whose logit difference is scored, the same for all pairs.
    """

    def __init__(
        self,
        model: Any,
        clean: Sequence[Prompt],
        corrupted: Sequence[Prompt],
        answers: tuple[int, int] = (0, 1),
    ) -> None:
        _stand_in()
        from auto_circuit.data import PromptDataLoader, PromptDataset
        from auto_circuit.utils.graph_utils import patchable_model

        for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
            setattr(model.cfg, flag, True)
        # Query heads that share a key and value head; each has edges of its own there.
        self.group = 1
        if model.cfg.n_key_value_heads is not None:
            self.group = int(model.cfg.n_heads) // int(model.cfg.n_key_value_heads)
            model.set_ungroup_grouped_query_attention(True)
        self.names = (
            [node.name for node in writers(model, "all")],
            [node.name for node in readers(model, "all")],
        )
        # In our order of visiting, which is a stable sort by stage as theirs is.
        order = {
            (u.name, v.name): (-v.stage, j, -u.stage, i)
            for i, u in enumerate(writers(model, "all"))
            for j, v in enumerate(readers(model, "all"))
        }
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = patchable_model(
            model, factorized=True, slice_output="last_seq", separate_qkv=True
        )
        self.model.edges = sorted(self.model.edges, key=lambda e: order[self.edge(e)])
        sides = [[torch.tensor(p.ids) for p in side] for side in (clean, corrupted)]
        right, wrong = ([torch.tensor([a])] * len(clean) for a in answers)
        data = PromptDataset(*sides, right, wrong)
        self.loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=len(clean))

    def eap(self) -> Any:
        """Their scores: the gradient of the masks at the clean run, as they compute EAP."""
        from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

        options: dict[str, Any] = {"grad_function": "logit", "answer_function": "avg_diff"}
        return mask_gradient_prune_scores(self.model, self.loader, None, mask_val=0.0, **options)

    def by_edge(self, found: Any) -> dict[tuple[str, str], float]:
        """Edge -> its score, as a change by corrupting it."""
        scores: dict[tuple[str, str], float] = {}
        for e in self.model.edges:
            edge = self.edge(e)
            scores[edge] = scores.get(edge, 0.0) - float(e.prune_score(found))
        return scores

    def acdc(self) -> set[tuple[str, str]]:
        """Edges that stay at a threshold of 0.01 nats."""
        from auto_circuit.prune_algos.ACDC import acdc_prune_scores

        found = acdc_prune_scores(self.model, self.loader, None, tao_exps=[-2], tao_bases=[1])
        return {self.edge(e) for e in self.model.edges if e.prune_score(found) == torch.inf}

    def edge(self, edge: Any) -> tuple[str, str]:
        """Its names in ours; edges into query heads that share a key or value head have one name."""
        return _node(edge.src.name, self.group), _node(edge.dest.name, self.group)


def _node(name: str, group: int) -> str:
    if name in ("Resid Start", "Resid End"):
        return {"Resid Start": "embed", "Resid End": "logits"}[name]
    if name.startswith("MLP "):
        return f"MLP{name.split()[1]}"
    layer, head, *role = name[1:].split(".")
    if role and role[0] != "Q":
        head = str(int(head) // group)
    return f"L{layer}H{head}" + "".join(f".{r.lower()}" for r in role)


def _stand_in() -> None:
    """What auto-circuit 1.0.1 imports and neither method uses: moved names, a package for files."""
    import transformer_lens

    cache = transformer_lens.TransformerLensKeyValueCache
    transformer_lens.HookedTransformerKeyValueCache = cache
    for held in (
        {
            "name": "transformer_lens.past_key_value_caching",
            "HookedTransformerKeyValueCache": cache,
        },
        {"name": "blobfile", "BlobFile": object},
    ):
        name = str(held.pop("name"))
        if name not in sys.modules:
            module = types.ModuleType(name)
            vars(module).update(held)
            sys.modules[name] = module

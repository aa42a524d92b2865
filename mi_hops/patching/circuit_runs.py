"""Circuits run exactly: every reader's input is made of the edges that a circuit has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mi_hops.model import (
    Hook,
    HookedModel,
    device_of,
    dtype_of,
    forward,
    hook_name,
    n_heads_of,
    w_o,
)
from mi_hops.model.hooks import splits_blocks
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import captured
from mi_hops.patching.nodes import Edge, Node, Writes, all_edges, readers, writers
from mi_hops.sweep.metrics import require_finite
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.text.tokens import Prompt


class CircuitRunner:
    """Runs circuits of one model."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.writers, self.readers = writers(model, "all"), readers(model, "all")
        self.edges = set(all_edges(model))
        self._row = {u.name: i for i, u in enumerate(self.writers)}
        self._column = {v.name: j for j, v in enumerate(self.readers)}

    def mask(self, edges: Collection[Edge]) -> Bool[Tensor, "writer reader"]:
        """True at the edges of a circuit.

        Raises:
            ValueError: an edge the model does not have.
        """
        unknown = sorted(set(edges) - self.edges)
        if unknown:
            raise ValueError(f"{len(unknown)} edges are not the model's, e.g. {unknown[:3]}")
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for u, v in edges:
            mask[self._row[u], self._column[v]] = True
        return mask

    def prepare(self, clean: Scored, corrupted: Prompt) -> ReadyPair:
        """One pair, with its corrupted run cached."""
        return ReadyPair(self, clean, corrupted)


class ReadyPair:
    """A pair whose corrupted activations are at hand."""

    def __init__(self, runner: CircuitRunner, clean: Scored, corrupted: Prompt) -> None:
        self.runner, self.model = runner, runner.model
        self.sweep = Sweep(self.model, [clean])
        n_layers = int(self.model.cfg.n_layers)
        ids = self.sweep.runs[0].tokens
        extra = ids[len(clean.prompt) :]
        both = (_longer(clean.prompt, extra), _longer(corrupted, extra))
        corrupt = Writes(self.model, (both[1],), runner.writers)
        kinds = [("resid_pre", i) for i in range(n_layers)]
        kinds += [("resid_mid", i) for i in range(n_layers)] + [("resid_post", n_layers - 1)]
        names = [hook_name(kind, layer) for kind, layer in kinds]
        self.stream = captured(self.model, [both[1]], names)
        first = hook_name("resid_pre", 0)
        embedded = captured(self.model, [both[0]], [first])[first]
        change = (embedded - self.stream[first])[0]
        self.embed_change = change.to(wide_dtype(change.dtype))
        self.corrupt = torch.stack([corrupt(u, 0).to(self.embed_change) for u in runner.writers])

    def scores(self, masks: Bool[Tensor, "circuit writer reader"]) -> Float[Tensor, "circuit"]:
        """Scores of circuits, in one pass.

        Raises:
            ValueError: a score that is not finite.
        """
        return self.run(masks)[0]

    def run(
        self,
        masks: Bool[Tensor, "circuit writer reader"],
        known: Float[Tensor, "writer pos d_model"] | None = None,
        first: Node | None = None,
    ) -> tuple[Float[Tensor, "circuit"], Float[Tensor, "circuit writer pos d_model"]]:
        """Scores, and what each writer writes beyond its corrupted write.

        Args:
            known: these changes in a circuit that differs from all of `masks` in edges into `first`
                and later readers only; then nothing before `first` is computed again.

        Raises:
            ValueError: a score that is not finite.
        """
        run = _CircuitPass(self, masks, known, first)
        with torch.no_grad():
            tokens = self.sweep.batch.tokens.to(device_of(self.model))
            logits = forward(self.model, tokens, hooks=run.hooks(), grows=True)
        item = self.sweep.prompts[0]
        found = item.metrics[0].score(logits, item.target).cpu()
        require_finite(item.metrics[0].name, found)
        return found, run.changes


def _longer(prompt: Prompt, extra: Sequence[int]) -> Prompt:
    """The prompt with an answer's tokens behind it."""
    n = len(extra)
    return replace(
        prompt,
        ids=(*prompt.ids, *extra),
        labels=(*prompt.labels, *[""] * n),
        offsets=(*prompt.offsets, *[(0, 0)] * n),
    )


class _CircuitPass:
    """The hooks of one pass: K circuits, each with a row of its own and one for each reader.

    At the input of a block the batch is rebuilt: K main rows, then, for every circuit, one row
    with the input of each query, key and value head. Norm and projections run on all; then the main
    rows take each head from its reader's row, and go on through attention and MLP. Where the class
    lets them (`splits_blocks`), the readers' rows end there.
    """

    def __init__(
        self,
        ready: ReadyPair,
        masks: Bool[Tensor, "circuit writer reader"],
        known: Tensor | None = None,
        first: Node | None = None,
    ) -> None:
        self.ready, self.model, self.n = ready, ready.model, len(masks)
        self.wide = wide_dtype(dtype_of(self.model))
        self.columns = {node: j for j, node in enumerate(ready.runner.readers)}
        self.splits = splits_blocks(self.model)
        # What each writer writes beyond its corrupted write. Writers come in the order in which they
        # act, so those a reader sees are the ones written so far.
        change = ready.embed_change
        self.masks = masks.to(change)
        self.changes = change.new_zeros(self.n, len(ready.runner.writers), *change.shape)
        self.written = 0
        self.first = first
        if known is None or first is None:
            self.changes[:, 0] = change
            self.written = 1
        else:
            self.written = sum(u.reaches(first) for u in ready.runner.writers)
            self.changes[:, : self.written] = known[: self.written]

    def hooks(self) -> list[Hook]:
        """All hooks, in order."""
        n_layers = int(self.model.cfg.n_layers)
        begin = 0 if self.first is None else self.first.layer
        hooks: list[Hook] = []
        for layer in range(begin, n_layers):
            if layer == begin and self.first is not None and self.first.role == "mlp":
                hooks.append((hook_name("resid_pre", layer), self._repeat))
            else:
                hooks += self._attention(layer)
            hooks.append((hook_name("resid_mid", layer), self._enter_mlp(layer)))
            hooks.append((hook_name("mlp_out", layer), self._mlp))
        hooks.append((hook_name("resid_post", n_layers - 1), self._leave(n_layers)))
        where = self.ready.sweep.scored[0]
        hooks.append(("unembed.hook_in", lambda x: x[:, where]))
        return hooks

    def _attention(self, layer: int) -> list[Hook]:
        heads = {role: n_heads_of(self.model, role) for role in _INPUTS}
        inputs = [Node(role, layer, head) for role in _INPUTS for head in range(heads[role])]
        hooks: list[Hook] = [(hook_name("resid_pre", layer), self._enter(layer, inputs))]
        start = 0
        for role in _INPUTS:
            own = slice(start, start + heads[role])
            hooks.append((hook_name(role, layer), self._gather(own, len(inputs))))
            start += heads[role]
        hooks.append((hook_name("z", layer), self._heads(layer)))
        if self.splits:  # rows that the stream has and attention does not have any more
            rows = self.n * len(inputs)

            def widen(x: Tensor) -> Tensor:
                return torch.cat([x, x.new_zeros(rows, *x.shape[1:])])

            hooks.append((hook_name("attn_out", layer), widen))
        return hooks

    def _write(self, written: Float[Tensor, "circuit writer pos d_model"]) -> None:
        """What the next writers write."""
        now = slice(self.written, self.written + written.shape[1])
        self.changes[:, now] = written.to(self.changes) - self.ready.corrupt[now]
        self.written = now.stop

    def _inputs(self, found: Sequence[Node], stream: Tensor) -> Tensor:
        """The stream that readers of one place see, ``[circuit, reader, pos, d_model]``."""
        columns = [self.columns[reader] for reader in found]
        weights = self.masks[:, : self.written, columns]
        moved = einsum(
            "circuit writer reader, circuit writer pos d -> circuit reader pos d",
            weights,
            self.changes[:, : self.written],
        )
        return moved.add_(stream.to(moved))

    def _repeat(self, x: Tensor) -> Tensor:
        return repeat(x[:1], "1 pos d -> circuit pos d", circuit=self.n)

    def _enter(self, layer: int, inputs: list[Node]) -> Any:
        def fn(x: Tensor) -> Tensor:
            stream = self.ready.stream[hook_name("resid_pre", layer)]
            rows = rearrange(
                self._inputs(inputs, stream), "circuit reader ... -> (circuit reader) ..."
            )
            main = repeat(stream, "1 pos d -> circuit pos d", circuit=self.n)
            return torch.cat([main.to(x), rows.to(x)])

        return fn

    def _gather(self, own: slice, n_inputs: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            each = x[self.n :].unflatten(0, (self.n, n_inputs))[:, own]
            # Of every reader's row, the reader's own head.
            heads = rearrange(
                each.diagonal(dim1=1, dim2=3), "circuit pos d head -> circuit pos head d"
            )
            return heads.contiguous() if self.splits else torch.cat([heads, x[self.n :]])

        return fn

    def _heads(self, layer: int) -> Any:
        def fn(x: Tensor) -> None:
            weight = w_o(self.model, layer).detach().to(x.device, self.wide)
            written = einsum(
                "circuit pos head d_head, head d_head d_model -> circuit head pos d_model",
                x[: self.n].to(self.wide),
                weight,
            )
            self._write(written)

        return fn

    def _enter_mlp(self, layer: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            stream = self.ready.stream[hook_name("resid_mid", layer)]
            main = self._inputs([Node("mlp", layer)], stream)[:, 0].to(x)
            return main if self.splits else torch.cat([main, x[self.n :]])

        return fn

    def _mlp(self, x: Tensor) -> None:
        self._write(x[: self.n, None].to(self.wide))

    def _leave(self, n_layers: int) -> Any:
        def fn(x: Tensor) -> Tensor:
            stream = self.ready.stream[hook_name("resid_post", n_layers - 1)]
            return self._inputs([Node("logits", n_layers)], stream)[:, 0].to(x)

        return fn


_INPUTS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")

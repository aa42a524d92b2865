"""Circuits run exactly: every reader's input is made of the edges that a circuit has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mi_hops.model import (
    Hook,
    HookedModel,
    dtype_of,
    forward,
    hook_name,
    n_heads_of,
    w_o,
)
from mi_hops.model.cache import Prefix
from mi_hops.model.hooks import head_inputs, split_heads, splits_blocks
from mi_hops.model.numeric import wide_dtype
from mi_hops.patching.core import captured
from mi_hops.patching.nodes import (
    Edge,
    Node,
    Writes,
    all_edges,
    read_hooks,
    readers,
    require_edges,
    writers,
)
from mi_hops.sweep.metrics import require_finite
from mi_hops.sweep.runs import Scored, Sweep
from mi_hops.sweep.scoring import prefix_of
from mi_hops.text.tokens import Prompt

_ALL = slice(None)
#: Bytes that what writers write may take in a pass of several pairs.
PASS_BYTES = 2**28


class CircuitRunner:
    """Runs circuits of one model."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.writers, self.readers = writers(model, "all"), readers(model, "all")
        self.edges = set(all_edges(model))
        self.mlps = {v.layer: v for v in self.readers if v.role == "mlp"}
        self._row = {u.name: i for i, u in enumerate(self.writers)}
        self._column = {v.name: j for j, v in enumerate(self.readers)}

    def mask(self, edges: Collection[Edge]) -> Bool[Tensor, "writer reader"]:
        """True at the edges of a circuit, all of which must be the model's."""
        require_edges(edges, self.edges)
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for u, v in edges:
            mask[self._row[u], self._column[v]] = True
        return mask

    def prepare(
        self, clean: Sequence[Scored], corrupted: Sequence[Prompt], circuits: int = 1
    ) -> list[ReadyPairs]:
        """Pairs with their corrupted runs cached, those together that may share a pass.

        Args:
            circuits: how many will be run at once at the most; bounds the pairs in a pass.
        """
        alike: dict[Any, list[int]] = {}
        sweeps = [Sweep(self.model, [item]) for item in clean]
        for i, sweep in enumerate(sweeps):
            alike.setdefault((len(sweep.runs[0].tokens), tuple(sweep.scored[0])), []).append(i)
        found = []
        for (width, _), group in alike.items():
            row = len(self.writers) * width * int(self.model.cfg.d_model) * 4 * circuits
            most = max(1, PASS_BYTES // row)
            found += [
                ReadyPairs(self, [sweeps[i] for i in part], [corrupted[i] for i in part])
                for part in (group[i : i + most] for i in range(0, len(group), most))
            ]
        return found


class ReadyPairs:
    """Pairs of equal length, scored at the same places, whose corrupted activations are at hand.

    Where heads have inputs of their own, only the tail behind the tokens that both prompts of all
    pairs start with is run: there no writer writes anything else than in the corrupted run.

    Attributes:
        start: the tail's first position; all below count from it.
        where: positions that the metric reads.
        streams: by hook name, the corrupted stream ``[pair, pos, d_model]``.
        corrupt: ``[pair, writer, pos, d_model]``, what writers write in the corrupted runs.
        embed_change: ``[pair, pos, d_model]``, what the clean embedding is beyond the corrupted one.

    Raises:
        ValueError: writes that do not add up to the stream (a hook that scales it, for instance).
    """

    def __init__(
        self, runner: CircuitRunner, sweeps: Sequence[Sweep], corrupted: Sequence[Prompt]
    ) -> None:
        self.runner, self.model, self.sweeps = runner, runner.model, list(sweeps)
        n_layers = int(self.model.cfg.n_layers)
        self.splits = splits_blocks(self.model)
        self.own_inputs = self.splits and head_inputs(self.model, "q", 0) is not None
        clean, corrupt = [], []
        for sweep, prompt in zip(sweeps, corrupted, strict=True):
            known = sweep.prompts[0].prompt
            extra = sweep.runs[0].tokens[len(known) :]
            clean.append(_longer(known, extra))
            corrupt.append(_longer(prompt, extra))
        scored = list(sweeps[0].scored[0])
        self.start = 0
        if self.own_inputs:
            same = (
                zip(*(p.ids for p in clean), strict=True),
                zip(*(p.ids for p in corrupt), strict=True),
            )
            shared = (one == other for one, other in zip(*same, strict=True))
            self.start = min([*scored, *(i for i, equal in enumerate(shared) if not equal)])
        tail = slice(self.start, None)
        self.where = [i - self.start for i in scored]
        self.tokens = torch.tensor([clean[0].ids[tail]])
        kinds = [("resid_pre", i) for i in range(n_layers)]
        kinds += [(read_hooks(mlp)[0], mlp.layer) for mlp in runner.mlps.values()]
        kinds.append(("resid_post", n_layers - 1))
        names = list(dict.fromkeys(hook_name(kind, layer) for kind, layer in kinds))
        written = Writes.hook_names(runner.writers)
        there = captured(self.model, corrupt, dict.fromkeys([*names, *written]))
        self.streams = {name: there[name][:, tail] for name in names}
        steps = self._steps(names[-1])
        here = captured(self.model, clean, dict.fromkeys(name for name, _ in steps))
        _require_sums(here, there, steps)
        first = hook_name("resid_pre", 0)
        change = here[first][:, tail] - self.streams[first]
        self.embed_change = change.to(wide_dtype(change.dtype))
        writes = Writes(self.model, corrupt, runner.writers, there)
        self.corrupt = torch.stack(
            [
                torch.stack([writes(u, i)[tail].to(self.embed_change) for u in runner.writers])
                for i in range(len(corrupt))
            ]
        )
        self._prefix: Prefix | None = None
        if self.start:
            ids = torch.tensor([p.ids[: self.start] for p in corrupt])
            self._prefix = prefix_of(self.model, ids)

    def __len__(self) -> int:
        return len(self.sweeps)

    def _steps(self, end: str) -> list[tuple[str, bool]]:
        """Writes (True; of all heads of a block together) and streams read (False), in order."""
        steps = [(hook_name("resid_pre", 0), True)]
        for layer in range(int(self.model.cfg.n_layers)):
            mlp = self.runner.mlps.get(layer)
            steps += [(hook_name("resid_pre", layer), False), (hook_name("attn_out", layer), True)]
            if mlp is not None:
                steps += [] if mlp.beside else [(hook_name("resid_mid", layer), False)]
                steps.append((hook_name("mlp_out", layer), True))
        return [*steps, (end, False)]

    def cache(self) -> Any:
        """Keys and values before the tail, for a pass that begins with one row; None without any."""
        if self._prefix is None:
            return None
        view = self._prefix.view(list(range(len(self))), self.start)
        view.rows = [0]
        return view

    def run(
        self,
        masks: Bool[Tensor, "circuit writer reader"],
        known: Float[Tensor, "pair writer pos d_model"] | None = None,
        first: Node | None = None,
    ) -> tuple[Float[Tensor, "pair circuit"], Float[Tensor, "pair circuit writer pos d_model"]]:
        """Scores, and what each writer writes beyond its corrupted write.

        Args:
            known: these changes in a circuit that differs from all of `masks` in edges into `first`
                and later readers only; then nothing before `first` is computed again.
        """
        run = _CircuitPass(self, masks, known, first)
        with torch.no_grad():
            logits = run.logits().unflatten(0, (len(self), len(masks)))
        found = []
        for sweep, rows in zip(self.sweeps, logits, strict=True):
            item = sweep.prompts[0]
            found.append(item.metrics[0].score(rows, item.target).cpu())
            require_finite(item.metrics[0].name, found[-1])
        return torch.stack(found), run.changes


def _require_sums(
    clean: Mapping[str, Tensor], corrupted: Mapping[str, Tensor], steps: Sequence[tuple[str, bool]]
) -> None:
    """Refuse streams whose difference, where they are read, is not that of what was written before.

    Every addition to a stream rounds by a part of the dtype's eps, independently of the others.

    Args:
        steps: hook names in the order of the forward pass, and whether it is a write or a stream.
    """
    like = clean[steps[-1][0]]
    eps = max(torch.finfo(clean[name].dtype).eps for name, _ in steps)
    moved = torch.zeros_like(like, dtype=wide_dtype(like.dtype))
    size = torch.zeros_like(moved)
    n_written = 0
    for name, written in steps:
        one, other = clean[name].to(moved), corrupted[name].to(moved)
        if written:
            moved, size = moved + (one - other), size + one.abs() + other.abs()
            n_written += 1
            continue
        off = (one - other - moved).norm(dim=-1)
        if bool((off > eps * n_written**0.5 * size.norm(dim=-1)).any()):
            raise ValueError(
                "what the embedding, attention and MLPs write does not add up to the residual stream: "
                f"at {name} the clean and the corrupted run are {float(off.max()):.2g} away from what "
                "was written before. Does a hook on the model change the stream, or a block scale it? "
                "A circuit's edges are not defined then; remove the hook, or change what is written "
                "(z, mlp_out)"
            )


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
    """The hooks of one pass: a main row for each pair and circuit, and what each reader reads beside it.

    Where the class has a hook point for each head's own input (`head_inputs`), readers get theirs
    there. Elsewhere the batch is rebuilt at the input of a block: main rows, then for each one row
    with the input of each query, key and value head. Norm and projections run on all; then the main
    rows take each head from its reader's row, and go on through attention and MLP. Where the class
    lets them (`splits_blocks`), the readers' rows end there, and the last MLP runs where it is scored.
    """

    def __init__(
        self,
        pairs: ReadyPairs,
        masks: Bool[Tensor, "circuit writer reader"],
        known: Tensor | None = None,
        first: Node | None = None,
    ) -> None:
        self.pairs, self.model, self.first = pairs, pairs.model, first
        self.shape, self.n = (len(pairs), len(masks)), len(pairs) * len(masks)
        self.wide = wide_dtype(dtype_of(self.model))
        runner = pairs.runner
        self.columns = {node: j for j, node in enumerate(runner.readers)}
        self.mlps = runner.mlps
        self.splits, self.own_inputs, self.where = pairs.splits, pairs.own_inputs, pairs.where
        self.cache = pairs.cache()
        # What each writer writes beyond its corrupted write. Writers come in the order in which they
        # act, so those a reader sees are the ones written so far.
        change = pairs.embed_change
        self.masks = masks.to(change).repeat(len(pairs), 1, 1)
        self.changes = change.new_zeros(*self.shape, len(runner.writers), *change.shape[1:])
        self.written = 0
        if known is None or first is None:
            self.changes[:, :, 0] = change[:, None]
            self.written = 1
        else:
            self.written = sum(u.reaches(first) for u in runner.writers)
            self.changes[:, :, : self.written] = known[:, None, : self.written]

    def logits(self) -> Float[Tensor, "row pos vocab"]:
        """Of all rows, where they are scored."""
        with split_heads(self.model) if self.own_inputs else nullcontext():
            options: dict[str, Any] = {"hooks": self.hooks(), "cache": self.cache, "grows": True}
            return forward(self.model, self.pairs.tokens, **options)

    def hooks(self) -> list[Hook]:
        """All hooks, in order."""
        n_layers = int(self.model.cfg.n_layers)
        begin = 0 if self.first is None else self.first.layer
        hooks: list[Hook] = []
        # In the last block nothing is needed but what is scored.
        last = self.where if self.splits else _ALL
        for layer in range(begin, n_layers):
            mlp = self.mlps.get(layer)
            behind = None if mlp is None or mlp.beside else mlp
            if layer == begin and behind is not None and self.first == behind:
                if not self.splits:
                    hooks.append((hook_name("resid_pre", layer), self._repeat))
            elif self.own_inputs:
                hooks += self._attention(layer)
            else:
                hooks += self._attention_by_rows(layer)
            at = last if layer == n_layers - 1 else _ALL
            if behind is not None:
                hooks.append((hook_name("resid_mid", layer), partial(self._enter_mlp, behind, at)))
            if mlp is not None:
                hooks.append((hook_name("mlp_out", layer), partial(self._mlp, at)))
        hooks.append((hook_name("resid_post", n_layers - 1), partial(self._leave, n_layers, last)))
        if not self.splits:
            hooks.append(("unembed.hook_in", lambda x: x[:, self.where]))
        return hooks

    def _attention(self, layer: int) -> list[Hook]:
        def one_row(x: Tensor) -> Tensor:
            """Enough of a stream that no reader reads: what they read has all rows."""
            if self.cache is not None:
                self.cache.rows = [
                    pair for pair in range(self.shape[0]) for _ in range(self.shape[1])
                ]
            return x[:1]

        hooks: list[Hook] = [(hook_name("resid_pre", layer), one_row)]
        for role in _INPUTS:
            found = [Node(role, layer, head) for head in range(n_heads_of(self.model, role))]
            name = head_inputs(self.model, role, layer)
            assert name is not None
            hooks.append((name, partial(self._head_inputs, layer, found)))
        return [*hooks, (hook_name("z", layer), partial(self._heads, layer))]

    def _attention_by_rows(self, layer: int) -> list[Hook]:
        heads = {role: n_heads_of(self.model, role) for role in _INPUTS}
        inputs = [Node(role, layer, head) for role in _INPUTS for head in range(heads[role])]
        hooks: list[Hook] = [(hook_name("resid_pre", layer), partial(self._enter, layer, inputs))]
        start = 0
        for role in _INPUTS:
            own = slice(start, start + heads[role])
            hooks.append((hook_name(role, layer), partial(self._gather, own, len(inputs))))
            start += heads[role]
        hooks.append((hook_name("z", layer), partial(self._heads, layer)))
        if self.splits:  # rows that the stream has and attention does not have any more
            rows = self.n * len(inputs)

            def widen(x: Tensor) -> Tensor:
                return torch.cat([x, x.new_zeros(rows, *x.shape[1:])])

            hooks.append((hook_name("attn_out", layer), widen))
        return hooks

    def _write(
        self, written: Float[Tensor, "row writer pos d_model"], at: slice | list[int] = _ALL
    ) -> None:
        """What the next writers write; nothing but at these positions is read later."""
        now = slice(self.written, self.written + written.shape[1])
        change = written.to(self.changes).unflatten(0, self.shape)
        change = change - self.pairs.corrupt[:, None, now][:, :, :, at]
        if at == _ALL:
            self.changes[:, :, now] = change
        else:
            self.changes[:, :, now, at] = change
        self.written = now.stop

    def _inputs(
        self, found: Sequence[Node], name: str, at: slice | list[int] = _ALL
    ) -> Float[Tensor, "row reader pos d_model"]:
        """The stream that readers of one place see."""
        columns = [self.columns[reader] for reader in found]
        moved = einsum(
            "row writer reader, row writer pos d -> row reader pos d",
            self.masks[:, : self.written, columns],
            self.changes.flatten(0, 1)[:, : self.written][:, :, at],
        )
        each = moved.unflatten(0, self.shape)
        each += self.pairs.streams[name][:, at].to(moved)[:, None, None]
        return moved

    # -- hook functions, bound to their place --------------------------------------------------------

    def _repeat(self, x: Tensor) -> Tensor:
        return repeat(x[:1], "1 pos d -> row pos d", row=self.n)

    def _head_inputs(self, layer: int, heads: Sequence[Node], x: Tensor) -> Tensor:
        inputs = self._inputs(heads, hook_name("resid_pre", layer))
        return rearrange(inputs, "row head pos d -> row pos head d").to(x)

    def _enter(self, layer: int, inputs: Sequence[Node], x: Tensor) -> Tensor:
        name = hook_name("resid_pre", layer)
        rows = rearrange(self._inputs(inputs, name), "row reader ... -> (row reader) ...")
        mlp = self.mlps.get(layer)
        if mlp is not None and mlp.beside:  # nothing else reads the main rows
            main = self._inputs([mlp], name)[:, 0]
        else:
            main = self.pairs.streams[name].repeat_interleave(self.shape[1], 0)
        return torch.cat([main.to(x), rows.to(x)])

    def _gather(self, own: slice, n_inputs: int, x: Tensor) -> Tensor:
        each = x[self.n :].unflatten(0, (self.n, n_inputs))[:, own]
        # Of every reader's row, the reader's own head.
        heads = rearrange(each.diagonal(dim1=1, dim2=3), "row pos d head -> row pos head d")
        return heads.contiguous() if self.splits else torch.cat([heads, x[self.n :]])

    def _heads(self, layer: int, x: Tensor) -> None:
        weight = w_o(self.model, layer).detach().to(x.device, self.wide)
        spec = "row pos head d_head, head d_head d_model -> row head pos d_model"
        self._write(einsum(spec, x[: self.n].to(self.wide), weight))

    def _enter_mlp(self, mlp: Node, at: slice | list[int], x: Tensor) -> Tensor:
        main = self._inputs([mlp], hook_name("resid_mid", mlp.layer), at)[:, 0].to(x)
        return main if self.splits else torch.cat([main, x[self.n :]])

    def _mlp(self, at: slice | list[int], x: Tensor) -> None:
        self._write(x[: self.n, None].to(self.wide), at)

    def _leave(self, n_layers: int, at: slice | list[int], x: Tensor) -> Tensor:
        name = hook_name("resid_post", n_layers - 1)
        return self._inputs([Node("logits", n_layers)], name, at)[:, 0].to(x)


_INPUTS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")

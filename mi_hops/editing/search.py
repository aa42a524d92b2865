"""Many CREME edits searched for by gradient: the W_O of several layers changed together.

The least squares of `mi_hops.editing.joint` copy the second-hop prompt's stream, all of its dimensions,
at every key; a model has room for few such copies. What has to agree is less: what is said next. So
the changes Δ of all layers are searched for at once, by gradient, such that each two-hop prompt goes on as
its second-hop prompt does in the model as it is, and prompts to be kept as they do::

    min   mean over edits of max(0, KL(p[. | second hop] || p_Δ[. | two hop]) - enough)
        + hold  mean over kept prompts of KL(p[. | kept] || p_Δ[. | kept])
        + decay sum over layers of tr(Δ^T C Δ) / tr(W^T C W)

with W the weight before. The last term is the share of a layer's output over the text of C that its
change moves. The search is in coordinates B where ``Δ = F B`` and ``F F^T = C^-1``: there the term is
``|B|^2``, and steps are alike in all directions that text uses much or little. With the null space of
C, F is a basis of it, and no step leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mi_hops.editing.change import Change, matrix_hooks, merge
from mi_hops.editing.checks import Editable, check_editable
from mi_hops.editing.edit import Edit
from mi_hops.editing.moments import Moments
from mi_hops.editing.request import (
    Asked,
    Keep,
    Request,
    check_bridge_known,
    check_together,
    requests_of,
)
from mi_hops.editing.teaching import chunks, frozen, teacher_forced
from mi_hops.model import Hook, HookedModel, capture, device_of, hook_name, read_matrix
from mi_hops.model.hooks import storing
from mi_hops.model.numeric import kl_divergence, widen
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import encode, pad


@dataclass(frozen=True, kw_only=True)
class JointSearch:
    """Settings of the search.

    Attributes:
        form: of the prompts edited (facts only); default the first a fact has of both hops.
        steps, lr: of Adam, on B in units of a layer's output over text; lr falls to 0 linearly. A
            step moves all coordinates alike, so by default lr is 0.05 for up to three layers of width
            128 (the bundled models'), and less in proportion where layers are more or wider.
        decay, hold, enough: as in the module's formula.
        rows: two-hop prompts, and kept ones, drawn for a step; more than there are: all of them.
        own_hops: keep the facts' own single-hop prompts of the form edited as well.
        seed: of the draws.
    """

    form: str | None = None
    steps: int = 80
    lr: float | None = None
    decay: float = 1.0
    hold: float = 3.0
    enough: float = 0.3
    rows: int = 128
    own_hops: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or self.rows < 1
            or (self.lr is not None and self.lr <= 0)
            or min(self.decay, self.hold, self.enough) < 0
        ):
            raise ValueError(
                f"steps {self.steps}, rows {self.rows}, lr {self.lr}, decay {self.decay}, hold "
                f"{self.hold}, enough {self.enough}; expected steps and rows of at least 1, lr above 0, the others not below"
            )

    def step_size(self, n_layers: int, width: int) -> float:
        """Of the first step: `lr`, or the default for so many layers of a width."""
        return 0.05 * min(1, 3 * 128 / (n_layers * width)) if self.lr is None else self.lr


def creme_search(
    model: HookedModel,
    asked: Iterable[Asked],
    covariance: Moments,
    *,
    layers: int | Sequence[int] | None = None,
    kept: Sequence[str] = (),
    progress: bool = False,
    **search: object,
) -> Edit:
    """One edit for many facts, optimising W_O at all layers jointly; the model is left unchanged.

    Args:
        asked: facts, or requests; the answer, where there is one, is covered as a whole.
        covariance: second moments of z over text at the layers edited.
        layers: blocks to edit; default the last half.
        kept: prompts that are to go on as before: as many and as varied as there are, of facts that
            are not scored.
        progress: show a progress bar over steps.
        search: of `JointSearch`.

    Returns:
        An `Edit` with one change per layer, dense unless a null space is narrow.

    Raises:
        ValueError: no facts, settings out of range, a loss that is not finite, or as
            `creme.creme_many`.

    Examples:
        >>> import mi_hops
        >>> from mi_hops.editing import creme_search
        >>> model, world = mi_hops.load_model("hops-gpt2"), mi_hops.Hopland()
        >>> facts = world.sample(train=40, held_out=4)
        >>> trained = [f for f in facts if f.split == "train"]
        >>> c = mi_hops.second_moments(model, trained)
        >>> edit = creme_search(model, facts[-4:], c, kept=[f.prompt() for f in trained], steps=3)
        >>> edit.layers
        (3, 4, 5)
    """
    how = JointSearch(**search)  # type: ignore[arg-type]
    keep: Keep = "hops" if how.own_hops else None
    requests = requests_of(asked, how.form, keep, taught=True)
    if not requests:
        raise ValueError("no facts to edit")
    check_together(requests)
    n = int(model.cfg.n_layers)
    chosen = range(n // 2, n) if layers is None else layers
    editable = check_editable(model, chosen, "W_O", covariance)
    for request in requests:
        check_bridge_known(model, request)
    texts = list(dict.fromkeys([*(p for r in requests for p in r.keep), *kept]))
    join = hook_name("resid_pre", min(editable.layers))
    rows = _rows_of(model, requests, join), _kept_rows(model, texts, join) if texts else None
    with frozen(model):
        changes = _search(model, editable, covariance, how, rows, progress)
    asked_for = {"joint": [request.to_dict() for request in requests]}
    record = {
        "layers": list(editable.layers),
        "kept": len(kept),
        "covariance": covariance.to_dict(),
        **asdict(how),
        "lr": how.step_size(len(editable.layers), int(model.cfg.d_model)),
    }
    return editable.edit("creme-search", asked_for, changes, record)


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Rows of tokens, the positions scored in each, and what is to be said there.

    Attributes:
        weights: one over the positions scored in a row, 0 at repeats.
        wanted: log-probabilities.
        join: hook of the stream that enters the first block edited.
        entering: that stream, which no change moves.
    """

    tokens: Int[Tensor, "row pos"]
    scored: Int[Tensor, "row scored"]
    weights: Float[Tensor, "row scored"]
    wanted: Float[Tensor, "row scored vocab"]
    join: str
    entering: Float[Tensor, "row pos d_model"]

    def apart(
        self, model: HookedModel, hooks: Sequence[Hook], drawn: Int[Tensor, "drawn"]
    ) -> Float[Tensor, "drawn"]:
        """KL(wanted || said) of the rows drawn, in nats a position."""
        # One row goes through the blocks below; the rows drawn take its place behind them.
        joins: Hook = self.join, lambda x: self.entering[drawn.to(x.device)].to(x)
        tokens, scored = self.tokens[:1], self.scored[drawn]
        logits = logits_at(model, tokens, scored, hooks=[joins, *hooks], grows=True)
        said = widen(logits).log_softmax(-1)
        apart = kl_divergence(self.wanted[drawn].to(said), said)
        return (apart * self.weights[drawn].to(said)).sum(1)


def _rows_of(model: HookedModel, requests: Sequence[Request], join: str) -> _Rows:
    """Two-hop prompts, answers appended, to go on as the second-hop prompts do."""
    answers = [r.target for r in requests]
    two = teacher_forced(model, [r.two_hop_prompt for r in requests], answers)
    second = teacher_forced(model, [r.second_hop_prompt for r in requests], answers)
    # An answer has the same tokens behind both prompts, or the positions would not correspond.
    if not torch.equal(two.answers, second.answers):
        raise ValueError("an answer is split into other tokens behind its two prompts")
    wanted, _ = _said(model, second.tokens, second.scored, join)
    with torch.no_grad():
        entering = [
            capture(model, two.tokens[rows], [join])[0][join]
            for rows in map(list, chunks(len(two.tokens), 128))
        ]
    return _Rows(two.tokens, two.scored, two.weights, wanted, join, torch.cat(entering))


def _kept_rows(model: HookedModel, texts: Sequence[str], join: str) -> _Rows:
    """Prompts that are to go on as they do."""
    batch = pad([encode(model, text).ids for text in texts])
    scored = batch.last[:, None]
    wanted, entering = _said(model, batch.tokens, scored, join)
    return _Rows(batch.tokens, scored, torch.ones(scored.shape), wanted, join, entering)


def _said(
    model: HookedModel, tokens: Int[Tensor, "row pos"], scored: Int[Tensor, "row scored"], join: str
) -> tuple[Float[Tensor, "row scored vocab"], Float[Tensor, "row pos d_model"]]:
    """Log-probabilities at the positions scored and the stream at `join`, of the model as it is."""
    said, entering = [], []
    with torch.no_grad():
        for rows in map(list, chunks(len(tokens), 128)):
            seen: dict[str, Tensor] = {}
            hooks = storing(seen, [join], torch.clone)
            logits = logits_at(model, tokens[rows], scored[rows], hooks=hooks)
            said.append(widen(logits).log_softmax(-1))
            entering.append(seen[join])
    return torch.cat(said), torch.cat(entering)


# -- the search -----------------------------------------------------------------------------------


def _search(
    model: HookedModel,
    editable: Editable,
    covariance: Moments,
    how: JointSearch,
    rows: tuple[_Rows, _Rows | None],
    progress: bool,
) -> list[Change]:
    """The changes of all layers."""
    taught, kept = rows
    factors: list[Tensor] = []
    for layer in editable.layers:
        factor = covariance.factor(layer)
        unit = _unit(model, covariance, layer, factor.shape[1])
        factors.append((factor * unit).to(device_of(model), editable.dtype))
    width = int(model.cfg.d_model)
    lr = how.step_size(len(editable.layers), width)
    found = [f.new_zeros(f.shape[1], width).requires_grad_() for f in factors]

    def adding(factor: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def act(z: Tensor, out: Tensor) -> Tensor:
            read = z.to(factor.dtype) @ factor.to(z.device)
            return (out + (read @ b.to(z.device)).to(out.device)).to(out.dtype)

        return act

    hooks = [
        hook
        for layer, factor, b in zip(editable.layers, factors, found, strict=True)
        for hook in matrix_hooks("W_O", layer, adding(factor, b))
    ]
    adam = torch.optim.Adam(found, lr=lr)
    draws = torch.Generator().manual_seed(how.seed)

    def drawn(part: _Rows) -> Tensor:
        return torch.randperm(len(part.tokens), generator=draws)[: how.rows]

    with torch.enable_grad():
        for step in progress_bar(range(how.steps), label="CREME search", show=progress):
            adam.param_groups[0]["lr"] = lr * (1 - step / how.steps)
            adam.zero_grad(set_to_none=True)
            loss = (taught.apart(model, hooks, drawn(taught)) - how.enough).clamp_min(0).mean()
            if kept is not None and how.hold:
                loss = loss + how.hold * kept.apart(model, hooks, drawn(kept)).mean()
            moved = torch.stack([b.square().mean() for b in found]).sum()
            loss = loss + how.decay * moved.to(loss.device)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step}; lower lr ({lr})")
            loss.backward()
            adam.step()
    return [
        merge([editable.change(layer, factor.T, b.detach())])
        for layer, factor, b in zip(editable.layers, factors, found, strict=True)
    ]


def _unit(model: HookedModel, covariance: Moments, layer: int, rank: int) -> float:
    """What the coordinates are multiplied by, so that the mean of B^2 is the share moved.

    In a null space, which the text hardly uses, it is the share that inputs of the same size would move
    if they lay there.
    """
    weight = read_matrix(model, "W_O", layer).double().cpu()
    c = covariance.shrunk(layer)
    output = einsum("d_in d_out, d_in other, other d_out ->", weight, c, weight)
    size = 1.0 if covariance.null_space is None else c.diagonal().mean()
    return float((output / size / rank / weight.shape[1]).sqrt())

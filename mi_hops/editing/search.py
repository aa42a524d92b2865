"""Many CREME edits searched for by gradient: the W_O of several layers changed together.

The least squares of `mi_hops.editing.joint` copy the second-hop prompt's stream, all of its dimensions,
at every key; a model has room for few such copies. What has to agree is less: what is said next. So
the changes Δ of all layers are searched for at once, by gradient, such that each two-hop prompt goes on as
its second-hop prompt does in the model as it is, only surer of the answer, and prompts to be kept as
they do::

    min   mean over edits of max(0, KL(q || p_Δ[. | two hop]) - enough)
        + hold  mean over kept prompts of KL(p[. | kept] || p_Δ[. | kept])
        + decay sum over layers of tr(Δ^T C Δ) / tr(W^T C W)

    q  =  (1 - answer_weight) p[. | second hop]  +  answer_weight [answer]

with W the weight before. A model that knows the second hop may still put another token first ("the"
before "United States"); `answer_weight` is what the answer's own token has besides. The last term is
the share of a layer's output over the text of C that its change moves. The search is in coordinates B
where ``Δ = F B`` and ``F F^T = C^-1``: there the term is ``|B|^2``, and directions that text uses much
or little count alike. With the null space of C, F is a basis of it, and no step leaves it.

Steps are Adam's, but with one second moment for each matrix. The gradient of a few hundred prompts has a
low rank. Adam's own step, element by element, makes a full one of it, most of which no prompt asked for
and every other one feels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    require_second_hop,
)
from mi_hops.editing.teaching import chunks, frozen, teacher_forced
from mi_hops.facts.hops import several_texts
from mi_hops.model import Hook, HookedModel, capture, device_of, hook_name, read_matrix
from mi_hops.model.layout import pretransposed_weights
from mi_hops.model.numeric import kl_divergence, widen
from mi_hops.model.plain import Added, plain_passes
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.scoring import logits_at
from mi_hops.text.tokens import encode, pad


@dataclass(frozen=True, kw_only=True)
class JointSearch:
    """Settings of the search.

    Attributes:
        form: of the prompts edited (facts only); default the first a fact has of both hops.
        steps, lr: of the descent; lr is the first step's root mean square in B, and falls to 0
            linearly. By default it is 0.05 for up to three layers of width 128 (the bundled models'),
            and less in proportion where layers are more or wider.
        answer_weight, decay, hold, enough: as in the module's formula.
        rows: two-hop prompts, and kept ones, drawn for a step; more than there are: all of them.
        own_hops: keep the facts' own single-hop prompts of the form edited as well.
        seed: of the draws.
    """

    form: str | None = None
    steps: int = 80
    lr: float | None = None
    answer_weight: float = 0.5
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
            or not 0 <= self.answer_weight < 1
        ):
            raise ValueError(
                f"steps {self.steps}, rows {self.rows}, lr {self.lr}, answer_weight {self.answer_weight}, "
                f"decay {self.decay}, hold {self.hold}, enough {self.enough}; expected steps and rows of "
                "at least 1, lr above 0, answer_weight from 0 to below 1, the others not below 0"
            )

    def step_size(self, n_layers: int, width: int) -> float:
        """Of the first step: `lr`, or the default for so many layers of a width."""
        return 0.05 * min(1, 3 * 128 / (n_layers * width)) if self.lr is None else self.lr


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def creme_search(
    model: HookedModel,
    asked: Iterable[Asked],
    covariance: Moments,
    *,
    layers: int | Sequence[int] | None = None,
    kept: Iterable[str] = (),
    progress: bool = False,
    **search: object,
) -> Edit:
    """One edit for many facts, optimising W_O at all layers jointly; the model is left unchanged.

    Args:
        asked: facts, or requests with an answer, all of whose tokens are taught.
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
    kept = several_texts(kept, "kept")
    keep: Keep = "hops" if how.own_hops else None
    requests = requests_of(asked, how.form, keep, taught=True)
    if not requests:
        raise ValueError("no facts to edit")
    check_together(requests)
    n = int(model.cfg.n_layers)
    chosen = range(n // 2, n) if layers is None else layers
    editable = check_editable(model, chosen, "W_O", covariance)
    for request in requests:
        require_second_hop(request)
        check_bridge_known(model, request)
    texts = list(dict.fromkeys([*(p for r in requests for p in r.keep), *kept]))
    with frozen(model), pretransposed_weights(model):
        passes = _Passes(model, min(editable.layers))
        taught = _taught_rows(passes, model, requests, how.answer_weight)
        held = _kept_rows(passes, model, texts) if texts and how.hold else None
        changes = _search(model, editable, covariance, how, passes, taught, held, progress)
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


class _Passes:
    """Passes in two parts: up to the first block edited, and from there on, under changes of W_O."""

    def __init__(self, model: HookedModel, layer: int) -> None:
        self._model, self._layer = model, layer
        self._join = hook_name("resid_pre", layer)
        self._plain = plain_passes(model)

    def entering(
        self, tokens: Int[Tensor, "row pos"], scored: Int[Tensor, "row scored"]
    ) -> Float[Tensor, "row pos d_model"]:
        """The stream that enters the first block edited, which no change moves."""
        found = []
        with torch.no_grad():
            for rows in map(list, chunks(len(tokens), 128)):
                if self._plain is not None:
                    last = scored[rows].max(1).values
                    found.append(self._plain.entering(tokens[rows], last, self._layer))
                else:
                    found.append(capture(self._model, tokens[rows], [self._join])[0][self._join])
        return torch.cat(found)

    def said(
        self,
        entering: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "row pos"],
        scored: Int[Tensor, "row scored"],
        deltas: Added,
    ) -> Float[Tensor, "row scored vocab"]:
        """Log-probabilities at the positions scored."""
        if self._plain is not None:
            logits = self._plain.behind(entering, tokens, scored, self._layer, deltas)
        else:
            # One row goes through the blocks below; the rows wanted take its place behind them.
            joins: Hook = self._join, lambda x: entering.to(x)
            changed = [h for at, delta in deltas.items() for h in _hooks(at, delta)]
            hooks = [joins, *changed]
            logits = logits_at(self._model, tokens[:1], scored, hooks=hooks, grows=True)
        return widen(logits).log_softmax(-1)

    def as_it_is(
        self,
        entering: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "row pos"],
        scored: Int[Tensor, "row scored"],
    ) -> Float[Tensor, "row scored vocab"]:
        """Log-probabilities at the positions scored, with no change."""
        with torch.no_grad():
            parts = map(list, chunks(len(tokens), 128))
            return torch.cat([self.said(entering[p], tokens[p], scored[p], {}) for p in parts])


def _hooks(layer: int, delta: Float[Tensor, "d_in d_model"]) -> list[Hook]:
    """A change of W_O as hooks."""

    def act(z: Tensor, out: Tensor) -> Tensor:
        return (out + (z.to(delta) @ delta).to(out.device)).to(out.dtype)

    return matrix_hooks("W_O", layer, act)


@dataclass(frozen=True)
class _Rows:
    """Rows of tokens, the positions scored in each, and what is to be said there.

    Attributes:
        weights: one over the positions scored in a row, 0 at repeats.
        entering: the stream that enters the first block edited.
        wanted: log-probabilities.
    """

    tokens: Int[Tensor, "row pos"]
    scored: Int[Tensor, "row scored"]
    weights: Float[Tensor, "row scored"]
    entering: Float[Tensor, "row pos d_model"]
    wanted: Float[Tensor, "row scored vocab"]

    def apart(
        self, passes: _Passes, deltas: Added, drawn: Int[Tensor, "drawn"]
    ) -> Float[Tensor, "drawn"]:
        """KL(wanted || said) of the rows drawn, in nats a position."""
        entering = self.entering[drawn.to(self.entering.device)]
        said = passes.said(entering, self.tokens[drawn], self.scored[drawn], deltas)
        apart = kl_divergence(self.wanted[drawn.to(self.wanted.device)].to(said), said)
        return (apart * self.weights[drawn].to(said)).sum(1)


def _taught_rows(
    passes: _Passes, model: HookedModel, requests: Sequence[Request], weight: float
) -> _Rows:
    """Two-hop prompts, answers appended, to go on as the second-hop prompts do and with the answer."""
    answers = [r.target for r in requests]
    two = teacher_forced(model, [r.two_hop_prompt for r in requests], answers)
    second = teacher_forced(model, [r.second_hop_prompt for r in requests], answers)
    # An answer has the same tokens behind both prompts, or the positions would not correspond.
    if not torch.equal(two.answers, second.answers):
        raise ValueError("an answer is split into other tokens behind its two prompts")
    known = second.tokens, second.scored
    wanted = passes.as_it_is(passes.entering(*known), *known) + math.log1p(-weight)
    if weight:
        at = two.answers.to(wanted.device)[..., None]
        share = torch.full_like(wanted[..., :1], math.log(weight))
        wanted.scatter_(2, at, torch.logaddexp(wanted.gather(2, at), share))
    entering = passes.entering(two.tokens, two.scored)
    return _Rows(two.tokens, two.scored, two.weights, entering, wanted)


def _kept_rows(passes: _Passes, model: HookedModel, texts: Sequence[str]) -> _Rows:
    """Prompts that are to go on as they do."""
    batch = pad([encode(model, text).ids for text in texts])
    scored = batch.last[:, None]
    entering = passes.entering(batch.tokens, scored)
    said = passes.as_it_is(entering, batch.tokens, scored)
    return _Rows(batch.tokens, scored, torch.ones(scored.shape), entering, said)


# -- the search -----------------------------------------------------------------------------------


def _search(
    model: HookedModel,
    editable: Editable,
    covariance: Moments,
    how: JointSearch,
    passes: _Passes,
    taught: _Rows,
    held: _Rows | None,
    progress: bool,
) -> list[Change]:
    """The changes of all layers."""
    factors: dict[int, Tensor] = {}
    for layer in editable.layers:
        factor = covariance.factor(layer)
        unit = _unit(model, covariance, layer, factor.shape[1])
        factors[layer] = (factor * unit).to(device_of(model), editable.dtype)
    width = int(model.cfg.d_model)
    lr = how.step_size(len(factors), width)
    found = {at: f.new_zeros(f.shape[1], width).requires_grad_() for at, f in factors.items()}
    descent = _Descent(list(found.values()))
    draws = torch.Generator().manual_seed(how.seed)

    def drawn(part: _Rows) -> Tensor:
        return torch.randperm(len(part.tokens), generator=draws)[: how.rows]

    with torch.enable_grad():
        for step in progress_bar(range(how.steps), label="CREME search", show=progress):
            deltas = {at: factors[at] @ b for at, b in found.items()}
            loss = (taught.apart(passes, deltas, drawn(taught)) - how.enough).clamp_min(0).mean()
            if held is not None:
                loss = loss + how.hold * held.apart(passes, deltas, drawn(held)).mean()
            moved = torch.stack([b.square().mean() for b in found.values()]).sum()
            loss = loss + how.decay * moved.to(loss.device)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {step}; lower lr ({lr})")
            gradients = torch.autograd.grad(loss, list(found.values()))
            descent.step(gradients, lr * (1 - step / how.steps))
    return [merge([editable.change(at, factors[at].T, b.detach())]) for at, b in found.items()]


class _Descent:
    """Adam with one second moment for each matrix, the mean over its elements."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = matrices
        self._first = [torch.zeros_like(m) for m in matrices]
        self._second = [0.0 for _ in matrices]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step down the gradients."""
        self._steps += 1
        for i, (matrix, grad, mean) in enumerate(
            zip(self._matrices, gradients, self._first, strict=True)
        ):
            mean.mul_(0.9).add_(grad, alpha=0.1)
            self._second[i] = 0.999 * self._second[i] + 0.001 * float(grad.square().mean())
            size = (self._second[i] / (1 - 0.999**self._steps)) ** 0.5
            matrix.sub_(mean, alpha=lr / (1 - 0.9**self._steps) / max(size, 1e-30))


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

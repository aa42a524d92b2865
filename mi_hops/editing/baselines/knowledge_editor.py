"""KnowledgeEditor: a network that looks at a fact and its gradient and gives the edit.

A small network is trained once, on facts that may be known, and then edits in one step (arXiv
2104.08164). A bidirectional LSTM reads the prompt and the answer wanted; from its end states, for
each edited matrix, linear maps give α, β (as long as the input), γ, δ (the output) and a gate η::

    ΔW = s σ(η) (softmax(α) γ^T ⊙ ∇ + softmax(β) δ^T)

with ∇ the gradient of the answer's loss with respect to W, here divided by its norm, so that s, the
largest gate, is in the units of the matrix. The gradient of one prompt is a sum over its tokens of
outer products, so ΔW has rank tokens + 1 and is kept as such.

Training asks that other wordings of the edited question get the new answer, subject to
``KL(before || after) <= m`` on unrelated prompts (or, as the paper compares it with, that the edit's norm is
at most m of the matrices'); the multiplier of that constraint is raised while it is broken and
lowered while it is met.

In a loop, the paper's other variant, the network edits the edited model again, until the answer is right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import torch
from fancy_einsum import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_hops.editing.change import Change, matrix_hooks
from mi_hops.editing.checks import check_editable
from mi_hops.editing.edit import Edit, check_weights
from mi_hops.editing.files import load_tensors, save_tensors
from mi_hops.editing.request import Asked, Request, requests_of
from mi_hops.editing.rows import EditorRepair
from mi_hops.editing.teaching import (
    TeacherForcedBatch,
    answer_loss,
    answered_correctly,
    chunks,
    frozen,
    last_logp,
    teacher_forced,
)
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import Hook, HookedModel, embedding, read_matrix
from mi_hops.model.numeric import kl_divergence
from mi_hops.result.progress import progress_bar
from mi_hops.text.tokens import answer_ids, encode

#: Left ``[row, rank, d_in]`` and right ``[row, rank, d_out]`` factors of every row's change.
Factors = tuple[Tensor, Tensor]

Constraint = Literal["kl", "norm"]

_KEY = "mi_hops_knowledge_editor"


@dataclass(frozen=True, kw_only=True)
class EditorTraining:
    """How the hypernetwork is built and trained.

    Attributes:
        layers, matrix: what it edits; one layer or several.
        width: of the LSTM, each way.
        steps, batch_size, lr: of Adam.
        margin: m above, in nats, or in units of the norm of all edited matrices.
        scale: s above, in units of the matrix's norm.
        seed: of the network's weights and of the facts drawn.
        constraint: what the margin bounds: the ``"kl"`` of unrelated prompts, or the edit's ``"norm"``.
    """

    layers: tuple[int, ...]
    matrix: str = "W_out"
    width: int = 64
    steps: int = 400
    batch_size: int = 16
    lr: float = 1e-3
    margin: float = 0.01
    scale: float = 0.5
    seed: int = 0
    constraint: Constraint = "kl"

    def __post_init__(self) -> None:
        given: Any = self.layers
        given = [given] if isinstance(given, Integral) else given
        object.__setattr__(self, "layers", tuple(int(layer) for layer in given))
        if self.constraint not in ("kl", "norm"):
            raise ValueError(f"constraint is {self.constraint!r}; expected 'kl' or 'norm'")
        numbers = (self.width, self.steps, self.batch_size, self.lr, self.margin, self.scale)
        if min(numbers) <= 0:
            raise ValueError(f"{self}: all numbers but the seed must be above 0")


class _Network(nn.Module):
    """From embedded prompts and answers to the factors' parts, one set per matrix."""

    def __init__(self, d_model: int, shapes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_model + 1, width, bidirectional=True, batch_first=True)
        self.hidden = nn.Linear(2 * width, 2 * width)
        self.heads = nn.ModuleList()
        for d_in, d_out in shapes:
            sizes = {"alpha": d_in, "beta": d_in, "gamma": d_out, "delta": d_out, "eta": 1}
            self.heads.append(nn.ModuleDict({k: nn.Linear(2 * width, n) for k, n in sizes.items()}))

    def forward(self, embedded: Tensor, lengths: Tensor) -> list[dict[str, Tensor]]:
        """``embedded`` [row, pos, d_model + 1], right-padded -> parts [row, ...] per matrix."""
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (ends, _) = self.lstm(packed)
        h = torch.tanh(self.hidden(torch.cat([ends[0], ends[1]], dim=-1)))
        heads = [cast("nn.ModuleDict", head) for head in self.heads]
        return [{name: layer(h) for name, layer in head.items()} for head in heads]


class KnowledgeEditor:
    """A trained editor of one model's weights.

    Attributes:
        how: its `EditorTraining`.
        fingerprint: of the weights it was trained on.
        log: one record every few steps of training.
    """

    def __init__(self, model: HookedModel, how: EditorTraining) -> None:
        self._editable = check_editable(model, how.layers, how.matrix)
        if self._editable.processing != "none":
            raise ValueError(
                "an editor is trained on the weights of a checkpoint; load the model with "
                "processing='none'"
            )
        self.fingerprint = self._editable.fingerprint
        self.how, self.log = how, list[dict[str, float]]()
        weights = [read_matrix(model, how.matrix, layer) for layer in self._editable.layers]
        self._norms = [float(w.float().norm()) for w in weights]
        with torch.random.fork_rng():
            torch.manual_seed(how.seed)
            shapes = [(w.shape[0], w.shape[1]) for w in weights]
            self.network = _Network(int(model.cfg.d_model), shapes, int(how.width))
        self.network.to(weights[0].device)

    # -- use -------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # gradients are taken, whatever the caller is in
    def edits(
        self, model: HookedModel, asked: Iterable[Asked], *, form: str | None = None, loop: int = 1
    ) -> list[Edit]:
        """One edit per fact; the model is left unchanged.

        Args:
            loop: edits made on top of one another at most, until the prompt taught is answered
                correctly; the first is always made.

        Raises:
            WrongWeightsError: a model it was not trained on.
            ValueError: requests without target, or a loop below 1.
        """
        if loop < 1:
            raise ValueError(f"loop is {loop}; expected at least 1")
        check_weights(model, self.fingerprint, "the editor was")
        requests = requests_of(asked, form, taught=True)
        layers = self._editable.layers
        settings = {**asdict(self.how), "layers": list(layers), "loop": loop}
        edits = []
        for part in chunks(len(requests), self.how.batch_size):
            some = [requests[i] for i in part]
            with frozen(model):
                rounds = self._rounds(model, some, loop)
            for row, request in enumerate(some):
                changes = []
                for i, layer in enumerate(layers):
                    made = [factors[i] for factors, acting in rounds if acting[row]]
                    left, right = (torch.cat([pair[k][row] for pair in made]) for k in (0, 1))
                    changes.append(Change(self.how.matrix, layer, left, right))
                edits.append(
                    self._editable.edit("knowledge-editor", request.to_dict(), changes, settings)
                )
        return edits

    def _rounds(
        self, model: HookedModel, requests: Sequence[Request], loop: int
    ) -> list[tuple[list[Factors], list[bool]]]:
        """For each round its factors, zero in rows that were right before it, and which rows it acts on."""
        prompts, answers = zip(*((r.two_hop_prompt, r.target) for r in requests), strict=True)
        batch = teacher_forced(model, prompts, answers)
        rounds: list[tuple[list[Factors], list[bool]]] = []
        for _ in range(loop):
            under = [hook for factors, _ in rounds for hook in self.hooks(factors)]
            acting = [True] * len(requests)
            if rounds:
                acting = [not right for right in answered_correctly(model, batch, under)]
                if not any(acting):
                    break
            found = []
            for left, right in self.factors(model, prompts, answers, under=under):
                on = torch.tensor(acting, device=right.device)[:, None, None]
                found.append((left.detach(), right.detach() * on))
            rounds.append((found, acting))
        return rounds

    def factors(
        self,
        model: HookedModel,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        train: bool = False,
        under: Sequence[Hook] = (),
    ) -> list[Factors]:
        """For each edited matrix, left and right factors of every row's change.

        Args:
            train: keep the graph through the network.
            under: hooks under which the gradient is taken: of changes made before.
        """
        batch = teacher_forced(model, prompts, answers)
        gradients = unit_gradients(model, batch, self.how.matrix, self._editable.layers, under)
        with torch.set_grad_enabled(train):
            out = []
            for (x, g), norm, part in zip(
                gradients, self._norms, self.parts(model, prompts, answers), strict=True
            ):
                part = {name: value.to(x.device) for name, value in part.items()}
                gate = self.how.scale * norm * part["eta"].sigmoid()[:, None]
                left = torch.cat(
                    [x * part["alpha"].softmax(-1)[:, None], part["beta"].softmax(-1)[:, None]], 1
                )
                right = torch.cat([g * part["gamma"][:, None], part["delta"][:, None]], 1)
                out.append((left, gate * right))
        return out

    def parts(
        self, model: HookedModel, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """The network's outputs for prompts and answers: α, β, γ, δ and η ``[row, ...]`` per matrix."""
        embedded, lengths = _embedded(model, prompts, answers)
        return self.network(embedded.to(next(self.network.parameters()).device), lengths)

    def norm(self, factors: Sequence[Factors]) -> Float[Tensor, "row"]:
        """Norm of every row's change, all matrices together, in units of their own norm."""
        squares = [_square_norm(left, right) for left, right in factors]
        total = sum(square.to(squares[0]) for square in squares)
        own = sum(norm * norm for norm in self._norms)
        return (cast("Tensor", total) / own).sqrt()

    def hooks(self, factors: Sequence[Factors]) -> list[Hook]:
        """Each row under its own factors; gradients flow to them."""

        def adding(left: Tensor, right: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda x, out: out + ((x.float() @ left.mT) @ right).to(out.dtype)

        hooks: list[Hook] = []
        for layer, (left, right) in zip(self._editable.layers, factors, strict=True):
            hooks += matrix_hooks(self.how.matrix, layer, adding(left, right))
        return hooks

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one ``.safetensors`` file, whole or not at all.

        Raises:
            ValueError: another suffix.
            FileExistsError: the file exists, and `overwrite` is off.
        """
        head = {
            "fingerprint": self.fingerprint,
            "how": asdict(self.how),
            "log": self.log,
            "norms": self._norms,
        }
        return save_tensors(path, _KEY, head, self.network.state_dict(), overwrite)

    @classmethod
    def load(cls, path: str | Path, model: HookedModel) -> KnowledgeEditor:
        """Read an editor for the model it was trained on.

        Raises:
            FileNotFoundError: no such file.
            WrongWeightsError: another model.
            ValueError: a file that does not hold an editor.
        """
        head, state = load_tensors(path, _KEY, "a knowledge editor")
        check_weights(model, head["fingerprint"], "the editor was")
        editor = cls(model, EditorTraining(**head["how"]))
        editor.network.load_state_dict(state)
        editor.log = head["log"]
        # Edits may lie on the model now; it is of the weights under them that the editor knows.
        editor.fingerprint = head["fingerprint"]
        editor._editable = replace(editor._editable, fingerprint=editor.fingerprint)
        editor._norms = head.get("norms", editor._norms)  # older files have none
        return editor


class KnowledgeEditorRepair(EditorRepair):
    """A trained editor as a repair."""

    def __init__(
        self,
        editor: KnowledgeEditor,
        *,
        form: str | None = None,
        loop: int = 1,
        name: str = "KnowledgeEditor",
    ) -> None:
        super().__init__(editor.edits, name=name, form=form, loop=loop)


# -- training -------------------------------------------------------------------------------------


@torch.inference_mode(False)  # gradients are taken, whatever the caller is in
def train_editor(
    model: HookedModel, facts: Sequence[TwoHopFact], *, progress: bool = False, **settings: Any
) -> KnowledgeEditor:
    """Train an editor for a model; the model is left unchanged.

    Each step draws facts and, for each, a wording, another wording to be answered alike, an answer
    that some other fact with the same second relation has, and an unrelated fact (of whose subject,
    bridge and answer none is the fact's own, nor the answer it is to get) whose prompt is to be left
    alone.

    Args:
        facts: to practise on; none of those that will be edited. Two wordings each at least.
        settings: see `EditorTraining`.

    Raises:
        ValueError: facts among which no other answer or no unrelated fact can be drawn or without
            two wordings, or a loss that is not finite.
    """
    how = EditorTraining(**settings)
    editor = KnowledgeEditor(model, how)
    rng = random.Random(how.seed)
    pool = [f for f in facts if len(f.prompts) > 1]
    answers: dict[str, list[str]] = {}
    for fact in pool:
        answers.setdefault(fact.relation2, []).append(fact.answer)
    pool = [f for f in pool if set(answers[f.relation2]) - {f.answer}]
    if len(pool) < 2:
        raise ValueError(
            f"{len(facts)} facts were given, {len(pool)} of which have two wordings and a relation "
            "with another answer; at least two are needed"
        )
    adam = torch.optim.Adam(editor.network.parameters(), lr=how.lr)
    pressure = 1.0
    with frozen(model):
        steps = range(how.steps)
        for step in progress_bar(steps, label="training the editor", show=progress):
            drawn = [rng.choice(pool) for _ in range(how.batch_size)]
            wordings = [rng.sample(sorted(f.prompts.values()), 2) for f in drawn]
            new = [rng.choice(sorted(set(answers[f.relation2]) - {f.answer})) for f in drawn]
            others = [unrelated(f, a, pool, rng) for f, a in zip(drawn, new, strict=True)]
            kept = [encode(model, rng.choice(sorted(o.prompts.values()))) for o in others]
            with torch.enable_grad():
                factors = editor.factors(model, [w[0] for w in wordings], new, train=True)
                hooks = editor.hooks(factors)
                reworded = teacher_forced(model, [w[1] for w in wordings], new)
                taught = answer_loss(model, reworded, hooks)
                if how.constraint == "kl":
                    with torch.no_grad():
                        before = last_logp(model, kept)
                    moved = kl_divergence(before, last_logp(model, kept, hooks))
                else:
                    moved = editor.norm(factors)
                loss = taught.mean() + pressure * (moved.mean() - how.margin)
                if not torch.isfinite(loss):
                    raise ValueError(f"the editor's loss is {loss.item()} at step {step}; lower lr")
                adam.zero_grad(set_to_none=True)
                loss.backward()
            nn.utils.clip_grad_norm_(editor.network.parameters(), 1.0)
            adam.step()
            broken = moved.mean().item() / how.margin - 1
            pressure = min(max(pressure * (1.05 if broken > 0 else 0.95), 1e-2), 1e3)
            if step % 20 == 0 or step == how.steps - 1:
                editor.log.append(
                    {
                        "step": step,
                        "answer_loss": taught.mean().item(),
                        how.constraint: moved.mean().item(),
                        "pressure": pressure,
                    }
                )
    return editor


def unrelated(
    fact: TwoHopFact, new: str, pool: Sequence[TwoHopFact], rng: random.Random
) -> TwoHopFact:
    """A fact of the pool that shares no entity with `fact` or its new answer."""
    mine = {name.casefold() for name in (fact.subject, fact.bridge, fact.answer, new)}
    for other in rng.sample(pool, len(pool)):
        if not mine & {name.casefold() for name in (other.subject, other.bridge, other.answer)}:
            return other
    raise ValueError(
        f"among {len(pool)} facts none is unrelated to {fact.id!r} with the answer {new!r}; give facts "
        "of more entities"
    )


def unit_gradients(
    model: HookedModel,
    batch: TeacherForcedBatch,
    matrix: str,
    layers: Sequence[int],
    under: Sequence[Hook] = (),
) -> list[tuple[Float[Tensor, "row pos d_in"], Float[Tensor, "row pos d_out"]]]:
    """Factors of each row's gradient ``x^T g`` of the answer's loss, divided by its norm, per layer.

    Args:
        under: further hooks, which act before the gradient's own.
    """
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def leaf(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def act(x: Tensor, out: Tensor) -> Tensor:
            inputs[layer] = x.detach().float()
            outputs[layer] = torch.zeros_like(out, requires_grad=True)
            return out + outputs[layer]

        return act

    hooks = list(under)
    for layer in layers:
        hooks += matrix_hooks(matrix, layer, leaf(layer))
    with torch.enable_grad():
        loss = answer_loss(model, batch, hooks).sum()
        gradients = torch.autograd.grad(loss, [outputs[i] for i in layers])
    found = []
    for layer, gradient in zip(layers, gradients, strict=True):
        x, g = inputs[layer], gradient.float()
        found.append((x, g / _square_norm(x, g).clamp_min(1e-24).sqrt()[:, None, None]))
    return found


def _square_norm(
    left: Float[Tensor, "row pos d_in"], right: Float[Tensor, "row pos d_out"]
) -> Float[Tensor, "row"]:
    """``|left^T right|^2`` of each row, over pairs of positions, without the matrix itself."""
    inner = "row pos d, row other d -> row pos other"
    return (einsum(inner, left, left) * einsum(inner, right, right)).sum((1, 2))


def _embedded(
    model: HookedModel, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Float[Tensor, "row pos d_marked"], Int[Tensor, "row"]]:
    """Embeddings of prompt and answer with a mark on the answer, and lengths."""
    table = embedding(model).float()
    rows = []
    for text, answer in zip(prompts, answers, strict=True):
        prompt = encode(model, text)
        ids = answer_ids(model, prompt, answer)
        x = table[torch.tensor([*prompt.ids, *ids], device=table.device)]
        mark = torch.zeros(len(x), 1, device=table.device)
        mark[len(prompt) :] = 1
        rows.append(torch.cat([x / table.std(), mark], 1))
    lengths = torch.tensor([len(r) for r in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

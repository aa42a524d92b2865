"""Second moments of what a matrix multiplies: the metric in which an edit is small.

A change of W that is to act on a key k and disturb other inputs x as little as possible minimises
``E |Δ^T x|^2 = tr(Δ^T C Δ)`` with ``C = E[x x^T]`` over ordinary text; that is ROME's C, here for z,
the input of W_O, at any number of layers in one streamed pass. The sums are the only thing kept, so
memory does not grow with the text.

A harder rule is AlphaEdit's (arXiv 2410.02355): the change may act on no input that the text uses. With
P the projector onto the eigenvectors of C of small eigenvalues, its change is the least one within
them, ``Δ = P Δ``, which is the same closed form with P in the place of C^-1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from fancy_einsum import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mi_hops.editing.change import input_hook
from mi_hops.editing.files import load_tensors, save_tensors
from mi_hops.editing.solve import SingularError
from mi_hops.facts.fact import TwoHopFact
from mi_hops.model import (
    Hook,
    HookedModel,
    HookFn,
    capture,
    dtype_of,
    fingerprint,
    live_matrix,
    prepends_bos,
    processing_of,
    require_layers,
)
from mi_hops.model.numeric import widen
from mi_hops.result.progress import progress_bar
from mi_hops.sweep.batching import each_made_elsewhere
from mi_hops.sweep.keep import Running
from mi_hops.text.corpus import Corpus, require_file, token_batches
from mi_hops.text.tokens import Batch

Positions = Literal["all", "last"]
Shrinkage = float | Literal["ledoit-wolf"]
_Sums = dict[int, Tensor]
_KEY = "mi_hops_moments"
_ROUNDING = 1e-6  # of activations in float32


@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Second moments of a matrix's input, with their shrinkage.

    Attributes:
        matrix: whose input, ``"W_O"`` (z) or ``"W_out"``.
        second: layer -> mean of ``x x^T`` over the tokens counted, ``[d_in, d_in]``, float64, CPU.
        fourth: layer -> mean of ``|x|^4`` over the same tokens.
        n: tokens counted.
        fingerprint, processing: of the model's weights.
        shrinkage: ``"ledoit-wolf"``, or a share from 0 to 1 of the scaled identity mixed in.
        null_space: None, or the largest eigenvalue of C, in units of their mean, of a direction that
            an edit may act on (see `with_null_space`).
        source: what was counted: positions, tokens per pass, dtype, and the digest of the text.
    """

    matrix: str
    second: Mapping[int, Float[Tensor, "d_in d_in"]]
    fourth: Mapping[int, float]
    n: int
    fingerprint: str
    processing: str = "none"
    shrinkage: Shrinkage = "ledoit-wolf"
    source: Mapping[str, Any] = field(default_factory=dict)
    null_space: float | None = None

    def __post_init__(self) -> None:
        if self.null_space is not None and not 0 <= self.null_space < math.inf:
            raise ValueError(
                f"null_space is {self.null_space}; expected 0 or more, in units of the mean eigenvalue, "
                "or None for the whole of C"
            )
        if self.shrinkage != "ledoit-wolf" and not (
            isinstance(self.shrinkage, int | float) and 0 <= self.shrinkage <= 1
        ):
            raise ValueError(
                f"shrinkage is {self.shrinkage!r}; expected 'ledoit-wolf' or a share from 0 to 1"
            )
        if self.n < 1 or set(self.second) != set(self.fourth):
            raise ValueError(
                f"{self.n} tokens counted, second moments of layers {sorted(self.second)} and fourth "
                f"of {sorted(self.fourth)}; expected some tokens, and both of the same layers"
            )

    def __repr__(self) -> str:
        layers = f"{len(self.second)} layers" if len(self.second) > 12 else f"layers {self.layers}"
        return (
            f"<second moments of the input of {self.matrix}: {layers}, {self.n:,} tokens, "
            f"{self._how} | for {self.fingerprint}>"
        )

    @property
    def _how(self) -> str:
        if self.null_space is None:
            return f"shrinkage {self.shrinkage!r}"
        return f"null space up to {self.null_space:g} of the mean eigenvalue"

    def to_dict(self) -> dict[str, Any]:
        """How they were counted and are used, in plain types, for the record of an edit."""
        null = {} if self.null_space is None else {"null_space": self.null_space}
        return {"n": self.n, "shrinkage": self.shrinkage, **null, **self.source}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with moments, ascending."""
        return tuple(sorted(self.second))

    def with_shrinkage(self, shrinkage: Shrinkage) -> Moments:
        """The same moments with a different shrinkage."""
        return replace(self, shrinkage=shrinkage)

    def with_null_space(self, threshold: float | None) -> Moments:
        """The same moments, restricting edits made with them to the null space of C.

        A direction belongs to it whose eigenvalue of C (not shrunk) is at most `threshold` times the
        mean eigenvalue. An input within the others is mapped as before, whatever the edit; all inputs
        counted are, up to the small share of them that lies in the null space. None ends it.

        An edit meets at most as many independent keys as the null space has dimensions (`rank`), all
        edits of a layer together. The paper's threshold, 0.02, is absolute: divide it by the mean
        of C's diagonal.

        Source: AlphaEdit, arXiv 2410.02355.

        Examples:
            >>> from mi_hops import Hopland, load_model, second_moments
            >>> model = load_model("hops-gpt2")
            >>> c = second_moments(model, Hopland().sample(train=60, held_out=3), layers=[5])
            >>> c.rank(5), c.with_null_space(0.1).rank(5) < 128
            (128, True)
        """
        return replace(self, null_space=threshold)

    def part(self, layer: int, inputs: Sequence[int]) -> Moments:
        """The moments of some of a layer's inputs alone, shrunk as the whole is.

        A null space is then that of the part, in units of the part's mean eigenvalue.

        Raises:
            ValueError: no moments of that layer.
        """
        at = list(inputs)
        c = self.shrunk(layer) if self.null_space is None else self._of(layer)
        fourth = {layer: self.fourth[layer]}
        return replace(self, second={layer: c[at][:, at]}, fourth=fourth, shrinkage=0.0)

    def rank(self, layer: int) -> int:
        """Dimensions of the input that an edit may act on: of the null space, else all."""
        return self.factor(layer).shape[1]

    def factor(self, layer: int, device: torch.device | None = None) -> Float[Tensor, "d_in free"]:
        """F with ``F F^T`` what `solve` multiplies by: C^-1, or the projector onto the null space.

        A change ``F B`` is within the null space, whatever B; without one, ``|B|^2`` is its size in the
        metric of C, ``tr(Δ^T C Δ)``.

        Raises:
            SingularError: C cannot be inverted reliably, or its null space is empty.
            ValueError: no moments of that layer.
        """
        if self.null_space is None:
            lower = self._cholesky(layer, device or torch.device("cpu"))
            eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower, eye, upper=False).T
        at = (layer, f"null {device}")
        if at not in self._factors:
            self._factors[at] = _null_space(self._of(layer), layer, self.null_space).to(device)
        return self._factors[at]

    def share(self, layer: int) -> float:
        """The share s of the scaled identity in `shrunk`.

        ``"ledoit-wolf"`` is the rule of Ledoit and Wolf (2004) for a moment about zero: with
        ``m = tr(C)/d``, ``D^2 = |C - m I|^2`` and ``B^2 = (E|x|^4 - |C|^2) / n``, it is
        ``min(B^2, D^2) / D^2``: the share that minimises the expected squared error if the tokens
        counted were independent.
        """
        c = self._of(layer)
        if self.shrinkage != "ledoit-wolf":
            return float(self.shrinkage)
        d = c.shape[0]
        mean = float(c.diagonal().mean())
        spread = float((c * c).sum()) - d * mean * mean
        error = (self.fourth[layer] - float((c * c).sum())) / self.n
        return 1.0 if spread <= 0 else min(max(error, 0.0), spread) / spread

    def shrunk(self, layer: int) -> Float[Tensor, "d_in d_in"]:
        """``(1 - s) C + s tr(C)/d I``, float64."""
        c, s = self._of(layer), self.share(layer)
        eye = torch.eye(c.shape[0], dtype=c.dtype)
        return (1 - s) * c + s * c.diagonal().mean() * eye

    def _of(self, layer: int) -> Tensor:
        if layer not in self.second:
            raise ValueError(
                f"no moments of layer {layer}, only of {list(self.layers)}; estimate them for all "
                "layers that are edited"
            )
        return self.second[layer]

    @cached_property
    def _factors(self) -> dict[tuple[int, str], Tensor]:
        return {}

    def solve(self, layer: int, keys: Float[Tensor, "key d_in"]) -> Float[Tensor, "key d_in"]:
        """``C^-1 k`` for each key, in float64 on the keys' device; C as `shrunk`.

        With `null_space`, the part of each key in the null space.

        Raises:
            SingularError: C cannot be inverted reliably, or its null space is empty.
            ValueError: no moments of that layer.
        """
        if self.null_space is not None:
            basis = self.factor(layer, keys.device)
            part = (keys.double() @ basis) @ basis.T
            # What rounding leaves of a key that the text uses is no part of it.
            there = part.norm(dim=1, keepdim=True) > _ROUNDING * keys.norm(dim=1, keepdim=True)
            return torch.where(there, part, 0.0)
        lower = self._cholesky(layer, keys.device)
        return torch.cholesky_solve(keys.double().T, lower).T

    def _cholesky(self, layer: int, device: torch.device) -> Tensor:
        at = (layer, str(device))
        if at not in self._factors:
            self._factors[at] = _cholesky(self.shrunk(layer), layer).to(device)
        return self._factors[at]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one ``.safetensors`` file, whole or not at all.

        Raises:
            ValueError: another suffix.
            FileExistsError: the file exists, and `overwrite` is off.
        """
        names = ("matrix", "n", "fingerprint", "processing", "shrinkage", "null_space")
        head = {name: getattr(self, name) for name in names}
        head |= {"source": dict(self.source), "fourth": {str(k): v for k, v in self.fourth.items()}}
        tensors = {str(layer): c for layer, c in self.second.items()}
        return save_tensors(path, _KEY, head, tensors, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that does not hold moments.
        """
        head, tensors = load_tensors(path, _KEY, "a file of moments")
        try:
            second = {int(k): c for k, c in tensors.items()}
            fourth = {int(k): v for k, v in head.pop("fourth").items()}
            return cls(second=second, fourth=fourth, **head)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a readable file of moments: {error!r}") from error


def _cholesky(c: Tensor, layer: int) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(c)
    diagonal = factor.diagonal()
    # The squared ratio bounds the condition number from below.
    limit = c.shape[0] * torch.finfo(c.dtype).eps
    if info or not torch.isfinite(factor).all() or (diagonal.min() / diagonal.max()) ** 2 < limit:
        raise SingularError(
            f"the second moment of layer {layer} is singular ({c.shape[0]} dimensions); count more "
            "text, or shrink it (moments.with_shrinkage(0.01))"
        )
    return factor


def _null_space(c: Tensor, layer: int, threshold: float) -> Float[Tensor, "d_in free"]:
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp_min(0) / values.mean().clamp_min(torch.finfo(c.dtype).tiny)
    # What rounding leaves of a zero is no eigenvalue.
    free = values <= max(threshold, len(c) * torch.finfo(c.dtype).eps)
    if not free.any():
        raise SingularError(
            f"the null space of layer {layer} is empty: C has rank {len(c)} of {len(c)} at threshold "
            f"{threshold:g}, its least eigenvalue is {values[0]:.2g} of their mean; raise the threshold, "
            "count C on what must be kept only, edit other layers, or use all of C "
            "(moments.with_null_space(None))"
        )
    return vectors[:, free].contiguous()


# -- estimation -----------------------------------------------------------------------------------


def second_moments(
    model: HookedModel,
    corpus: Corpus,
    *,
    layers: Sequence[int] | None = None,
    matrix: str = "W_O",
    positions: Positions = "all",
    shrinkage: Shrinkage = "ledoit-wolf",
    max_tokens: int = 4096,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Moments:
    """Second moments of a matrix's input over a corpus, all layers in one pass.

    Sums are made in float32, or the model's dtype if wider, batch by batch, and added up in
    float64. Only real tokens count, never padding.

    Args:
        corpus: texts, facts (counted as their statements) or the path of a file; see
            `mi_hops.text.corpus.token_batches`.
        layers: default all.
        matrix: ``"W_O"`` or ``"W_out"``.
        positions: ``"all"`` tokens, or the ``"last"`` one of each text.
        shrinkage: see `Moments`; can be changed later without counting again.
        max_tokens: tokens in one forward pass.
        cache: a folder. Moments of the same weights, text and settings are read from it, and new
            ones written there, under a name derived from these.

    Raises:
        ValueError: layers or a matrix the model does not have, an empty corpus, a generator together
            with `cache`, or activations that are not finite.

    Examples:
        >>> from mi_hops import Hopland, load_model, second_moments
        >>> model = load_model("hops-gpt2")
        >>> c = second_moments(model, Hopland().sample(train=60, held_out=3), layers=[4, 5])
        >>> c.shrunk(4).shape
        torch.Size([128, 128])
    """
    wanted = sorted({int(i) for i in (range(model.cfg.n_layers) if layers is None else layers)})
    if not wanted:
        raise ValueError("no layers were given")
    require_layers(model, wanted)
    hooks = [input_hook(matrix, layer) for layer in wanted]
    if positions not in ("all", "last"):
        raise ValueError(f"positions is {positions!r}; expected 'all' or 'last'")
    digest = hashlib.sha256()
    if isinstance(corpus, str | os.PathLike):
        require_file(corpus)
        with open(corpus, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif iter(corpus) is corpus:
        if cache is not None:
            raise ValueError(
                "the corpus is a generator and can be read only once, and moments are cached under a "
                "name made of the text; pass a list or the path of a file"
            )
        corpus = _digested(corpus, digest)  # complete when it has been read
    else:
        for _ in _digested(corpus, digest):
            pass
    source: dict[str, Any] = {"positions": positions, "max_tokens": max_tokens}
    made_for, path = fingerprint(model), None
    if cache is not None:
        # What else decides the tokens: BOS, and whether a file is read as JSON Lines.
        kind = Path(corpus).suffix if isinstance(corpus, str | os.PathLike) else ""
        read = {"bos": prepends_bos(model), "jsonl": kind == ".jsonl"}
        text = {**source, **read, "text": digest.hexdigest()}
        key = json.dumps([made_for, processing_of(model), matrix, wanted, text])
        path = Path(cache) / f"moments-{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"
        if path.is_file():
            return Moments.load(path).with_shrinkage(shrinkage)
    so_far = Running("moments", made_for, matrix, wanted, source, digest.hexdigest())
    sums: _Sums = {}
    fourths: _Sums = {}
    n = n_batches = 0
    if so_far.value is not None:
        n, n_batches, sums, fourths = so_far.value

    def count(batch: Batch, sums: _Sums, fourths: _Sums) -> None:
        """Add a batch to the sums."""
        mask = _counted(batch, positions)

        def adder(layer: int) -> HookFn:
            def add(x: Tensor) -> None:
                rows = widen(x.flatten(2)[mask.to(x.device)])
                second = einsum("token d, token e -> d e", rows, rows).double()
                _add(sums, layer, second)
                _add(fourths, layer, (rows * rows).sum(1).double().square().sum())

            return add

        found: list[Hook] = [
            (hook, adder(layer)) for hook, layer in zip(hooks, wanted, strict=True)
        ]
        with torch.no_grad():
            capture(model, batch.tokens, (), hooks=found)

    def alone(batch: Batch) -> tuple[_Sums, _Sums]:
        found: tuple[_Sums, _Sums] = {}, {}
        count(batch, *found)
        return found

    def state() -> tuple[Any, ...]:
        return n, n_batches, sums, fourths

    every = token_batches(model, corpus, max_tokens=max_tokens, ends=positions == "last")
    batches = itertools.islice(every, n_batches, None)
    d_in = live_matrix(model, matrix, wanted[0]).numel() // int(model.cfg.d_model)
    parts = each_made_elsewhere(
        model,
        batches,
        alone,
        size=8 * len(wanted) * d_in**2,
        texts=lambda batch: model.tokenizer.batch_decode(batch.tokens),
    )
    for batch, found in progress_bar(parts, label="second moments", show=progress, unit="batch"):
        if found is None:
            count(batch, sums, fourths)
        else:
            for totals, part in zip((sums, fourths), found, strict=True):
                for layer, total in part.items():
                    _add(totals, layer, total)
        n += int(_counted(batch, positions).sum())
        n_batches += 1
        so_far.put(state)
    dtype = str(dtype_of(model)).removeprefix("torch.")
    second = {layer: total.cpu() / n for layer, total in sums.items()}
    if wrong := [i for i, c in second.items() if not torch.isfinite(c).all()]:
        raise ValueError(
            f"the activations of layer(s) {wrong} are not finite (dtype of the run: {dtype}); use a "
            "wider dtype"
        )
    moments = Moments(
        matrix=matrix,
        second=second,
        fourth={layer: float(total) / n for layer, total in fourths.items()},
        n=n,
        fingerprint=made_for,
        processing=processing_of(model),
        shrinkage=shrinkage,
        source={**source, "text": digest.hexdigest(), "dtype": dtype},
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        moments.save(path, overwrite=True)  # another process may have been faster
    return moments


def _counted(batch: Batch, positions: Positions) -> Bool[Tensor, "row pos"]:
    if positions == "all":
        return batch.mask
    mask = torch.zeros_like(batch.mask)
    mask[torch.arange(len(batch.last)), batch.last] = True
    return mask


def _add(sums: _Sums, layer: int, part: Tensor) -> None:
    sums[layer] = sums[layer].to(part) + part if layer in sums else part


def _digested(corpus: Iterable[str | TwoHopFact], digest: Any) -> Iterator[str | TwoHopFact]:
    """The items as they are; what passes is added to `digest`."""
    for item in corpus:
        text = str(item)
        if isinstance(item, TwoHopFact):
            text = json.dumps(item.to_dict(), default=str)
        digest.update(text.encode() + b"\0")
        yield item

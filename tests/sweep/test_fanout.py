"""The fan-out forward against one forward pass per intervention."""

from __future__ import annotations

from itertools import permutations
from unittest import mock

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from mi_hops.model import capture, forward, hook_name, n_heads_of
from mi_hops.model.hooks import hook_point
from mi_hops.sweep.fanout import FanOut, fan_out, plan_fan_out
from mi_hops.sweep.interventions import HEAD_AXIS, Intervention, Site, add, replace, scale, zero
from mi_hops.sweep.limits import Limits
from mi_hops.sweep.passes import Pass
from mi_hops.text.tokens import encode, pad
from tests.models import cases

PROMPTS = [[1, 7, 8, 9, 30, 31, 12], [1, 40, 41, 6], [1, 22, 5, 17, 18]]


def loop(model, prompts, items, scored):
    """One forward pass per intervention, without padding, through the model's own hooks."""
    rows = []
    for item in items:
        length = int(prompts.lengths[item.base])
        tokens = prompts.tokens[item.base : item.base + 1, :length]
        hooks = []
        for site, change in item.pairs:
            where = list(range(length)) if site.positions is None else list(site.positions)
            heads = slice(None) if site.head is None else site.head

            def fn(x, site=site, change=change, where=where, heads=heads):
                x = x.clone()
                if HEAD_AXIS[site.kind] is None:
                    x[0, where] = change(x[0, where])
                elif site.kind == "pattern":
                    x[0][heads, where] = change(x[0][heads, where])
                else:
                    x[0, where, heads] = change(x[0, where, heads])
                return x

            hooks.append((hook_name(site.kind, site.layer), fn))
        with torch.no_grad():
            rows.append(forward(model, tokens, hooks=hooks)[0, scored[item.base]])
    return torch.stack(rows)


def over_positions(x):
    return x - x.mean(0, keepdim=True)


def uniform(x):
    return torch.full_like(x, 1 / x.shape[-1])


def every_kind(model, prompts):
    """Interventions of every kind, at every layer, on every base, by position and by head."""
    g = torch.Generator().manual_seed(0)
    items = []
    for base, length in enumerate(prompts.lengths.tolist()):
        for kind, axis in HEAD_AXIS.items():
            for layer in range(model.cfg.n_layers):
                where = [(length + layer) // 2]
                if axis is None:
                    width = {"mlp_pre": None, "mlp_post": None}.get(kind, model.cfg.d_model)
                    change = scale(-1.5) if width is None else add(torch.randn(width, generator=g))
                    items.append(Intervention.at(kind, layer, change, positions=where, base=base))
                elif kind == "pattern":
                    items.append(Intervention.at(kind, layer, scale(0.3), head=1, base=base))
                    items.append(
                        Intervention.at(kind, layer, scale(0.3), positions=where, base=base)
                    )
                else:
                    value = torch.randn(model.cfg.d_head, generator=g)
                    for head in range(n_heads_of(model, kind)):
                        items.append(
                            Intervention.at(
                                kind, layer, replace(value), positions=where, head=head, base=base
                            )
                        )
                    items.append(Intervention.at(kind, layer, zero(), base=base))
    items.append(Intervention.at("attn_out", range(3), scale(2.0), positions=[1, 3], base=0))
    items.append(
        Intervention(
            (Site("resid_mid", 0, (2,)), Site("resid_post", 2, (3,))), (scale(2.0), scale(-1.0))
        )
    )
    items.append(Intervention.at("mlp_out", range(3), scale(2.0), positions=[3, 1], base=1))
    # What mixes positions, keys or heads: no padding is among them.
    for base, length in enumerate(prompts.lengths.tolist()):
        for kind in ("resid_pre", "mlp_out", "z", "resid_post"):
            items.append(Intervention.at(kind, 1, over_positions, base=base))
        for where in (None, [length - 1], [1, 3]):
            items.append(Intervention.at("pattern", 1, uniform, positions=where, base=base))
    by_head = torch.linspace(0.1, 1.0, model.cfg.n_heads)[:, None, None]
    items.append(Intervention.at("pattern", 0, lambda x: x * by_head.to(x), positions=[4, 1]))
    # A row whose first change is made with the stream behind it, and others of that same stream.
    for behind in (Site("resid_pre", 1, (2,)), Site("resid_post", 0, (2,)), Site("q", 1, (2,))):
        for sites in permutations((Site("mlp_out", 0, (2,)), behind)):
            changes = tuple(scale(2.0) if s.kind == "mlp_out" else scale(-0.5) for s in sites)
            items.append(Intervention(sites, changes))
    # The output of a block, and the input of the next, which are one stream.
    for sites in permutations((Site("resid_post", 0, (2,)), Site("resid_pre", 1, (2,)))):
        changes = tuple(zero() if s.kind == "resid_post" else scale(-0.5) for s in sites)
        shift = add(torch.randn(model.cfg.d_model, generator=g))
        items += [
            Intervention(sites, changes),
            Intervention(sites, tuple(shift if c is not changes[0] else c for c in changes)),
        ]
    items.append(
        Intervention(
            (Site("resid_mid", 1, (1, 2)), Site("attn_out", 1)), (scale(0.5), scale(2.0)), 2
        )
    )
    return items


@pytest.mark.slow_case("llama-bridge")
def test_equals_one_forward_per_cell(tiny):
    prompts = pad(PROMPTS)
    items = every_kind(tiny, prompts)
    scored = [[n - 2, n - 1] for n in prompts.lengths.tolist()]
    expected = loop(tiny, prompts, items, scored)
    for limits in (Limits(), Limits(reuse_prefix=False), Limits(max_rows=7)):
        out = fan_out(tiny, prompts, items, scored=scored, limits=limits)
        assert torch.allclose(out.rows, expected, atol=1e-5, rtol=0), limits
    plain = torch.stack(
        [forward(tiny, torch.tensor([p]))[0, s] for p, s in zip(PROMPTS, scored, strict=True)]
    )
    assert torch.allclose(out.base, plain, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "atol"),
    [
        (("llama32", "bridge"), 2e-5),
        (("llama32", "hooked"), 2e-5),
        (("gpt2", "hooked", "float64"), 1e-10),
        (("llama", "hooked", "float64"), 1e-10),
    ],
)
def test_scaled_rope_tied_embeddings_and_float64(load_tiny, given, atol):
    model, prompts = load_tiny(*given), pad(PROMPTS)
    items = every_kind(model, prompts)
    scored = [[n - 1] for n in prompts.lengths.tolist()]
    out = fan_out(model, prompts, items)
    assert torch.allclose(out.rows, loop(model, prompts, items, scored), atol=atol, rtol=0)


def test_equals_transformer_lens_loop(load_tiny):
    """The residual sweep against TransformerLens's own get_act_patch_resid_pre."""
    from transformer_lens import ActivationCache
    from transformer_lens.patching import get_act_patch_resid_pre

    model = load_tiny("gpt2", "bridge")
    clean, corrupted = torch.tensor([PROMPTS[0]]), torch.tensor([[1, 50, 8, 9, 33, 31, 12]])
    _, cache = model.run_with_cache(clean, return_type="logits")
    assert isinstance(cache, ActivationCache)
    grid = get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, -1, 5])
    items = [
        Intervention.at(
            "resid_pre", layer, replace(cache["resid_pre", layer][0, pos]), positions=[pos]
        )
        for layer in range(3)
        for pos in range(7)
    ]
    out = fan_out(model, pad(corrupted.tolist()), items)
    assert torch.allclose(out.rows[:, 0, 5].reshape(3, 7), grid.cpu(), atol=1e-5, rtol=0)


def test_bases_are_observed_as_they_are(tiny):
    """One pass scores the bases, runs interventions on them and shows their activations."""
    prompts = pad(PROMPTS)
    kinds = ("resid_pre", "resid_mid", "z", "pattern", "mlp_post", "resid_post")
    names = [hook_name(kind, layer) for kind in kinds for layer in (1, 2)]
    names += ["hook_embed", "blocks.2.ln2.hook_normalized", "ln_final.hook_normalized"]
    names += ["ln_final.hook_scale", "unembed.hook_in"]
    names = [name for name in names if hook_point(tiny, name) is not None]
    expected, _ = capture(tiny, prompts.tokens, names)
    items = [
        Intervention.at("resid_pre", 1, scale(0.0), positions=[2], base=base) for base in range(3)
    ]
    seen = {}
    observe = {n: lambda x, n=n: seen.update({n: x.clone()}) for n in names}
    for rows in ([], items):
        seen.clear()
        out = fan_out(tiny, prompts, rows, observe=observe)
        assert torch.allclose(out.rows, fan_out(tiny, prompts, rows).rows, atol=1e-6)
        for name in names:
            torch.testing.assert_close(seen[name], expected[name], atol=1e-5, rtol=1e-5)
        for name in names:  # each alone, so that none keeps the pass whole for the others
            seen.clear()
            fan_out(tiny, prompts, rows, observe={name: observe[name]})
            assert seen[name].shape == expected[name].shape, name


def test_reduce_is_applied_with_bases(tiny):
    prompts = pad(PROMPTS)
    items = [
        Intervention.at("mlp_out", layer, scale(0.0), base=base)
        for layer in range(3)
        for base in (2, 0, 1)
    ]
    target = torch.tensor([5, 6, 7])
    full = fan_out(tiny, prompts, items)
    small = fan_out(
        tiny,
        prompts,
        items,
        limits=Limits(max_rows=2),
        reduce=lambda x, b: x[range(len(b)), 0, target[b]],
    )
    wanted = full.rows[range(9), 0, target[[i.base for i in items]]]
    assert torch.allclose(small.rows, wanted, atol=1e-5)
    assert small.base.shape == (3,)


def test_prefix_is_reused_only_where_positions_allow(tiny):
    prompts = pad([list(range(1, 41))])
    items = [
        Intervention.at("resid_pre", layer, scale(0.5), positions=[pos])
        for layer in range(3)
        for pos in range(40)
    ]
    plan = plan_fan_out(tiny, prompts, items)
    assert len(plan) > 1
    assert sorted(i for p in plan for i in p.members) == list(range(120))
    for step in plan:
        assert all(items[i].sites[0].positions[0] >= step.start for i in step.members)
    early = plan_fan_out(tiny, prompts, items, scored=[[0]])
    assert {p.start for p in early} == {0}
    everywhere = plan_fan_out(tiny, prompts, [Intervention.at("z", 0, scale(0.5))])
    assert everywhere == [Pass(0, (0,))]


def test_the_bases_share_a_pass_where_they_can(tiny):
    item = Intervention.at("mlp_out", 1, scale(0.5), positions=[3])
    alone = Pass(0, ())
    one = pad(PROMPTS[:1])
    assert plan_fan_out(tiny, one, []) == [alone]
    assert plan_fan_out(tiny, one, [item]) == [alone, Pass(3, (0,))]
    assert plan_fan_out(tiny, one, [item], limits=Limits(reuse_prefix=False)) == [Pass(0, (0,))]
    # The second prompt has no row of its own there, but rides along.
    two = pad(PROMPTS[:2])
    assert plan_fan_out(tiny, two, [item], limits=Limits(reuse_prefix=False)) == [Pass(0, (0,))]
    out = fan_out(tiny, two, [item], limits=Limits(reuse_prefix=False))
    assert torch.allclose(out.base, fan_out(tiny, two, []).base, atol=1e-5)


def test_a_change_may_use_what_another_base_shows(tiny):
    """Patching from one base into another needs no pass of its own."""
    prompts = pad([PROMPTS[0], [1, 50, 8, 9, 33, 31, 12]])
    name = hook_name("attn_out", 1)
    store = {}
    kept = {name: lambda x: store.update({name: x.clone()})}
    lazy = [
        Intervention.at("attn_out", 1, lambda x, p=p: store[name][1, [p]], positions=[p])
        for p in range(7)
    ]
    donor = capture(tiny, prompts.tokens, [name])[0][name][1]
    plain = [Intervention.at("attn_out", 1, replace(donor[[p]]), positions=[p]) for p in range(7)]
    for limits in (Limits(), Limits(max_rows=2), Limits(reuse_prefix=False)):
        found = fan_out(tiny, prompts, lazy, observe=kept, limits=limits)
        expected = fan_out(tiny, prompts, plain, limits=limits)
        assert torch.allclose(found.rows, expected.rows, atol=1e-5), limits


@pytest.mark.parametrize(("kind", "attended", "fed"), [("attn_out", 2, 3), ("mlp_out", 2, 2)])
def test_rows_join_behind_what_they_leave_alone(load_tiny, kind, attended, fed):
    """A row passes neither the attention before its first change, nor the MLP."""
    model, prompts = load_tiny("gpt2", "hooked"), pad(PROMPTS[:1])
    sizes = {}

    def look(point, x):  # a hook would be the user's, under which every row is run as a whole
        sizes[point.name] = len(x)
        return x

    with mock.patch.object(HookPoint, "forward", look):
        fan_out(model, prompts, [Intervention.at(kind, 0, scale(2.0))])
    for k, n in (("z", attended), ("mlp_out", fed)):
        assert sum(sizes[hook_name(k, layer)] == 2 for layer in range(3)) == n


def at_a_position(x):
    x = x.clone()
    x[:, 2:3] *= -2  # of the rows' shared beginning
    return x


def mixing(x):
    return x + x.mean(1, keepdim=True)


def torch_hook(module, fn):
    def of_output(module, given, out):
        return fn(out) if isinstance(out, torch.Tensor) else (fn(out[0]), *out[1:])

    return module.register_forward_hook(of_output)


USERS = {
    "a stream changed at a position": lambda m: m.hooks(
        fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: at_a_position(x))]
    ),
    "the stream between two sites": lambda m: m.hooks(
        fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: -2 * x)]
    ),
    "the last stream, positions mixed": lambda m: m.hooks(
        fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: mixing(x))]
    ),
    "torch's hook on an MLP": lambda m: torch_hook(m.blocks[1].mlp, at_a_position),
    "torch's hook on attention": lambda m: torch_hook(m.blocks[1].attn, torch.neg),
    "torch's hook on the final norm": lambda m: torch_hook(m.ln_final, mixing),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_hooks_of_the_users_act_in_every_row(load_tiny, user, shape, backend):
    """They may look at any position, and act between any two sites."""
    model, prompts = load_tiny(shape, backend), pad(PROMPTS[:1])
    n = len(PROMPTS[0])
    items = [
        Intervention.at(kind, layer, scale(2.0), positions=(pos,))
        for kind in ("attn_out", "mlp_out", "resid_pre")
        for layer in range(3)
        for pos in (n - 1, 3)
    ]
    before = fan_out(model, prompts, items).rows
    with USERS[user](model):
        got = fan_out(model, prompts, items, limits=Limits(max_rows=4)).rows
        torch.testing.assert_close(
            got, loop(model, prompts, items, [[n - 1]]), atol=2e-5, rtol=1e-4
        )
    assert not torch.allclose(got, before, atol=1e-3)


@pytest.mark.parametrize("shape, backend", cases("gpt2", "llama"))
def test_hooks_of_the_users_see_no_padding(load_tiny, shape, backend):
    """Whatever a hook reads from the end of a prompt, a prompt's values are its own alone."""
    model, prompts = load_tiny(shape, backend), pad(PROMPTS)

    def last(x, hook):
        x = x.clone()
        x[:, -1] = x.mean(1) - 2 * x[:, -1]
        return x

    items = [
        Intervention.at(kind, layer, scale(2.0), positions=[1], base=base)
        for base in range(3)
        for kind, layer in (("mlp_out", 0), ("z", 1), ("resid_post", 1))
    ]
    scored = [[n - 1] for n in prompts.lengths.tolist()]
    seen, bases = {}, [Intervention((Site("resid_pre", 0),), scale(1.0), base) for base in range(3)]
    names = [hook_name(kind, 2) for kind in ("mlp_out", "pattern")]
    observe = {n: lambda x, n=n: seen.update({n: x}) for n in names}
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", last)]):
        got = fan_out(
            model,
            prompts,
            items,
            observe=observe,
            reduce=lambda x, base: x[:, 0] + torch.tensor(base)[:, None],
        )
        for found, given in ((got.rows, items), (got.base, bases)):
            alone = loop(model, prompts, given, scored)[:, 0]
            alone = alone + torch.tensor([item.base for item in given])[:, None]
            torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)
        for base, n in enumerate(prompts.lengths.tolist()):
            own, _ = capture(model, prompts.tokens[base : base + 1, :n], names)
            mlp, pattern = (own[name][0] for name in names)
            torch.testing.assert_close(seen[names[0]][base, :n], mlp, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                seen[names[1]][base, :, :n, :n], pattern, atol=1e-5, rtol=1e-4
            )
    assert {x.shape[1 if "mlp" in name else 2] for name, x in seen.items()} == {7}


def test_out_of_memory_halves_the_pass(tiny, monkeypatch):
    from mi_hops.sweep import fanout

    prompts = pad(PROMPTS)
    items = [Intervention.at("mlp_out", layer, scale(0.0)) for layer in (0, 1, 2, 0)]
    expected = fan_out(tiny, prompts, items).rows
    real, calls = fanout.run_pass, []

    def scarce(model, prompts, rows, *rest, **named):
        calls.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, rows, *rest, **named)

    monkeypatch.setattr(fanout, "run_pass", scarce)
    assert torch.allclose(fan_out(tiny, prompts, items).rows, expected, atol=1e-5)
    # The bases shared the pass that failed, so they are run alone first.
    assert calls == [4, 0, 2, 1, 1, 2, 1, 1]


def test_nothing_stays_behind(tiny):
    prompts = pad(PROMPTS)
    before = forward(tiny, prompts.tokens)

    def broken(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fan_out(tiny, prompts, [Intervention.at("z", 1, broken)])
    assert not any(h.fwd_hooks for h in tiny.hook_dict.values())
    assert torch.equal(forward(tiny, prompts.tokens), before)


def test_no_interventions(tiny):
    out = fan_out(tiny, pad(PROMPTS), [])
    assert isinstance(out, FanOut)
    assert out.rows.shape[0] == 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Intervention.at("resid", 0, scale(1)), "cannot change 'resid'"),
        (Intervention.at("z", 9, scale(1)), "out of range"),
        (Intervention.at("z", 0, scale(1), head=4), "heads 0..3"),
        (Intervention.at("attn_out", 0, scale(1), head=0), "no head axis"),
        (Intervention.at("z", 0, scale(1), positions=[5], base=1), "prompt of 4 tokens"),
        (Intervention.at("z", 0, scale(1), base=3), "there are 3"),
        (Intervention((), scale(1)), "without a site"),
    ],
)
def test_refuses(tiny, item, message):
    with pytest.raises(ValueError, match=message):
        fan_out(tiny, pad(PROMPTS), [item])


def test_refuses_wrong_key_value_head(load_tiny):
    with pytest.raises(ValueError, match=r"heads 0\.\.1"):
        fan_out(load_tiny("llama"), pad(PROMPTS), [Intervention.at("k", 0, scale(1), head=2)])


def test_refuses_value_of_wrong_shape(tiny):
    with pytest.raises(ValueError, match="does not fit"):
        fan_out(tiny, pad(PROMPTS), [Intervention.at("resid_pre", 0, add(torch.ones(5)))])


def test_positions_count_from_the_end_as_well(tiny):
    prompts = pad(PROMPTS)
    last = [n - 1 for n in prompts.lengths.tolist()]

    def rows(where):
        items = [
            Intervention.at("z", 1, scale(2.0), positions=[where(b)], base=b) for b in range(3)
        ]
        return fan_out(tiny, prompts, items).rows

    assert torch.equal(rows(lambda b: -1), rows(lambda b: last[b]))


def test_prompts_may_be_texts_or_tokens(load_tiny):
    model = load_tiny("llama")
    texts = ["w1 w2 w3", "w4 w5 w6"]
    rows = [Intervention.at("mlp_out", 1, scale(0.0), base=1)]
    ids = [encode(model, text).ids for text in texts]
    expected = fan_out(model, pad(ids), rows)
    for given in (texts, torch.tensor(ids)):
        found = fan_out(model, given, rows)
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.base, expected.base)

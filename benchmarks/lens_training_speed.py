"""One training step of one layer's attention lens: this package's layout against the published one.

``python -m benchmarks.lens_training_speed [--batch 4] [--tokens 32] [--pairs 3]``

The published layout written plainly: an affine map d -> V for each head, applied to every position of
the batch, summed over heads, compared at the last position, with Adam over all of it. For GPT-2 small
that is 463M parameters a layer, and some 8 GB with gradients and Adam's moments.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.harness import gpt2_small, paired, table, write
from mi_hops.lens import AttentionLens
from mi_hops.lens.examples import make_example, real_cells
from mi_hops.lens.trained import kl
from mi_hops.model import forward, unembedding
from mi_hops.text.tokens import Batch


def published_step(model, tokens, layer):
    """A training step of plain per-head maps, at all positions, scored at the last one."""
    weight, bias = unembedding(model)
    heads = [torch.nn.Linear(*weight.shape) for _ in range(model.cfg.n_heads)]
    with torch.no_grad():
        for head in heads:
            head.weight.copy_(weight.T)
            head.bias.copy_(bias)
    optimiser = torch.optim.Adam([p for h in heads for p in h.parameters()], lr=1e-3)

    def step():
        kept = {}
        with torch.no_grad():
            logits = forward(
                model, tokens, hooks=[(f"blocks.{layer}.attn.hook_z", lambda z: kept.update(z=z))]
            )
            outputs = torch.einsum("bthd,hde->bthe", kept["z"], model.blocks[layer].attn.W_O)
        total = sum(head(outputs[:, :, i]) for i, head in enumerate(heads))
        loss = kl(logits[:, -1].log_softmax(-1), total[:, -1]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return step, sum(p.numel() for h in heads for p in h.parameters())


def our_step(model, tokens, layer, **options):
    """The same objective and data, with a small lens at the scored positions only."""
    lens = AttentionLens(model, layers=[layer], **options)
    tensors = list(lens.parameters.values())
    for tensor in tensors:
        tensor.requires_grad_(True)
    optimiser = torch.optim.Adam(tensors, lr=1e-3)
    batch = Batch(tokens, torch.full((len(tokens),), tokens.shape[1]))
    cells = real_cells(batch, last_only=True)

    def step():
        example = make_example(model, lens, batch, cells)
        (loss,) = lens.losses(example, layer, "sum")
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        return loss.mean().item()

    return step, lens.n_parameters


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layer", type=int, default=9)
    asked = parser.parse_args()
    model = gpt2_small()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.cfg.d_vocab, (asked.batch, asked.tokens), generator=generator)
    theirs, theirs_size = published_step(model, tokens, asked.layer)
    rows = []
    for label, options in (
        ("translator, d x d", {}),
        ("translator, rank 64", {"rank": 64}),
        ("low rank 8", {"variant": "low_rank", "rank": 8}),
    ):
        ours, size = our_step(model, tokens, asked.layer, **options)
        found = paired(ours, theirs, pairs=asked.pairs)
        rows.append(
            [
                label,
                f"{size / 1e6:.2f}M",
                f"{theirs_size / size:.0f}",
                f"**{found['ratio']:.1f}** ({found['lowest']:.1f} to {found['highest']:.1f})",
                f"{found['ours_s']:.2f}",
                f"{found['theirs_s']:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    columns = [
        "lens of one layer",
        "parameters",
        "times smaller",
        "times faster: median (range)",
        "step, s",
        "published layout, s",
    ]
    body = (
        f"A model of GPT-2 small's size (random weights, float32), {asked.batch} texts of "
        f"{asked.tokens} tokens, layer {asked.layer}; the forward pass of the model is in both. The "
        f"published layout has {theirs_size / 1e6:.0f}M parameters.\n\n" + table(columns, rows)
    )
    print(
        write("lens-training-speed", "Attention lenses: speed", body, script="lens_training_speed")
    )


if __name__ == "__main__":
    main()

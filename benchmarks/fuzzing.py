"""Damaged inputs: every reader of files refuses them by a clear error, or reads what is still whole.

``python -m benchmarks.fuzzing [--each 10000] [--only KIND ...]`` writes a small file of each kind, damages
it at random (bits turned, pieces cut out, doubled, swapped or replaced, numbers and brackets changed;
half of the damages lie in the first bytes, where sizes are told), and reads it. *Read*: an object came
back. *Refused*: ``ValueError`` or ``OSError`` with a text. *Lost*: any other error, or one without a
text. The counts are part of ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mi_hops
from benchmarks.harness import keep, kept

PAGE = "reliability"
Reader = Callable[[Path], Any]

#: Bytes at the beginning that half of the damages hit.
_HEAD = 4096

#: What a text is damaged with.
_PIECES = (
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"null",
    b"-1",
    b"1e999",
    b"\xff",
    b"\0",
    b"NaN",
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four damages."""
    for _ in range(rng.randint(1, 4)):
        if not data:
            return data
        a = rng.randrange(rng.choice((len(data), min(len(data), _HEAD))))
        b = min(len(data), a + rng.choice((1, 2, 8, 64)))
        how = rng.randrange(6)
        if how == 0:
            data = data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1 :]
        elif how == 1:
            data = data[:a] + data[b:]
        elif how == 2:
            data = data[:b] + data[a:b] + data[b:]
        elif how == 3:
            data = data[:a] + rng.choice(_PIECES) + data[b:]
        elif how == 4:
            data = data[:a] + rng.randbytes(b - a) + data[b:]
        else:
            data = data[:a]
    return data


def kinds(folder: Path) -> dict[str, tuple[Path, Reader]]:
    """A whole file of each kind, and what reads it."""
    model = mi_hops.load_model("hops-gpt2")
    facts = mi_hops.Hopland().sample(train=0, held_out=2)
    gap = mi_hops.find_gap(model, facts[:2])
    edit = mi_hops.creme(model, facts[0], layers=[3])
    moments = mi_hops.second_moments(model, facts, layers=[2], max_tokens=64)
    lens = mi_hops.TunedLens(model, rank=2)
    rows = [
        "id,subject,bridge,answer,first_hop,prompt",
        *(f"{i},a{i},b{i},c{i},the r of a{i},The s of the r of a{i} is" for i in range(5)),
    ]
    (folder / "facts.csv").write_text("\n".join(rows))
    columns = {name: name for name in ("id", "subject", "bridge", "answer", "first_hop")}
    columns["prompts.suffix"] = "prompt"
    saved = lens.save(folder / "lens")

    def load_lens(path: Path) -> Any:
        """A lens of which one file is this one."""
        place = folder / "other lens"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(saved, place)
        shutil.copy(path, place / f"lens{path.suffix}")
        return mi_hops.load_lens(model, place)

    def load_gguf(path: Path) -> Any:
        """A model, converted anew."""
        shutil.rmtree(os.environ["MI_HOPS_CACHE"], ignore_errors=True)
        return mi_hops.load_model(path)

    found: dict[str, tuple[Path, Reader]] = {
        "facts, JSON Lines": (
            mi_hops.save_jsonl(facts, folder / "facts.jsonl"),
            mi_hops.load_facts,
        ),
        "facts, table": (
            folder / "facts.csv",
            lambda path: mi_hops.load_table(path, columns=columns),
        ),
        "result, NetCDF": (gap.save(folder / "gap.nc"), mi_hops.Result.load),
        "edit": (edit.save(folder / "edit.safetensors"), mi_hops.Edit.load),
        "moments": (moments.save(folder / "moments.safetensors"), type(moments).load),
        "lens, weights": (saved / "lens.safetensors", load_lens),
        "lens, settings": (saved / "lens.json", load_lens),
    }
    if importlib.util.find_spec("gguf"):
        from tests.gguf_files import network
        from tests.gguf_files import write as write_gguf

        found["model, GGUF"] = (
            write_gguf(network("llama"), folder / "model.gguf", kind="Q8_0"),
            load_gguf,
        )
    return found


Counts = dict[str, dict[str, Any]]


def fuzz(
    each: int,
    seed: int = 0,
    only: Sequence[str] | None = None,
    store: Callable[[Counts], Any] = lambda found: None,
) -> Counts:
    """Kind -> counts, and the first losses.

    Args:
        only: kinds; default all.
        store: takes what was counted, after each kind.
    """
    found: Counts = {}
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.dict(os.environ, MI_HOPS_CACHE=f"{name}/cache"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        folder = Path(name)
        for kind, (path, read) in kinds(folder).items():
            if only and kind not in only:
                continue
            rng = random.Random(f"{seed} {kind}")
            whole = path.read_bytes()
            read(path)
            count: dict[str, Any] = {"tried": each, "read": 0, "refused": 0, "lost": 0}
            count["losses"] = []
            other = folder / f"damaged{path.suffix}"
            for _ in range(each):
                other.write_bytes(damaged(whole, rng))
                try:
                    read(other)
                    count["read"] += 1
                except (ValueError, OSError) as error:
                    count["refused" if str(error) else "lost"] += 1
                except Exception as error:
                    count["lost"] += 1
                    if len(count["losses"]) < 5:
                        count["losses"].append(f"{type(error).__name__}: {error}"[:200])
            found[kind] = count
            store(found)
            print(kind, count, flush=True)
    return found


def main() -> None:
    """Damage, read, count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", help="kinds of input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no page")
    asked = parser.parse_args()

    def store(found: Counts) -> None:
        """Beside the kinds counted before."""
        if not asked.dry:
            keep(PAGE, "fuzzing", {**kept(PAGE).get("fuzzing", {}), **found})

    fuzz(asked.each, asked.seed, asked.only, store)
    if not asked.dry:
        from benchmarks.faults import write_page

        write_page()


if __name__ == "__main__":
    main()

"""The ``mi-hops`` command: argument handling, clear errors and exit codes, nothing else.

Exit codes: 0 done; 2 bad input or a file or model that cannot be loaded (one line on stderr);
130 stopped with Ctrl-C.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mi_hops._version import __version__
from mi_hops.shell import friendly, no_loading_bar, show_accuracy, show_plan, tell_study

if TYPE_CHECKING:
    from mi_hops.facts import Facts

app = typer.Typer(
    name="mi-hops",
    help="Find out how a language model answers two-hop questions, why it fails, and repair it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default CUDA where there is one.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing results.")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only the result's path: no progress bars, no table."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Options before a command."""
    if version:
        typer.echo(f"mi-hops {__version__}")
        raise typer.Exit


@app.command(name="version")
def show_version() -> None:
    """Show the versions of mi-hops and of the libraries that its numbers depend on."""
    typer.echo(f"mi-hops {__version__}")
    for name in ("torch", "transformer_lens", "transformers"):
        typer.echo(f"{name} {metadata.version(name)}")


@app.command()
def study(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A bundled model, a Hugging Face folder, or a hub id.")
    ] = "hops-gpt2",
    facts: Annotated[
        Path | None,
        typer.Option(
            help="A file of two-hop facts, or the name of bundled ones (hopland, geo); by default hopland."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="How --facts is read: jsonl, geo, mquake, memory_injections, two_hop_fact, musique, "
            "hotpotqa or table; by default inferred from the file."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=COLUMN",
            help="The table column for a field of a fact; repeat for each: bridge=director, "
            "prompts.suffix=question (prompts take their form after a dot). By default the "
            "columns that are named like a field.",
        ),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Folder of MQuAKE's templates, instead of our wordings.")
    ] = None,
    on_error: Annotated[
        Literal["raise", "drop"],
        typer.Option(help="What to do with malformed records of --facts: stop, or drop them."),
    ] = "raise",
    out: Annotated[Path, typer.Option(help="Folder for the report and the numbers.")] = Path(
        "study"
    ),
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default the checkpoint's.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="TransformerLens class: hooked or bridge.")
    ] = None,
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most N facts; by default all.")
    ] = None,
    sizes: Annotated[
        Literal["quick", "default", "full"],
        typer.Option(help="How many questions each step uses; full sets no limit."),
    ] = "default",
    shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Worked examples before every prompt; by default 0 or 3, whichever lets the model "
            "know more, where the facts have several wordings.",
        ),
    ] = None,
    score: Annotated[
        Literal["answer", "first-token"],
        typer.Option(
            help="What counts as answered: the whole answer and its end, or its first token."
        ),
    ] = "answer",
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="An optional step to include: knockout or back_patching; repeat for both.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Approximate time limit: 20m, 2h. It determines the sizes."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show steps, rows, memory and minutes; run nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary (of --dry-run: the plan) as JSON.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of local worker processes, each with its own copy of the model."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address of a Dask cluster to run on."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Share the work with other processes that run this on the same folder."
        ),
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Study how a model answers two-hop questions, and write report.html.

    The same command again resumes what is unfinished and reopens what is finished.
    """
    resume = "What is done is kept in the folder; the same command resumes."
    with friendly(context, debug=debug, stopped=resume):
        from mi_hops.study.reopen import remember, reopened

        call = _asked(context)
        if not dry_run and (summary := reopened(out, call)) is not None:
            return tell_study(out / "report.html", summary, as_json=as_json, quiet=quiet)
        if quiet or as_json or not sys.stderr.isatty():
            no_loading_bar()
        how = {"format": format, "templates": templates, "on_error": on_error}
        given = _facts(facts, columns, **how)
        from mi_hops.study import (
            StudySettings,
            executor_of,
            join_study,
            plan_study,
            run_study,
            write_report,
        )

        settings = StudySettings(
            seed=seed,
            limit=limit,
            sizes=sizes,
            shots=shots,
            score="answer" if score == "answer" else "first_token",
            budget=None if budget is None else _minutes(budget),
            also=tuple(also or ()),  # type: ignore[arg-type]  # checked there
        )
        asked: dict[str, Any] = {"model": model, "facts": given, "out": out, "settings": settings}
        asked |= {"device": device, "dtype": dtype, "backend": backend}
        if dry_run:
            plan = plan_study(**asked)
            return typer.echo(json.dumps(plan.to_dict())) if as_json else show_plan(plan)
        run = partial(run_study, **asked, force=force, progress=not quiet)
        if join and (force or workers is not None or scheduler is not None):
            raise ValueError("--join cannot be combined with --force, --workers or --scheduler")
        if join:
            done = join_study(out, lambda executor: run(executor=executor))
        else:
            with executor_of(workers, scheduler) as executor:
                done = run(executor=executor)
        report = write_report(done, out / "report.html", overwrite=True)
        if inputs := _inputs(model, facts, templates):
            remember(out, call, inputs)
        tell_study(report, done.summary, as_json=as_json, quiet=quiet)


@app.command()
def compare(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
    second: Annotated[Path, typer.Argument(help="Folder of another.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    names: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="FIRST SECOND", help="Their names; by default model or folder."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two studies on one page: two models, two versions, or before and after an edit."""
    with friendly(context, debug=debug, stopped="Nothing was written."):
        if out.exists() and not force:
            raise FileExistsError(f"{out} exists; name another file with --out, or use --force")
        from mi_hops.study import compare_studies

        page = compare_studies(first, second, out, names=names, overwrite=force)
        typer.echo(str(page) if quiet else f"Comparison: {page}")


@app.command(name="train-world")
def train_world(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint (new or empty).")],
    family: Annotated[Literal["gpt2", "llama"], typer.Option(help="Model family.")] = "gpt2",
    appositions: Annotated[
        bool,
        typer.Option(
            "--appositions", help="Train on texts in which the bridge follows its description."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps, in one stage; by default the recipe's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batch order.")] = 0,
    device: Device = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Measure at most N questions per split; by default all."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small model on Hopland, measure it, and write it as a Hugging Face folder.

    The same command goes on where a stopped run left off.
    """
    with friendly(context, debug=debug, stopped="The same command goes on with the training."):
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out} is a file; --out needs a folder")
        state = out / "unfinished.pt"
        if force:
            state.unlink(missing_ok=True)
        elif out.is_dir() and any(path != state for path in out.iterdir()):
            raise FileExistsError(
                f"{out} is not empty; name another folder, or overwrite it with --force"
            )
        from mi_hops.model import usable_device
        from mi_hops.worlds import Hopland
        from mi_hops.worlds.recipe import APPOSED, RECIPES
        from mi_hops.worlds.train import measure, save, train

        recipe = replace((APPOSED if appositions else RECIPES)[family], seed=seed)
        if steps is not None:
            recipe = replace(recipe.stages[-1], steps=steps, seed=seed)
        world = Hopland()
        where = usable_device(device)
        out.mkdir(parents=True, exist_ok=True)
        trained, tokenizer, log = train(
            world, family, recipe, device=where, progress=not quiet, state=state
        )
        measured = measure(trained, tokenizer, world, limit=limit)
        save(out, trained, tokenizer, recipe=recipe, world=world, log=log, measured=measured)
        state.unlink(missing_ok=True)
        if quiet:
            typer.echo(str(out))
        else:
            show_accuracy(family, sum(stage.steps for stage in recipe.stages), measured)
            typer.echo(f"Model: {out}")


#: Options of `study` on which its numbers do not depend.
_MANNERS = ("out", "dry_run", "as_json", "workers", "scheduler", "join", "force", "quiet", "debug")


def _asked(context: typer.Context) -> dict[str, Any]:
    """The options that decide what a study finds, paths in full."""
    kept = {k: v for k, v in context.params.items() if k not in _MANNERS}
    for name in ("model", "facts", "templates"):
        if kept[name] is not None and Path(kept[name]).exists():
            kept[name] = Path(kept[name]).resolve()
    return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}


def _inputs(model: str, facts: Path | None, templates: Path | None) -> list[Path]:
    """The files that decide what a study finds; none if its model comes from a hub."""
    from mi_hops.facts.loaders import facts_path
    from mi_hops.model import model_files

    files = model_files(model)
    more = [facts_path("hopland" if facts is None else facts)]
    more += sorted(templates.iterdir()) if templates else []
    return files and [*files, *(path.resolve() for path in more)]


def _facts(path: Path | None, columns: list[str] | None, **how: Any) -> Path | Facts | None:
    """The facts as they are to be read; the path where nothing is said about that.

    Args:
        how: further options of `load_facts`.

    Raises:
        ValueError: options without a file, or a column that is not a pair; see also `load_facts`.
    """
    from mi_hops.facts import load_facts

    if not columns and how == {"format": None, "templates": None, "on_error": "raise"}:
        return path
    if path is None:
        raise ValueError(
            "--format, --columns, --templates and --on-error say how a file is read; name it with "
            "--facts"
        )
    return load_facts(path, columns=_columns(columns) if columns else None, **how)


@app.command()
def merge(
    context: typer.Context,
    parts: Annotated[
        list[Path],
        typer.Argument(help="Files of results, evaluations (.nc) or moments (.safetensors)."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge results for different facts, with the same model and settings, into one file."""
    with friendly(context, debug=debug, stopped="Nothing was written."):
        from mi_hops.reasoning.merge import load_part
        from mi_hops.reasoning.merge import merge as join

        merged = join([load_part(path) for path in parts])
        merged.save(out, overwrite=force)
        if not quiet:
            typer.echo(merged.describe() if hasattr(merged, "describe") else repr(merged))


def _minutes(text: str) -> float:
    """``"20m"``, ``"90s"`` or ``"1.5h"`` in minutes.

    Raises:
        ValueError: anything else, or no time at all.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([smh])", text.strip())
    minutes = float(found[1]) * {"s": 1 / 60, "m": 1, "h": 60}[found[2]] if found else 0
    if minutes > 0:
        return minutes
    raise ValueError(f"--budget {text!r} is not a time; expected e.g. 20m, 90s or 2h")


def _columns(pairs: list[str]) -> dict[str, str | list[str]]:
    """``["bridge=b", "prompts.suffix=q"]`` as `load_facts` takes it; a field named twice is a list."""
    named: dict[str, list[str]] = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not (equals and field.strip() and column.strip()):
            raise ValueError(
                f"--columns {pair!r} is not a pair; expected e.g. bridge=COLUMN or "
                "prompts.suffix=COLUMN"
            )
        named.setdefault(field.strip(), []).append(column)
    return {field: found[0] if len(found) == 1 else found for field, found in named.items()}

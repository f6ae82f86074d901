"""`syncer bench`: benchmarks of this machine; they come with a checkout."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from syncer.errors import SettingsError
from syncer.service.buffers import Json

bench_app = typer.Typer(
    help="Measure this machine; needs a checkout of the project.", no_args_is_help=True
)

Write = Annotated[bool, typer.Option("--write", help="Into benchmarks/RESULTS.md.")]


@bench_app.command("ack")
def ack(
    quick: Annotated[bool, typer.Option("--quick", help="One short round.")] = False,
    write: Write = False,
    million: Annotated[bool, typer.Option("--million", help="Queue a million.")] = False,
    json: Json = False,
) -> None:
    """Measure how fast a durable write is acknowledged, against what else there is."""
    _run("ack", quick=quick, write=write, million=million, json=json)


@bench_app.command("flush")
def flush(
    transactions: Annotated[int, typer.Option(min=1_000, help="How many queue up.")] = 100_000,
    users: Annotated[int, typer.Option(min=1, help="Their authors.")] = 200,
    json: Json = False,
) -> None:
    """Let transactions queue up in an outage, and measure the drain with writes going on."""
    _run("drain", transactions=transactions, users=users, json=json)


@bench_app.command("api")
def api(
    write: Write = False,
    sessions: Annotated[int, typer.Option(min=1_000, help="Sessions stored.")] = 10_000,
    calls: Annotated[int, typer.Option(min=10, help="Calls of one client, of a kind.")] = 150,
    seconds: Annotated[float, typer.Option(min=1, help="How long fifty clients call, s.")] = 20.0,
    json: Json = False,
) -> None:
    """Measure the API's latencies with Supabase up, slow and down."""
    _run("api", write=write, sessions=sessions, calls=calls, seconds=seconds, json=json)


def _run(name: str, **options: bool | float) -> None:
    """Run a benchmark's own command line; raises SettingsError where there is none."""
    try:
        main: Callable[[list[str]], Any] = importlib.import_module(f"benchmarks.{name}").main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "benchmarks":
            raise  # something else is missing; that is what has to be told
        raise SettingsError(
            "bench", "the benchmarks aren't part of the package", hint="run it in a checkout"
        ) from None
    arguments: list[str] = []
    for option, value in options.items():
        if value is True:
            arguments.append(f"--{option}")
        elif value is not False:
            arguments += [f"--{option}", str(value)]
    main(arguments)

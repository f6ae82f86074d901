"""`syncer dead-letters` and `syncer conflicts`: parked work, from any machine with URL and key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import orjson
import typer

from local_store.ops import Row
from syncer import operators
from syncer.remote import SupabaseRemote
from syncer.service.output import show_document, told
from syncer.settings import Settings

EXIT_TROUBLE = 1
DONE = ("applied", "duplicate")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
User = Annotated[str | None, typer.Option(help="Only this author's.")]
TxnIds = Annotated[list[str], typer.Argument(help="txn_id of the transaction.")]

dead_letters_app = typer.Typer(
    no_args_is_help=True, help="What was refused, and what waits behind it."
)
conflicts_app = typer.Typer(no_args_is_help=True, help="What two sides wanted of one row.")


def _remote() -> SupabaseRemote:
    return SupabaseRemote.from_settings(Settings.load())


# -- dead letters --


@dead_letters_app.command("list")
def list_dead_letters(
    log: Annotated[str | None, typer.Option(help="Only of this log_id.")] = None,
    user: User = None,
    json: Json = False,
) -> None:
    """List what is parked, grouped by cause, without users' data."""
    found = operators.dead_letters(_remote(), log_id=log, user_id=user)
    if json:
        show_document(found)
        return
    for cause, letters in _by_cause(found).items():
        told(f"{len(letters)} × {cause}")
        for letter in letters:
            waiting = f", {letter['waiting']} waiting" if letter["waiting"] else ""
            told(f"    {letter['txn_id']}  since {letter['parked_at'][:19]}{waiting}")
    if not found:
        told("nothing is parked")


def _by_cause(found: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for letter in found:
        tables = sorted({key.split("/")[0] for key in letter["keys"]})
        cause = [letter["state"], letter["sqlstate"] or "", letter["message"] or ""]
        if letter["state"] == "held":
            cause = ["held behind", str(letter["blocked_by"])]
        text = " ".join(part for part in cause if part) + f" ({', '.join(tables)})"
        groups.setdefault(text, []).append(letter)
    return groups


@dead_letters_app.command("show")
def show_dead_letter(
    txn_id: Annotated[str, typer.Argument(help="txn_id of the transaction.")], json: Json = False
) -> None:
    """Show a parked transaction with its values."""
    found = operators.dead_letters(_remote(), txn_ids=[txn_id], full=True)
    if json:
        show_document(found)
    else:
        told(_pretty(found[0]) if found else f"{txn_id} is not parked")
    raise typer.Exit(0 if found else EXIT_TROUBLE)


@dead_letters_app.command("retry")
def retry(
    txn_ids: Annotated[list[str] | None, typer.Argument(help="txn_id of each.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything that is parked as dead.")] = False,
    json: Json = False,
) -> None:
    """Try again as the author, then what waits behind it."""
    remote = _remote()
    chosen = list(txn_ids or [])
    if all_:
        chosen = [x["txn_id"] for x in operators.dead_letters(remote) if x["state"] == "dead"]
        if not chosen and not json:
            told("nothing is parked as dead")
    elif not chosen:
        raise typer.BadParameter("name a txn_id, or give --all")
    _show_results(operators.retry(remote, chosen), json)


@dead_letters_app.command("edit")
def edit(
    txn_id: Annotated[str, typer.Argument(help="txn_id of the transaction.")],
    set_: Annotated[
        list[str], typer.Option("--set", help="column=JSON value, such as status='\"active\"'.")
    ],
    op: Annotated[
        int | None, typer.Option(min=0, help="Which op, from 0; default: the refused one.")
    ] = None,
    json: Json = False,
) -> None:
    """Replace it by a transaction with other values; then retry that one."""
    verdict = operators.edit(_remote(), txn_id, _assignments(set_), op=op)
    if json:
        show_document(verdict)
    else:
        told(f"parked as {verdict['txn_id']}; now: syncer dead-letters retry {verdict['txn_id']}")


def _assignments(given: Sequence[str]) -> dict[str, Any]:
    changes = {}
    for text in given:
        column, separator, value = text.partition("=")
        try:
            changes[column] = orjson.loads(value)
        except orjson.JSONDecodeError:
            separator = ""
        if not separator or not column:
            raise typer.BadParameter(f"--set {column}=…: the value must be JSON, text in quotes")
    return changes


@dead_letters_app.command("discard")
def discard(
    txn_ids: TxnIds,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    json: Json = False,
) -> None:
    """Give it up for good: it never takes effect, and its values are deleted."""
    if not yes:
        typer.confirm(f"give up {len(txn_ids)} transaction(s) for good?", abort=True, err=True)
    _show_results(operators.discard(_remote(), txn_ids), json, good=(*DONE, "parked"))


# -- conflicts --


@conflicts_app.command("list")
def list_conflicts(
    undecided: Annotated[
        bool, typer.Option("--open", help="Only those that wait for a decision.")
    ] = False,
    user: User = None,
    json: Json = False,
) -> None:
    """List conflict records: automatic ones, decided ones, and those that wait for a decision."""
    found = operators.conflicts(_remote(), user_id=user, undecided=undecided)
    if json:
        show_document(found)
        return
    for record in found:
        columns = ", ".join(record["columns"]) or "the whole row"
        decided = f", decided: {record['resolution']}" if record["resolution"] else ""
        told(f"{record['id']}  {record['table']}/{record['row_id']}")
        told(f"    {columns}: {record['outcome']}{decided}, since {record['recorded_at'][:19]}")
    if not found:
        told("no conflict waits for a decision" if undecided else "no conflicts")


@conflicts_app.command("show")
def show_conflict(
    conflict_id: Annotated[str, typer.Argument(metavar="ID")], json: Json = False
) -> None:
    """Show a record: base, mine, theirs, what was done."""
    found = operators.conflicts(_remote(), conflict_id=conflict_id)
    if json:
        show_document(found)
    else:
        told(_pretty(found[0]) if found else f"there is no conflict {conflict_id}")
    raise typer.Exit(0 if found else EXIT_TROUBLE)


@conflicts_app.command("resolve")
def resolve(
    conflict_id: Annotated[str, typer.Argument(metavar="ID")],
    take: Annotated[str | None, typer.Option(help="mine or theirs.")] = None,
    row: Annotated[
        str | None, typer.Option(help="A third version: the columns to write, as JSON.")
    ] = None,
    json: Json = False,
) -> None:
    """Decide a conflict; what waits for it goes on."""
    if (take is None) == (row is None):
        raise typer.BadParameter("give either --take or --row")
    if row is not None:
        results = operators.resolve_edited(_remote(), conflict_id, _object(row))
    elif take in ("mine", "theirs"):
        results = operators.resolve(_remote(), conflict_id, cast("operators.Choice", take))
    else:
        raise typer.BadParameter("--take must be mine or theirs")
    _show_results(results, json)


def _object(text: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not found:
        raise typer.BadParameter("--row must be a JSON object of columns")
    return found


def _show_results(results: Sequence[Row], json: bool, good: Sequence[str] = DONE) -> None:
    if json:
        show_document(list(results))
    for result in () if json else results:
        blocker = result.get("blocked_by")
        why = result["message"] or (blocker and f"behind {blocker}")
        verdict = result["state"] or result["verdict"]
        told(f"{result['txn_id']}  {verdict}" + (f": {why}" if why else ""))
    raise typer.Exit(0 if all(r["verdict"] in good for r in results) else EXIT_TROUBLE)


def _pretty(record: Row) -> str:
    return orjson.dumps(record, option=orjson.OPT_INDENT_2).decode()

"""The real server behind the batch RPC, in the form the contract suite asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from local_store.ops import Row
from syncer.errors import ProtocolMismatch


class PostgresServer:
    """Calls the RPC as service_role on a direct connection; one database transaction per batch.

    PostgREST adds nothing to the verdicts (tests/contract/test_through_postgrest.py), so thousands
    of batches go without it.
    """

    def __init__(self, database_url: str) -> None:
        self._connection = psycopg.connect(database_url, autocommit=True, row_factory=dict_row)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def apply(self, p_batch: Row) -> Row:
        """Answer one batch."""
        return self._call("sync_apply_batch_v1", p_batch)

    def take(self, p: Row) -> Row:
        """Answer one call of the parking RPC."""
        return self._call("sync_park_v1", p)

    def retry(self, txn_ids: Sequence[str]) -> list[Row]:
        """Try parked transactions again."""
        return self._call("sync_retry_v1", {"txn_ids": list(txn_ids)})["results"]

    def discard(self, txn_ids: Sequence[str]) -> list[Row]:
        """Give parked transactions up."""
        return self._call("sync_discard_v1", {"txn_ids": list(txn_ids)})["results"]

    def edit_parked(
        self, txn_id: str, values: Mapping[str, Row], new_txn_id: str, digest: str
    ) -> list[Row]:
        """Replace a parked transaction by one with other values of some rows (`table/id`)."""
        listed = self._call("sync_list_parked_v1", {"txn_ids": [txn_id], "full": True})["parked"]
        ops = listed[0]["item"]["ops"] if listed else []
        asked = {
            "txn_id": txn_id,
            "new_txn_id": new_txn_id,
            "digest": digest,
            "ops": [
                {**op, "values": values.get(f"{op['table']}/{op['id']}", op["values"])}
                for op in ops
            ],
        }
        return self._call("sync_edit_v1", asked)["results"]

    def resolve(self, txn_id: str, name: str, choice: str, **edited: Any) -> list[Row]:
        """Decide a conflict record of a row, and the others of its transaction."""
        found = self._call("sync_list_conflicts_v1", {"txn_ids": [txn_id], "open": True})
        records = [r for r in found["conflicts"] if f"{r['table']}/{r['row_id']}" == name]
        if not records:
            raise ProtocolMismatch(f"nothing to decide: {txn_id} {name}")
        return self._call("sync_resolve_v1", {"id": records[0]["id"], "choice": choice, **edited})[
            "results"
        ]

    def _call(self, function: str, argument: Row) -> Row:
        statement = sql.SQL("select public.{}(%s) as reply").format(sql.Identifier(function))
        try:
            with self._connection.transaction():
                self._connection.execute("set local role service_role")
                found = self._connection.execute(statement, (Jsonb(argument),)).fetchone()
        except psycopg.Error as error:
            raise ProtocolMismatch(f"{error.sqlstate}: {error}") from error
        assert found is not None
        return found["reply"]

    def edit(self, table: str, row_id: str, **values: Any) -> None:
        """Change a row as the table's owner, if it is there."""
        for column, value in values.items():
            stored = Jsonb(value) if isinstance(value, dict) else value
            self._connection.execute(
                sql.SQL("update public.{} set {} = %s where id = %s").format(
                    sql.Identifier(table), sql.Identifier(column)
                ),
                (stored, row_id),
            )

    def version(self, table: str, row_id: str) -> str | None:
        """Return a row's version in the form the RPC uses."""
        found = self._connection.execute(
            sql.SQL(
                "select to_json(updated_at) #>> '{{}}' as v from public.{} where id = %s"
            ).format(sql.Identifier(table)),
            (row_id,),
        ).fetchone()
        return None if found is None else found["v"]

    def row(self, table: str, row_id: str) -> Row | None:
        """Return a row, None when there is none."""
        statement = sql.SQL("select to_jsonb(t) as r from public.{} t where id = %s")
        found = self._connection.execute(
            statement.format(sql.Identifier(table)), (row_id,)
        ).fetchone()
        return None if found is None else found["r"]

    def rows(self, table: str, columns: tuple[str, ...]) -> dict[str, Row]:
        """Return every row of a table by id, with these columns."""
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        found = self._connection.execute(
            sql.SQL("select id::text, user_id::text, {} from public.{}").format(
                names, sql.Identifier(table)
            )
        ).fetchall()
        return {row.pop("id"): row for row in found}

    def ledger(self) -> dict[str, int]:
        """Return the seq of every transaction in the ledger."""
        found = self._connection.execute("select txn_id::text, seq from sync.ledger").fetchall()
        return {row["txn_id"]: row["seq"] for row in found}

    def parked(self) -> dict[str, tuple[str, Row]]:
        """Return the state and the content of every parked transaction."""
        found = self._connection.execute(
            "select txn_id::text, state, item from sync.parked"
        ).fetchall()
        return {row["txn_id"]: (row["state"], row["item"]) for row in found}

    def records(self) -> dict[tuple[str, str, str, str], list[tuple[list[str], str | None]]]:
        """Return the columns and resolutions of every conflict record."""
        found = self._connection.execute(
            "select txn_id::text, table_name, row_id, outcome, columns, resolution"
            " from sync.conflicts order by recorded_at"
        ).fetchall()
        records: dict[tuple[str, str, str, str], list[tuple[list[str], str | None]]] = {}
        for row in found:
            key = (row["txn_id"], row["table_name"], row["row_id"], row["outcome"])
            records.setdefault(key, []).append((row["columns"], row["resolution"]))
        return records

"""The real server behind the batch RPC, in the form the contract suite asks."""

from __future__ import annotations

from collections.abc import Sequence
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

    def ledger(self) -> set[tuple[str, int]]:
        """Return (txn_id, seq) of every ledger row."""
        found = self._connection.execute("select txn_id::text, seq from sync.ledger").fetchall()
        return {(row["txn_id"], row["seq"]) for row in found}

    def parked(self) -> dict[str, str]:
        """Return the state of every parked transaction."""
        found = self._connection.execute("select txn_id::text, state from sync.parked").fetchall()
        return {row["txn_id"]: row["state"] for row in found}

"""The counting at the end of a drill: clients' promises against what stands in the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import psycopg

from local_store.ops import user_uuid
from syncer.sessions.tables import SESSION_TABLES
from syncer.testkit.local_supabase import LocalSupabase
from syncer.testkit.traffic import Script

_CHILDREN = """
    SELECT s.id::text, s.status, s.revision_count, s.hole_count,
      (SELECT count(*) FROM public.session_revisions r WHERE r.session_id = s.id),
      (SELECT count(*) FROM public.session_drafts d WHERE d.session_id = s.id),
      (SELECT count(*) FROM public.hole_resolutions h WHERE h.session_id = s.id)
    FROM public.sessions s
"""


def compare_with_clients(
    connection: psycopg.Connection[Any], scripts: Sequence[Script]
) -> tuple[int, int]:
    """Return (lost, duplicated) rows: what clients were promised against what stands there."""
    found = {row[0]: row for row in connection.execute(_CHILDREN)}
    lost = duplicated = 0
    for script in scripts:
        row = found.pop(script.session_id, None)
        if script.status == "deleted":
            duplicated += row is not None
        elif row is None:
            lost += 1
        else:
            expected = (1 + script.resolved, 1 + script.resolved, script.resolved)
            for promised, there in zip(expected, row[4:7], strict=True):
                lost += max(0, promised - there)
                duplicated += max(0, there - promised)
            lost += row[1] != script.status
    return lost, duplicated + len(found)


def counter_mismatches(connection: psycopg.Connection[Any]) -> int:
    """Count sessions whose counters differ from a recount of their children."""
    found = connection.execute(
        "SELECT count(*) FROM public.sessions s WHERE"
        " s.revision_count <> (SELECT count(*) FROM public.session_revisions r"
        "   WHERE r.session_id = s.id) OR"
        " s.hole_count <> (SELECT count(*) FROM public.hole_resolutions h"
        "   WHERE h.session_id = s.id AND NOT h.applied)"
    ).fetchone()
    return int(found[0]) if found else 0


def cross_user_rows(stack: LocalSupabase, tokens: dict[str, str]) -> int:
    """Count rows that a user's own token, or none, can read and that belong to somebody else."""
    strangers = 0
    everyone = [*tokens.items(), ("nobody", stack.anon_key)]
    with httpx.Client(base_url=f"{stack.url}/rest/v1", timeout=30.0) as http:
        for user, token in everyone:
            headers = {"apikey": stack.anon_key, "Authorization": f"Bearer {token}"}
            for table in [spec.name for spec in SESSION_TABLES]:
                reply = http.get(f"/{table}?select=user_id", headers=headers)
                rows = reply.json() if reply.status_code == 200 else []
                strangers += sum(row["user_id"] != user_uuid(user) for row in rows)
    return strangers


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 of `samples`, rounded to 0.01."""
    ordered = sorted(samples) or [0.0]
    return {
        "p50": round(ordered[len(ordered) // 2], 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
    }

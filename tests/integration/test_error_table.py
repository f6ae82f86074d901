"""Lines of the error table that real PostgREST and Postgres can be made to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jwt
import psycopg
import pytest

from syncer.errors import (
    BatchTooLarge,
    NotAuthorized,
    ProtocolMismatch,
    RemoteUnavailable,
    ReplyTimedOut,
    ReplyUnreadable,
    SyncError,
    Throttled,
    TookTooLong,
)
from syncer.remote import SupabaseRemote
from syncer.testkit.faults import BlackHole, Cut, Refuse, canned
from syncer.testkit.local_supabase import LocalSupabase

PROVOKED = {
    "42P01": ProtocolMismatch,
    "42703": ProtocolMismatch,
    "42883": ProtocolMismatch,
    "22P02": BatchTooLarge,
    "22003": BatchTooLarge,
    "21000": BatchTooLarge,
    "25006": RemoteUnavailable,
    "53100": RemoteUnavailable,
    "53300": Throttled,
    "57P01": RemoteUnavailable,
    "08006": RemoteUnavailable,
    "28000": NotAuthorized,
    "40P01": Throttled,
    "55P03": Throttled,
    "42501": NotAuthorized,
    "SYP01": ProtocolMismatch,
    "XX000": ReplyUnreadable,
}


@pytest.fixture(scope="module")
def stack() -> Iterator[LocalSupabase]:
    """A Supabase of its own: with a function that fails as it is told."""
    with LocalSupabase.start() as made:
        with psycopg.connect(made.database_url, autocommit=True) as sql:
            sql.execute(
                "create function public.fail_v1(p jsonb) returns jsonb language plpgsql as $$"
                " begin raise exception 'as told' using errcode = p ->> 'code'; end $$;"
                "create function public.sleep_v1(p jsonb) returns jsonb language plpgsql"
                " set statement_timeout = '50ms' as $$"
                " begin perform pg_sleep(5); return '{}'; end $$;"
                "notify pgrst, 'reload schema'"
            )
        remote = SupabaseRemote(made.url, made.secret_key)
        for _ in range(200):  # the cache reloads in its own time
            try:
                remote.operate("fail_v1", {"code": "XX000"})
            except ReplyUnreadable:
                break
            except SyncError:
                continue
        remote.close()
        yield made


@pytest.fixture
def remote(stack: LocalSupabase) -> Iterator[SupabaseRemote]:
    made = SupabaseRemote(stack.url, stack.secret_key)
    yield made
    made.close()


@pytest.mark.parametrize(("code", "error"), PROVOKED.items())
def test_a_code_from_postgres_arrives_through_postgrest_as_its_class(
    remote: SupabaseRemote, code: str, error: type[SyncError]
):
    with pytest.raises(SyncError) as raised:
        remote.operate("fail_v1", {"code": code})
    assert type(raised.value) is error
    assert "as told" not in str(raised.value)


def test_a_statement_timeout_asks_for_less(remote: SupabaseRemote):
    with pytest.raises(TookTooLong, match="57014"):
        remote.operate("sleep_v1", {})


def test_a_missing_function_is_the_schemas_fault(remote: SupabaseRemote):
    with pytest.raises(ProtocolMismatch, match="PGRST202"):
        remote.operate("no_such_function_v1", {})


def test_a_nul_spoils_the_whole_call(remote: SupabaseRemote):
    with pytest.raises(BatchTooLarge, match="22P05"):
        remote.operate("sync_audit_v1", {"log_id": "a\u0000b"})


@pytest.mark.parametrize("broken", ["anon", "forged", "expired"])
def test_a_key_that_is_not_the_secret_one_pauses(stack: LocalSupabase, broken: str):
    keys = {
        "anon": stack.anon_key,
        "forged": jwt.encode({"role": "service_role"}, "x" * 40),
        "expired": jwt.encode({"role": "service_role", "exp": 1}, stack.jwt_secret),
    }
    remote = SupabaseRemote(stack.url, keys[broken])
    with pytest.raises(NotAuthorized) as raised:
        remote.audit()
    assert keys[broken] not in str(raised.value)
    remote.close()


def test_nobody_listening_means_nothing_was_sent(stack: LocalSupabase, fault_proxy: Any):
    remote = SupabaseRemote(fault_proxy.url, stack.secret_key)
    fault_proxy.set(Refuse())
    with pytest.raises(RemoteUnavailable):
        remote.audit()
    remote.close()


def test_silence_and_a_cut_reply_prove_nothing(fault_proxy: Any, fresh_supabase: LocalSupabase):
    remote = SupabaseRemote(fault_proxy.url, fresh_supabase.secret_key)
    fault_proxy.next(Cut("after"))
    with pytest.raises(ReplyUnreadable):
        remote.audit()
    fault_proxy.next(BlackHole())
    with pytest.raises(ReplyTimedOut):
        remote.read("00000000-0000-0000-0000-000000000000", [], timeout_s=0.3)
    remote.close()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("429", Throttled),
        ("429_retry_after", Throttled),
        ("503_retry_after", Throttled),
        ("503_html", RemoteUnavailable),
        ("500_html", ReplyUnreadable),
        ("520_html", ReplyUnreadable),
        ("530_json", ReplyUnreadable),
        ("540_json", ReplyUnreadable),
        ("544_nothing", ReplyUnreadable),
        ("556_html", ReplyUnreadable),
        ("400_no_code", ReplyUnreadable),
        ("302", ReplyUnreadable),
        ("308", ReplyUnreadable),
        ("200_html", ReplyUnreadable),
        ("200_empty", ReplyUnreadable),
        ("200_broken_json", ReplyUnreadable),
        ("200_wrong_shape", ReplyUnreadable),
    ],
)
def test_a_recorded_gateway_reply_is_read_for_what_it_proves(
    fault_proxy: Any, fresh_supabase: LocalSupabase, name: str, error: type[SyncError]
):
    remote = SupabaseRemote(fault_proxy.url, fresh_supabase.secret_key)
    fault_proxy.next(canned(name))
    with pytest.raises(SyncError) as raised:
        remote.audit()
    assert type(raised.value) is error
    remote.close()

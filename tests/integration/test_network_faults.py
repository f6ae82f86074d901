"""What goes wrong between here and a real Supabase, as the flusher meets it: P1, P2, P3, P10."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from syncer.core.breaker import Breaker
from syncer.flusher import FlushLimits
from syncer.remote import SupabaseRemote
from syncer.testkit.fault_proxy import FaultProxy
from syncer.testkit.faults import (
    BlackHole,
    Cut,
    Delay,
    DeliverLate,
    Drip,
    Duplicate,
    Fault,
    Refuse,
    Throttle,
    Truncate,
    canned,
)
from syncer.testkit.local_supabase import LocalSupabase
from tests.integration.server_world import RPC, World, through

DEADLINE_S = 0.3  # far above a call here, far below patience
DAY_S = 86_400.0
PER_DAY = 100_000
OUTAGE_TRANSACTIONS = int(os.environ.get("OUTAGE_TRANSACTIONS", "1000"))


@pytest.fixture
def world(
    fresh_supabase: LocalSupabase, tmp_path: Path, fault_proxy: FaultProxy
) -> Iterator[World]:
    made = World(fresh_supabase, tmp_path, fault_proxy)
    made.write()
    made.pass_once()
    yield made
    made.close()


def by_way_of(world: World, url: str, passes: int = 4) -> None:
    """Pass with an address that leads nowhere; afterwards the right one is set again."""
    away = SupabaseRemote(url, world.stack.secret_key, deadline_s=10.0)
    right, world.flusher = world.flusher, world.flusher_for(away)
    try:
        through(world, "auth" if url.startswith("https://127") else "outage", passes)
    finally:
        world.flusher = right
        away.close()


LOST = [
    Cut("before"),
    Cut("before", "close"),
    Cut("in", request_bytes=40),
    Cut("in", "close", request_bytes=400),
    Cut("after"),
    Cut("after", "close"),
    Truncate(20),
    Truncate(200, "reset"),
    BlackHole(),
    Delay(3 * DEADLINE_S),
    Delay(3 * DEADLINE_S, "after"),
    Drip(0.05),
    DeliverLate(after_newer=1),
    DeliverLate(after_newer=3),
    DeliverLate(after_newer=None, after_s=2 * DEADLINE_S, how="hang"),
]


@pytest.mark.parametrize("fault", LOST, ids=repr)
def test_a_call_that_is_lost_anywhere_on_its_way_is_made_again_without_a_second_effect(
    world: World, fault: Fault
):
    remote = SupabaseRemote(world.proxy.url, world.stack.secret_key, deadline_s=DEADLINE_S)
    world.flusher = world.flusher_for(remote)
    world.write()
    world.proxy.next(fault, matching=RPC)
    report = world.pass_once()
    assert (report.stopped, report.applied, report.rejected) == ("outage", 0, 0)
    world.write()
    world.recover()
    world.proxy.deliver_held()
    world.recover()
    remote.close()


@pytest.mark.parametrize("fault", [Duplicate(), Duplicate("second", at_once=True)], ids=repr)
def test_a_call_that_arrives_twice_has_one_effect(world: World, fault: Fault):
    world.write()
    world.proxy.next(fault, matching=RPC)
    report = world.pass_once()
    assert (report.rejected, report.merged, report.held) == (0, 0, 0)
    world.recover()


def test_a_slow_line_is_no_outage(world: World):
    world.write()
    world.proxy.next(Throttle(bytes_per_s=5_000), matching=RPC)
    assert world.pass_once().stopped == "budget"
    world.recover()


def test_a_flapping_line_loses_nothing_and_delivers_whenever_it_is_up(world: World):
    for _ in range(6):
        world.proxy.set(Refuse())
        through(world, "outage", passes=1)
        world.proxy.clear()
        assert world.pass_once().applied > 0
    world.recover()


def test_a_name_that_leads_nowhere_is_an_outage_that_ends_by_itself(world: World):
    by_way_of(world, "http://nowhere.invalid")
    world.recover()


# -- TLS --


@contextmanager
def listening(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that lets `talk` speak with each client; its https address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, suppress(OSError):
                        talk(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)  # noqa: TID251  a certificate is judged by the real clock
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = folder / "certificate.pem"
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(certificate.public_bytes(pem) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_a_certificate_that_nobody_vouches_for_gets_no_key_and_no_row(world: World, tmp_path: Path):
    context, heard = self_signed(tmp_path), []

    def talk(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secure:
            heard.append(secure.recv(1))

    with listening(talk) as url:
        by_way_of(world, url)
    assert heard == []
    world.recover()


def test_a_server_that_speaks_no_tls_gets_no_key_and_no_row(world: World):
    heard = []

    def talk(client: socket.socket) -> None:
        heard.append(client.recv(65_536))
        client.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    with listening(talk) as url:
        by_way_of(world, url)
    assert heard
    assert world.stack.secret_key.encode() not in b"".join(heard)
    world.recover()


def test_a_line_cut_in_the_handshake_is_an_outage(world: World):
    def talk(client: socket.socket) -> None:
        client.recv(16)

    with listening(talk) as url:
        by_way_of(world, url.replace("127.0.0.1", "localhost"))
    world.recover()


# -- a long outage --


def test_an_outage_of_a_day_costs_few_probes_and_is_drained_whole_and_in_order(world: World):
    """The first OUTAGE_TRANSACTIONS of a day of PER_DAY, the day passing on the buffer's clock."""
    world.proxy.set(canned("503_html"), matching=RPC)
    before_s, calls_before = world.clock.monotonic(), len(world.proxy.log)
    for _ in range(OUTAGE_TRANSACTIONS // 2):
        world.write()  # two transactions
        world.clock.advance(2 * DAY_S / PER_DAY)
        assert world.flusher.flush_once().stopped == "outage"
    lasted_s, calls = world.clock.monotonic() - before_s, len(world.proxy.log) - calls_before
    assert world.store.stats()["pending"] == OUTAGE_TRANSACTIONS
    assert 3 < calls <= lasted_s / FlushLimits().breaker_interval_s + Breaker(1.0).failures_max
    world.proxy.clear()
    world.recover()

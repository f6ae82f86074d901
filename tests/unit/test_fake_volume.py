"""The fake Volume is as strict as Modal's: each rule that our code leans on."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from local_store.clock import ManualClock
from local_store.segment_files import load, scan, write_file
from syncer.testkit.fake_volume import CommitFault, FakeMount, FakeVolume, VolumeError
from tests.unit.segment_samples import KEY, sealed


@pytest.fixture
def volume(tmp_path: Path) -> FakeVolume:
    return FakeVolume(tmp_path)


def put(mount: FakeMount, path: str, text: str) -> None:
    (mount.folder / path).parent.mkdir(parents=True, exist_ok=True)
    (mount.folder / path).write_text(text)


def shown(mount: FakeMount) -> dict[str, str]:
    files = [path for path in mount.folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(mount.folder)): path.read_text() for path in files}


def committed(volume: FakeVolume) -> dict[str, str]:
    return {path: data.decode() for path, data in volume.files().items()}


class Looking(ManualClock):
    """A clock whose sleep does what the test wants to happen meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile = lambda _seconds: None

    def sleep(self, seconds: float) -> None:
        self.meanwhile(seconds)
        super().sleep(seconds)


def test_nothing_is_seen_before_the_writers_commit_and_the_readers_reload(volume: FakeVolume):
    api, worker = volume.host("api"), volume.host("worker")
    put(api, "a/b", "1")
    worker.reload()
    assert shown(worker) == {}
    api.commit()
    assert shown(worker) == {}
    worker.reload()
    assert shown(worker) == {"a/b": "1"}
    assert shown(volume.host("late")) == {"a/b": "1"}


def test_a_host_that_dies_loses_what_it_had_not_committed(volume: FakeVolume):
    api = volume.host("api")
    put(api, "kept", "1")
    api.commit()
    put(api, "lost", "1")
    api.die()
    assert not api.folder.exists()
    assert committed(volume) == {"kept": "1"}
    for call in (api.commit, api.reload, api.background_commit, api.observe):
        with pytest.raises(VolumeError, match="dead"):
            call()


def test_the_last_commit_of_a_file_wins_as_a_whole_and_others_files_stay(volume: FakeVolume):
    one, two = volume.host("one"), volume.host("two")
    put(one, "same", "from one, longer")
    put(one, "own", "1")
    put(two, "same", "from two")
    one.commit()
    two.commit()
    assert committed(volume) == {"same": "from two", "own": "1"}
    assert shown(two) == {"same": "from two", "own": "1"}  # a commit reloads too
    one.commit()  # with nothing new: it doesn't bring its own back
    assert shown(one)["same"] == "from two"


def test_a_change_of_the_same_length_at_the_same_moment_is_committed(volume: FakeVolume):
    api = volume.host("api")
    for text in "0123456789":
        put(api, "a", text)
        api.commit()
        assert committed(volume) == {"a": text}


def test_deletions_are_committed_and_may_come_back(volume: FakeVolume):
    api, worker = volume.host("api"), volume.host("worker")
    put(api, "a", "1")
    put(api, "b", "1")
    api.commit()
    worker.reload()
    (worker.folder / "a").unlink()
    (worker.folder / "b").unlink()
    worker.commit()
    assert committed(volume) == {}
    put(api, "b", "2")
    api.commit()
    assert shown(api) == {"b": "2"}
    assert volume.resurrect() == ["a"]
    worker.reload()
    assert shown(worker) == {"a": "1", "b": "2"}


def test_a_reload_fails_while_this_process_has_something_open_there(volume: FakeVolume):
    api = volume.host("api")
    other = volume.host("api-2")  # its path begins alike
    put(api, "a", "1")
    api.commit()
    with open(api.folder / "a"):
        with pytest.raises(VolumeError, match="open files"):
            api.reload()
    put(other, "a", "1")
    with open(other.folder / "a"):
        api.reload()
    descriptor = os.open(api.folder, os.O_RDONLY)
    with pytest.raises(VolumeError, match="open files"):
        api.reload()
    os.close(descriptor)
    with api.held_open(), pytest.raises(VolumeError, match="open files"):
        api.reload()
    where = os.getcwd()
    os.chdir(api.folder)
    try:
        with pytest.raises(VolumeError, match="open files"):
            api.reload()
    finally:
        os.chdir(where)
    api.reload()
    assert shown(api) == {"a": "1"}


def test_a_commit_with_open_files_takes_effect_and_raises(volume: FakeVolume):
    api = volume.host("api")
    put(api, "a", "1")
    with api.held_open(), pytest.raises(VolumeError, match="open files"):
        api.commit()
    assert committed(volume) == {"a": "1"}


def test_the_mount_looks_empty_during_a_reload_and_swallows_what_is_written(tmp_path: Path):
    clock = Looking()
    volume = FakeVolume(tmp_path, clock=clock)
    api = volume.host("api")
    put(api, "a", "1")
    api.commit()
    looks: list[tuple[float, dict[str, str]]] = []

    def meanwhile(seconds: float) -> None:
        looks.append((seconds, shown(api)))
        put(api, "b", "swallowed")
        assert api.background_commit(0) == 0
        api.observe()

    clock.meanwhile = meanwhile
    api.reload_s = 3.0
    api.reload()
    assert looks == [(3.0, {})]
    assert clock.monotonic() == 3.0
    clock.meanwhile = lambda _seconds: None
    assert shown(api) == {"a": "1"}
    api.commit()
    assert committed(volume) == {"a": "1"}


def test_what_was_not_committed_before_a_reload_is_committed_or_lost_by_seed(tmp_path: Path):
    outcomes = set()
    for seed in range(10):
        volume = FakeVolume(tmp_path / str(seed), seed=seed)
        api = volume.host("api")
        put(api, "a", "1")
        api.reload()
        assert shown(api) == committed(volume)
        outcomes.add("a" in committed(volume))
    assert outcomes == {True, False}


def test_commits_fail_as_scripted_and_lose_nothing_by_it(volume: FakeVolume):
    api = volume.host("api")
    put(api, "a", "1")
    api.faults(CommitFault(error="504"), CommitFault(error="gone", takes_effect=True))
    with pytest.raises(VolumeError, match="504"):
        api.commit()
    assert committed(volume) == {}
    with pytest.raises(VolumeError, match="gone"):
        api.commit()
    assert committed(volume) == {"a": "1"}
    api.commit()
    assert api.commits == 3


def test_a_slow_commit_holds_what_was_there_when_it_began(tmp_path: Path):
    clock = Looking()
    volume = FakeVolume(tmp_path, clock=clock)
    api = volume.host("api")
    put(api, "a", "1")
    api.faults(CommitFault(delay_s=5.0, error="504", takes_effect=True))
    clock.meanwhile = lambda _seconds: put(api, "late", "1")
    with pytest.raises(VolumeError, match="504"):
        api.commit()
    assert clock.monotonic() == 5.0
    assert committed(volume) == {"a": "1"}


def test_a_host_that_dies_during_its_commit_has_not_committed(tmp_path: Path):
    clock = Looking()
    volume = FakeVolume(tmp_path, clock=clock)
    api = volume.host("api")
    put(api, "a", "1")
    clock.meanwhile = lambda _seconds: api.die()
    with pytest.raises(VolumeError, match="dead"):
        api.commit()
    assert committed(volume) == {}


def test_more_than_five_commits_at_once_are_refused(tmp_path: Path):
    class Meeting(ManualClock):
        """Five commits meet in their sleep, and stay until the test lets go."""

        def sleep(self, seconds: float) -> None:
            if seconds:
                met.wait()
                go.wait()

    met, go = threading.Barrier(6, timeout=30), threading.Event()
    volume = FakeVolume(tmp_path, clock=Meeting())
    hosts = [volume.host(str(number)) for number in range(6)]
    for host in hosts[:5]:
        host.faults(CommitFault(delay_s=1.0))
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(host.commit) for host in hosts[:5]]
        met.wait()
        try:
            with pytest.raises(VolumeError, match="more than 5"):
                hosts[5].commit()
        finally:
            go.set()
        assert [item.result() for item in running] == [None] * 5
    assert hosts[5].commits == 0
    hosts[5].commit()


def test_a_background_commit_takes_any_prefix_of_the_observed_steps(tmp_path: Path):
    seen = []
    for prefix in range(4):
        volume = FakeVolume(tmp_path / str(prefix))
        api = volume.host("api")
        put(api, "a.tmp", "hal")
        api.observe()
        put(api, "a.tmp", "half")
        api.observe()
        (api.folder / "a.tmp").rename(api.folder / "a")
        api.observe()
        assert api.steps == 3
        assert api.background_commit(prefix) == prefix
        seen.append(committed(volume))
        api.commit()  # the rest
        assert committed(volume) == {"a": "half"}
    assert seen == [{}, {"a.tmp": "hal"}, {"a.tmp": "half"}, {"a": "half"}]


def test_changes_that_nobody_observed_are_taken_in_any_order(tmp_path: Path):
    seen = set()
    for seed in range(40):
        volume = FakeVolume(tmp_path / str(seed), seed=seed)
        api = volume.host("api")
        put(api, "old", "1")
        api.commit()
        (api.folder / "old").rename(api.folder / "new")
        api.background_commit()
        seen.add(frozenset(committed(volume)))
    assert seen == {frozenset(it) for it in (["old"], [], ["old", "new"], ["new"])}


def test_a_segment_is_whole_or_absent_in_every_background_commit_of_its_writing(tmp_path: Path):
    segment = sealed(1, 2)
    rehearsal = FakeVolume(tmp_path / "rehearsal").host("api")
    write_file(rehearsal.folder, segment, rehearsal.calls)
    assert rehearsal.steps > 5
    found = []
    for prefix in range(rehearsal.steps + 1):
        volume = FakeVolume(tmp_path / str(prefix))
        api = volume.host("api")
        write_file(api.folder, segment, api.calls)
        api.background_commit(prefix)
        api.die()
        worker = volume.host("worker")
        names = list(scan(worker.folder))
        for name in names:
            assert name == segment.name
            load(worker.folder, segment.name, [KEY], environment="prod")
        found.append(len(names))
    assert found == [0] * rehearsal.steps + [1]


def test_a_writer_without_a_temporary_name_is_found_out(tmp_path: Path):
    """What the fake is for: the defence removed, the fault shows."""
    segment = sealed(1, 2)
    api = FakeVolume(tmp_path).host("api")
    calls = api.calls
    path = api.folder / segment.name.path
    path.parent.mkdir(parents=True)
    descriptor = calls.open(path, os.O_WRONLY | os.O_CREAT)
    left = memoryview(segment.data)
    while left:
        left = left[calls.write(descriptor, left) :]
    os.close(descriptor)
    api.background_commit(api.steps - 1)
    worker = api._volume.host("worker")
    [name] = scan(worker.folder)
    with pytest.raises(Exception, match="ends after"):
        load(worker.folder, segment.name, [KEY], environment="prod")
    assert name == segment.name


def test_the_same_seed_gives_the_same_history(tmp_path: Path):
    def history(run: str) -> list[object]:
        volume = FakeVolume(tmp_path / run, seed=11)
        api = volume.host("api")
        found: list[object] = []
        for number in range(10):
            put(api, f"f{number}", "1")
            put(api, f"g{number}", "1")
            found += [api.background_commit(), sorted(volume.files())]
        return found

    assert history("one") == history("two")

"""Files that are put back under open connections: these must see them as whoever opens them."""

from __future__ import annotations

import os
from pathlib import Path

from local_store import Insert, LocalStore, opening
from local_store.clock import new_id
from tests.simulation.files import Handles, image_of, restore
from tests.unit.history_world import ANN, TABLES


def opened(folder: Path, handles: Handles) -> LocalStore:
    with handles.handed_down(folder):
        return LocalStore.open(folder, tables=TABLES)


def write(store: LocalStore, text: str) -> None:
    store.write([Insert("notes", {"id": new_id(), "text": text})], user_id=ANN)


def texts(store: LocalStore) -> list[str]:
    return sorted(row["text"] for row in store.select("notes", user_id=ANN))


def end(store: LocalStore, folder: Path, handles: Handles) -> None:
    handles.take_from(store, folder)
    store.close()


def test_connections_see_each_file_that_is_put_back_under_them(tmp_path: Path):
    handles = Handles()
    store = opened(tmp_path, handles)
    empty = image_of(tmp_path)
    write(store, "one")
    one = image_of(tmp_path)
    write(store, "two")
    for image, seen in [(one, ["one"]), (empty, []), (one, ["one"])]:
        end(store, tmp_path, handles)
        restore(tmp_path, image)
        store = opened(tmp_path, handles)
        assert texts(store) == seen
        assert not any(store.damage().values())
    store.close()


def test_a_reader_forgets_pages_whose_log_is_as_empty_as_the_next_one(tmp_path: Path):
    handles = Handles()
    store = LocalStore.open(tmp_path, tables=TABLES)
    store.close()
    empty = image_of(tmp_path)
    store = LocalStore.open(tmp_path, tables=TABLES)
    for number in range(20):
        write(store, f"{number}")
    store.close()  # all of it is in the file, nothing in the log
    full = image_of(tmp_path)
    restore(tmp_path, empty)
    store = opened(tmp_path, handles)
    for image, count in [(full, 20), (empty, 0), (full, 20)]:
        end(store, tmp_path, handles)
        restore(tmp_path, image)
        reader, writer = handles._left[tmp_path]
        with handles.handed_down(tmp_path):
            assert opening.connect(tmp_path / opening.FILE_NAME) is writer
            assert opening.connect(tmp_path / opening.FILE_NAME, readonly=True) is reader
            for connection in (writer, reader):
                found = connection.execute("SELECT count(*) FROM op_log").fetchone()
                assert found == (count,)
        handles._left[tmp_path] = [reader, writer]
        store = opened(tmp_path, handles)
    store.close()


def test_connections_with_an_open_cursor_are_closed_instead(tmp_path: Path):
    handles = Handles()
    store = opened(tmp_path, handles)
    write(store, "one")
    write(store, "two")
    reader = store._file._reader
    assert reader is not None
    cursor = reader.execute("SELECT position FROM op_log ORDER BY position")
    assert cursor.fetchone() is not None
    end(store, tmp_path, handles)
    assert not handles._left
    assert os.path.exists(tmp_path / opening.FILE_NAME)


def test_connections_to_a_file_that_was_replaced_are_closed_instead(tmp_path: Path):
    handles = Handles()
    store = opened(tmp_path, handles)
    os.rename(tmp_path / opening.FILE_NAME, tmp_path / "moved.db")
    end(store, tmp_path, handles)
    assert not handles._left

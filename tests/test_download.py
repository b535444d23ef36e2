"""Downloads from a server of our own: whole or not at all, checked, and one line when something is wrong."""

import errno
import fcntl
import hashlib
import http.server
import os
import re
import threading
import zipfile

import pytest

from kdsr_jax.data.sources import archives, download
from kdsr_jax.data.sources.download import Archive
from kdsr_jax.errors import UserError

CONTENT = bytes(range(256)) * 4000  # a megabyte, so that more than one block comes


class Server:
    """A server on this machine; `content` is what it gives for any path, `claimed` the length it announces."""

    def __init__(self):
        self.content, self.claimed, self.status, self.requests, self.slow = CONTENT, None, 200, [], None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                self.send_response(outer.status)
                if outer.claimed is not False:
                    self.send_header("Content-Length", str(outer.claimed or len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data/a.zip"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    """A running server."""
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of downloads, in a cache folder of its own; no proxy stands between."""
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "downloads"


def sha256(content=CONTENT):
    return hashlib.sha256(content).hexdigest()


def refused(archive) -> str:
    """Return the one line that a failing download gives."""
    with pytest.raises(UserError) as caught:
        download.fetch(archive)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("claimed", [None, False], ids=["length", "no-length"])
def test_a_download_is_kept(server, folder, claimed, capfd):
    server.claimed = claimed
    archive = Archive(server.url, len(CONTENT), sha256())
    for _ in range(2):
        assert download.fetch(archive).read_bytes() == CONTENT
    assert server.requests == ["/data/a.zip"] and visible(folder) == ["a.zip"]
    assert capfd.readouterr().out == "", "stdout is for results"


def test_the_digest_of_the_first_download_is_recorded_and_holds(server, folder):
    archive = Archive(server.url)
    path = download.fetch(archive)
    assert (folder / "a.zip.sha256").read_text() == f"{sha256()}  a.zip\n"
    path.unlink()
    server.content = CONTENT[::-1]
    assert f"its sha256 is {sha256(server.content)}, not {sha256()}, which" in refused(archive)
    assert visible(folder) == ["a.zip.sha256"]
    (folder / "a.zip.sha256").unlink()
    assert download.fetch(archive).read_bytes() == server.content


@pytest.mark.parametrize("registered", [True, False])
def test_a_file_that_was_damaged_later_is_refused(server, folder, registered):
    archive = Archive(server.url, None, sha256() if registered else None)
    path = download.fetch(archive)
    path.write_bytes(CONTENT[:-1])
    assert f"{path}: damaged or not the original" in refused(archive)


@pytest.mark.parametrize(
    ("change", "archive", "message"),
    [
        ({}, {"sha256": "0" * 64}, f"its sha256 is {sha256()}, not {'0' * 64}, which is registered for it"),
        ({}, {"size": len(CONTENT) + 1}, "1,024,000 bytes came, not the 1,024,001 registered"),
        ({}, {"size": 10}, "more than 10 bytes came"),
        ({"claimed": len(CONTENT) + 5}, {}, "cut short, 1,024,000 of 1,024,005 bytes came; try again"),
        ({"status": 404}, {}, "cannot be downloaded (HTTP Error 404: Not Found)"),
        ({"status": 503}, {"sha256": sha256()}, "cannot be downloaded (HTTP Error 503: Service Unavailable)"),
    ],
)
def test_a_bad_download_leaves_nothing_behind(server, folder, change, archive, message):
    vars(server).update(change)
    line = refused(Archive(server.url, **archive))
    assert (
        line.startswith(f"{server.url}: {message}") and "a.zip by hand" in line and "--config.data.manual_dir" in line
    )
    assert visible(folder) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.zip", "http://kdsr.invalid/a.zip"])
def test_offline_is_one_line_that_says_what_to_fetch(folder, url):
    line = refused(Archive(url))
    assert line.startswith(f"{url}: cannot be downloaded (") and line.endswith("--config.data.manual_dir=FOLDER")
    assert visible(folder) == []


def test_what_a_killed_download_left_is_overwritten(server, folder):
    folder.mkdir(parents=True)
    (folder / "a.zip.part").write_bytes(b"x" * 2 * len(CONTENT))
    assert download.fetch(Archive(server.url)).read_bytes() == CONTENT
    assert visible(folder) == ["a.zip", "a.zip.sha256"]


def test_two_downloads_at_once_are_one(server, folder):
    folder.mkdir(parents=True)
    archive, paths = Archive(server.url), []
    with open(folder / ".a.zip.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threads = [threading.Thread(target=lambda: paths.append(download.fetch(archive))) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert server.requests == []
        fcntl.flock(lock, fcntl.LOCK_UN)
        for thread in threads:
            thread.join(timeout=30)
    assert len(paths) == 3 and server.requests == ["/data/a.zip"]


def test_a_server_that_falls_silent(server, folder, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    waiting = threading.Event()
    monkeypatch.setattr(server.server.RequestHandlerClass, "end_headers", lambda self: waiting.wait(2))
    line = refused(Archive(server.url))
    waiting.set()
    assert "cannot be downloaded (timed out)" in line and visible(folder) == []


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "file" / "below"))
    line = refused(Archive(server.url))
    assert "cannot be written (Not a directory)" in line and "$KDSR_CACHE" in line


def test_a_full_disk(server, folder, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_receive", full)
    line = refused(Archive(server.url))
    assert "cannot be written (No space left on device)" in line and visible(folder) == []


def test_a_file_put_there_by_hand(tmp_path):
    archive = Archive("http://kdsr.invalid/b.json.gz", None, sha256())
    assert download.from_folder(str(tmp_path), archive) is None
    (tmp_path / "b.json.gz").write_bytes(CONTENT)
    assert download.from_folder(str(tmp_path), archive) == tmp_path / "b.json.gz"
    (tmp_path / "b.json.gz").write_bytes(CONTENT[1:])
    with pytest.raises(UserError, match=re.escape(f"not {sha256()}, which is registered")):
        download.from_folder(str(tmp_path), archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json.gz"], "nothing is written there"


def make_zip(path, **entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return path


def lines_of(path, member="m"):
    return list(archives.zip_lines(path, member))


def test_lines_of_a_zip_are_numbered_and_blank_ones_left_out(tmp_path):
    path = make_zip(tmp_path / "a.zip", m="one\r\n\n \nfour", other="x")
    assert lines_of(path) == [(1, b"one\r\n"), (4, b"four")]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..\\x", "C:\\x", "\\x", ".."])
def test_an_archive_with_an_entry_that_points_outside_is_refused(tmp_path, name):
    place = tmp_path / "inside"
    place.mkdir()
    path = make_zip(place / "a.zip", m="one\n", **{name: "gotcha"})
    with pytest.raises(UserError, match="points outside of the archive; do not use this file"):
        lines_of(path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["inside", "a.zip"], "nothing was written anywhere"


def test_dots_in_names_are_no_harm(tmp_path):
    assert lines_of(make_zip(tmp_path / "a.zip", **{"m": "x", "a..b/c...d": "y"})) == [(1, b"x")]


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("m", "w") as file:
        for _ in range(80):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match="m claims to unpack to 83,886,080 bytes; no text compresses so well"):
        lines_of(tmp_path / "a.zip")


def test_an_archive_of_too_many_entries(tmp_path):
    path = make_zip(tmp_path / "a.zip", m="x", **{f"e{number}": "" for number in range(1000)})
    with pytest.raises(UserError, match="it has 1,001 entries, more than 1,000"):
        lines_of(path)


def test_missing_members_and_long_lines(tmp_path):
    with pytest.raises(UserError, match="m is missing or occurs twice; the archive has: other"):
        lines_of(make_zip(tmp_path / "a.zip", other="x"))
    with pytest.raises(UserError, match=r"a.zip: m: line 2: longer than 1,048,576 bytes"):
        lines_of(make_zip(tmp_path / "a.zip", m="x\n" + "y" * (2**20 + 1)))


def test_a_zip_file_damaged_anywhere_gives_one_line_or_the_truth(tmp_path):
    text = "".join(f"{number * 7919 % 10007}::x\n" for number in range(2000))
    whole = make_zip(tmp_path / "a.zip", m=text).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            (tmp_path / "b.zip").write_bytes(damaged)
            try:
                assert b"".join(line for _, line in lines_of(tmp_path / "b.zip")) == text.encode()
            except UserError as error:
                assert str(error).startswith(f"{tmp_path}/b.zip: ") and "\n" not in str(error)


def test_a_gzip_bomb_is_stopped(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(archives, "_HARMLESS", 2**20)
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"0123456\n" * 2**20))
    with pytest.raises(UserError, match="a.gz: it unpacks to more than .* bytes; no log or text compresses so well"):
        list(archives.numbered_lines(tmp_path / "a.gz"))
    (tmp_path / "interactions.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n" + b"u,i\n" * 2**21))
    from kdsr_jax.data.sources import folder

    with pytest.raises(UserError, match="interactions.csv.gz: it unpacks to more than"):
        folder.load_log(tmp_path)

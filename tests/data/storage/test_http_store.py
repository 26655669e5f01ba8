"""Web servers: what a URL says is what is asked for, and refusals are told in their own words."""

import base64
import threading

import pytest

from data_prep.verify import verify_set
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.storage import CannotList, Stopped, StorageError, address, http_store
from mocov3_ds.data.storage.retry import RetryLimits
from tests import object_store
from tests.data.sets import make_set
from tests.data.storage.faults import DATA
from tests.data.storage.stub_server import Answer, file_answer, serve


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch, tmp_path):
    monkeypatch.setenv(address.LOGINS, "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    limits = {"patience_s": 0.5, "first_contact_s": 0.5, "stall_s": 120}
    with object_store.environment("http://127.0.0.1:1", **limits):
        yield


def of_data(asked):
    return file_answer(asked, DATA)


def test_reading_by_ranges():
    with serve(of_data) as (host, asked):
        url = f"http://{host}/a%20b/x y.tar?sig=1"
        assert storage.file_size(url) == len(DATA)
        assert storage.read(url, 1000, 2_000_000) == DATA[1000:2_000_000]
        assert storage.read(url) == DATA
    assert {a.target for a in asked} == {"/a%20b/x%20y.tar?sig=1"}
    assert [a.headers.get("range") for a in asked] == [None, "bytes=1000-1999999", None]


def test_the_login_goes_to_the_server_and_nowhere_else():
    def answer(asked):
        is_known = asked.headers.get("authorization") == f"Basic {token}"
        return of_data(asked) if is_known else Answer(401)

    token = base64.b64encode(b"me:p@ss").decode()
    with serve(answer) as (host, _):
        assert storage.read(f"http://me:p%40ss@{host}/x", 0, 5) == DATA[:5]
        assert storage.read(f"http://{host}/x", 0, 5) == DATA[:5]  # remembered for its server
        with pytest.raises(StorageError, match="refuses access") as error:
            storage.read(f"http://me:SECRET@{host}/x?token=HIDDEN")
        assert "SECRET" not in str(error.value) and "HIDDEN" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (404, b"<html>", FileNotFoundError, "/x does not exist"),
        (403, b"<Error><Code>ExpiredToken</Code><Message>It has\nexpired.</Message></Error>",
         StorageError, "refuses access (ExpiredToken"),
        (401, b"", StorageError, "refuses access (Unauthorized); check user and password"),
        (400, b"no", StorageError, "refuses (400 Bad Request)"),
        (501, b"no", StorageError, "refuses (501 Not Implemented)"),
        (405, b"no", StorageError, "refuses (405 Method Not Allowed)"),
        (503, b"no", StorageError, "no progress for"),
    ],
)  # fmt: skip
def test_refusals(status, body, kind, words):
    with serve(lambda _: Answer(status, body)) as (host, asked):
        for call in (storage.file_size, storage.read):
            with pytest.raises(kind) as error:
                call(f"http://{host}/x")
            assert words in str(error.value)
    if status != 503:  # HEAD, GET for its reason, GET
        assert len(asked) == 3


def test_a_server_that_knows_no_head():
    with serve(lambda a: Answer(405) if a.method == "HEAD" else of_data(a)) as (host, _):
        assert storage.file_size(f"http://{host}/x") == len(DATA)


def test_a_server_without_a_length_is_told_after_a_few_attempts():
    with (
        serve(lambda _: Answer(body=b"12345", length=None)) as (host, asked),
        object_store.environment("http://127.0.0.1:1", patience_s=600, first_contact_s=600),
        pytest.raises(StorageError, match="sends no Content-Length"),
    ):
        storage.read(f"http://{host}/x")
    assert len(asked) == 5


def test_an_answer_without_the_wanted_byte_counts_as_a_failure():
    early = Answer(206, DATA[:100], (("Content-Range", f"bytes 0-99/{len(DATA)}"),))
    with serve(lambda _: early) as (host, asked):
        words = r"no progress .*the answer has bytes 0 to 100, without 1000"
        with pytest.raises(StorageError, match=words):
            storage.read(f"http://{host}/x", 1000, 2000)
    assert len(asked) < 30  # with back-off


def test_skipped_bytes_are_no_progress():
    """A server without ranges that ends before what is wanted, each time."""
    cut = Answer(200, DATA[:1_000_000], length=str(len(DATA)))
    with serve(lambda _: cut) as (host, asked), pytest.raises(StorageError, match="no progress"):
        storage.read(f"http://{host}/x", 2_000_000, 2_000_100)
    assert len(asked) < 30


def test_a_reader_that_is_stopped_reads_no_more():
    stop = threading.Event()
    stop.set()
    with serve(of_data) as (host, asked), pytest.raises(Stopped):
        storage.read(f"http://{host}/x", stop=stop)
    assert asked == []


def test_it_is_only_read_from_and_cannot_list():
    with serve(of_data) as (host, asked):
        assert not storage.can_list(f"http://{host}/x") and storage.can_list("s3://b")
        with pytest.raises(CannotList, match="cannot list its files"):
            storage.list_files(f"http://{host}/x")
        with pytest.raises(StorageError, match="only read from"):
            storage.write(f"http://{host}/x", b"1")
        with pytest.raises(StorageError, match="only read from"):
            storage.remove_file(f"http://{host}/x")
        with pytest.raises(ValueError, match="only read from"):
            storage.check_writable(f"http://{host}/x")
    assert asked == []


def test_a_redirect_is_followed_without_end_it_is_told():
    def answer(asked):
        if asked.target == "/x":
            return Answer(302, headers=(("Location", "/y"),))
        if asked.target == "/round":
            return Answer(302, headers=(("Location", "/round"),))
        return of_data(asked)

    with serve(answer) as (host, _):
        assert storage.read(f"http://{host}/x", 5, 10) == DATA[5:10]
        with pytest.raises(StorageError, match="on and on to other addresses"):
            storage.read(f"http://{host}/round")


def test_a_weak_tag_is_not_sent_back():
    tagged = (("ETag", 'W/"1"'),)

    def answer(asked):
        found = of_data(asked)
        return found._replace(headers=(*found.headers, *tagged))

    with serve(answer) as (host, asked), storage.open_read(f"http://{host}/x") as file:
        file.read(10)
        file.seek(2_900_000)
        file.read(10)
    assert len(asked) == 2 and not any("if-match" in a.headers for a in asked)


def test_a_set_on_a_plain_web_server_is_verified_by_its_manifest(tmp_path):
    made = make_set(str(tmp_path / "set"), (5, 4))

    def answer(asked):
        if asked.method not in ("GET", "HEAD"):
            return Answer(501)
        path = tmp_path / asked.target.removeprefix("/a%20b/").partition("?")[0]
        return file_answer(asked, path.read_bytes()) if path.is_file() else Answer(404)

    with serve(answer) as (host, asked):
        url = f"http://me:SECRET@{host}/a b/set?sig=HIDDEN"
        loaded = manifest.load(url)
        assert loaded.digest == made.digest and "SECRET" not in loaded.url
        verdict = verify_set(url, workers=1, quiet=True)
    assert verdict.is_sound and not verdict.is_listed
    assert "cannot list files" in str(verdict)
    assert "SECRET" not in str(verdict) and "HIDDEN" not in str(verdict)
    assert {a.method for a in asked} == {"GET", "HEAD"}
    assert all(a.target.endswith("?sig=HIDDEN") for a in asked)


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with serve(of_data) as (host, asked):
        monkeypatch.setenv("http_proxy", f"http://{host}")
        monkeypatch.setenv("no_proxy", "")
        limits = RetryLimits.from_environment()
        store = http_store.HttpStore("http://elsewhere.invalid", limits)
        assert store.file_size("/x") == len(DATA)
    assert asked[0].target == "http://elsewhere.invalid/x"

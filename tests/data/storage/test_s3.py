"""Uploads to S3 and the sentences that its refusals become."""

import contextlib
import os

import pytest

from mocov3_ds.data import storage
from mocov3_ds.data.storage import StorageError, stores
from tests import object_store
from tests.data.storage.faults import DATA
from tests.data.storage.stub_server import Answer, serve


def test_uploads_survive_a_busy_store(s3_server, monkeypatch):
    failures = []

    def flaky(real):
        def call(*args, **kwargs):
            if len(failures) % 3 != 2:
                failures.append(1)
                raise ConnectionResetError("mine")
            failures.append(0)
            return real(*args, **kwargs)

        return call

    with object_store.environment(s3_server.url):
        store, _ = stores.store_for_url("s3://bucket/x")
        store.part_bytes = 5 << 20
        for name in ("put_object", "upload_part", "create_multipart_upload"):
            monkeypatch.setattr(store.client, name, flaky(getattr(store.client, name)))
        for data in (DATA, DATA * 4):
            storage.write("s3://bucket/flaky", data)
            assert storage.read("s3://bucket/flaky") == data
    assert sum(failures) >= 6


def test_an_abandoned_upload_leaves_no_parts(s3):
    store, _ = stores.store_for_url(s3 + "/left")
    store.part_bytes = 5 << 20
    with pytest.raises(RuntimeError), storage.open_write(f"{s3}/left") as out:
        out.write(DATA * 4)
        raise RuntimeError
    uploads = store.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert "left" not in [upload["Key"] for upload in uploads]


def test_no_credentials_no_bucket(s3, monkeypatch):
    with pytest.raises(StorageError, match="no bucket nobody at http"):
        storage.read("s3://nobody/x")
    stores.forget_stores()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID"):
        storage.read(f"{s3}/x")
    stores.forget_stores()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody"):
        storage.read(f"{s3}/x")


def test_refused_access_says_so(s3):
    from botocore.exceptions import ClientError

    store, _ = stores.store_for_url(s3)
    answer = {"Error": {"Code": "AccessDenied", "Message": "no"}}
    error = ClientError(answer | {"ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject")
    assert "refuses access (AccessDenied: no); check" in str(
        store.explain_error("s3://bucket/x", error)
    )


# ----------------------------------------------------------- a server whose answers are made up


@contextlib.contextmanager
def stub_store(answer, **limits):
    """A made-up S3 server and its requests, named by the variable."""
    limits = {"patience_s": 600, "first_contact_s": 600, "stall_s": 120} | limits
    with serve(answer) as (host, asked), object_store.environment(f"http://{host}", **limits):
        yield asked


def refusal(status, code, message="no"):
    if not code:
        return lambda _: Answer(status, b"<html>a proxy</html>")
    xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return lambda _: Answer(status, xml.encode())


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "ExpiredToken", r"the store refuses \(400 ExpiredToken: no\)"),
        (403, "AccessDenied", r"refuses access \(AccessDenied: no\).*REQUESTER_PAYS=1\)"),
        (403, "", r"refuses access \(403: Forbidden\)"),
        (404, "NoSuchBucket", "there is no bucket buck at http"),
        (501, "NotImplemented", r"the store refuses \(501 NotImplemented: no\)"),
        (301, "PermanentRedirect", "sends on and on to other addresses"),
    ],
)
def test_the_stores_own_reason_comes_with_every_kind_of_request(status, code, words):
    """A HEAD has no body to say it in."""
    with stub_store(refusal(status, code)):
        for call in (
            storage.file_size,
            storage.exists,
            storage.read,
            storage.list_files,
            lambda url: storage.write(url, b"1"),
        ):
            with pytest.raises(StorageError, match=words) as error:
                call("s3://buck/x")
            assert not isinstance(error.value, ValueError)


def test_what_is_not_there_is_no_refusal():
    with stub_store(refusal(404, "NoSuchKey")):
        assert not storage.exists("s3://buck/x")
        with pytest.raises(FileNotFoundError):
            storage.read("s3://buck/x")


@pytest.mark.parametrize("key", ["a#b", "a?b=c", "p%20q", "a//b", "/lead", "tail/"])
def test_a_key_is_asked_for_literally(s3, key):
    storage.write(f"{s3}/literal/{key}x", b"1")
    client = stores.store_for_url(s3)[0].client
    found = client.list_objects_v2(Bucket="bucket", Prefix="literal/")["Contents"]
    assert f"literal/{key}x" in [item["Key"] for item in found]
    assert storage.read(f"{s3}/literal/{key}x") == b"1"
    storage.remove_file(f"{s3}/literal/{key}x")


def test_a_folder_with_two_slashes_is_another_one(s3):
    storage.write(f"{s3}/double//a", b"1")
    storage.write(f"{s3}/double/b", b"12")
    assert [entry.name for entry in storage.list_files(f"{s3}/double//")] == ["a"]
    assert [entry.name for entry in storage.list_files(f"{s3}/double/")] == ["b"]
    assert storage.read(storage.join_url(f"{s3}/double//", "a")) == b"1"


@pytest.mark.parametrize(
    ("length", "headers", "words"),
    [
        (None, (), "sends no Content-Length"),
        ("of the body", (("Content-Range", "bytes junk"),), "Content-Range: 'bytes junk'"),
    ],
)
def test_odd_headers_end_in_a_sentence(length, headers, words):
    odd = Answer(body=b"12345", headers=headers, length=length)
    with stub_store(lambda _: odd) as asked, pytest.raises(StorageError, match=words):
        storage.read("s3://buck/x")
    assert len(asked) <= 5


def test_an_answer_without_the_wanted_byte_counts_as_a_failure():
    early = Answer(206, DATA[:100], (("Content-Range", f"bytes 900-999/{len(DATA)}"),))
    with (
        stub_store(lambda _: early, patience_s=0.5, first_contact_s=0.5) as asked,
        pytest.raises(StorageError, match="the answer has bytes 900 to 1000, without 1000"),
    ):
        storage.read("s3://buck/x", 1000, 2000)
    assert len(asked) < 30


# ------------------------------------------------------- one behaviour, however it was asked for


def puts_a_file(asked):
    return Answer(headers=(("ETag", '"1"'),), body=b"" if asked.method == "PUT" else b"1")


@pytest.mark.parametrize("how", ["variable", "variable of the service", "profile", "service"])
def test_checksums_depend_on_the_endpoint_alone(how, tmp_path, monkeypatch):
    with stub_store(puts_a_file) as asked:
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        if how != "variable":
            monkeypatch.delenv("AWS_ENDPOINT_URL")
        config = {
            "profile": f"[default]\nendpoint_url = {endpoint}\n",
            "service": "[default]\nservices = lab\n[services lab]\ns3 =\n"
            f"  endpoint_url = {endpoint}\n",
        }
        (tmp_path / "config").write_text(config.get(how, ""))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        if how == "variable of the service":
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        stores.forget_stores()
        storage.write("s3://buck/x", b"1")
        assert storage.read("s3://buck/x") == b"1"
        assert not [name for a in asked for name in a.headers if "checksum" in name]
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")  # the user's word
        stores.forget_stores()
        storage.write("s3://buck/x", b"1")
        assert [name for a in asked for name in a.headers if "checksum" in name]


@pytest.mark.parametrize("variable", ["", "0", "1"])
def test_without_credentials_a_store_is_asked_without_a_signature(variable, monkeypatch, caplog):
    monkeypatch.setenv("MOCOV3_STORAGE_ANONYMOUS", variable)
    with stub_store(puts_a_file) as asked:
        if variable != "1":  # that one holds whatever credentials there are
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        stores.forget_stores()
        if variable == "0":
            with pytest.raises(StorageError, match=r"credentials; set AWS_ACCESS.*ANONYMOUS=1"):
                storage.read("s3://buck/x")
        else:
            assert storage.read("s3://buck/x") == b"1"
            assert "authorization" not in asked[-1].headers
    told = "s3://buck is asked without a signature: no credentials" in caplog.text
    assert told == (variable == "")


def test_a_refusal_without_a_signature_says_how_to_sign_in(monkeypatch):
    monkeypatch.setenv("MOCOV3_STORAGE_ANONYMOUS", "1")
    with stub_store(refusal(403, "AccessDenied")):
        words = r"without a signature \(AccessDenied: no\); set AWS_ACCESS_KEY_ID"
        with pytest.raises(StorageError, match=words):
            storage.read("s3://buck/x")


def test_a_reader_who_pays_says_so_with_every_request(monkeypatch):
    monkeypatch.setenv("MOCOV3_STORAGE_REQUESTER_PAYS", "1")
    with stub_store(puts_a_file) as asked:
        storage.write("s3://buck/x", b"1")
        assert storage.read("s3://buck/x") == b"1"
    assert len(asked) >= 3 and {a.headers["x-amz-request-payer"] for a in asked} == {"requester"}
    assert all("x-amz-request-payer" in a.headers["authorization"] for a in asked)  # is signed

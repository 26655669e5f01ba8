"""Headers against the standard library's tarfile; damage and hostility that it lets pass."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import tar
from tests.data_prep.forms import tar_bytes

MEMBERS = {"a/b.jpg": b"x" * 700, "c.cls": b"1", "empty.jpg": b"", "exact.jpg": b"y" * 512}


def names_sizes(archive: bytes, end: int | None = None) -> list[tuple[str, bytes]]:
    return [
        (member.name, archive[member.offset : member.offset + member.size])
        for member in tar.read_members(io.BytesIO(archive), "t.tar", end)
    ]


names = st.text(st.characters(categories=["L", "N"], include_characters="_-./"), min_size=1)


@given(
    name=names.filter(lambda name: len(name.encode()) <= 100), size=st.integers(0, (8 << 30) - 1)
)
def test_headers_are_those_of_tarfile_but_for_the_device_numbers(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    wanted = info.tobuf(tarfile.USTAR_FORMAT)
    ours = tar.make_header(name, size)
    assert len(ours) == 512
    # both forms of the same file: tarfile leaves the device fields of plain files empty or zero
    assert ours[:148] == wanted[:148] and ours[156:329] == wanted[156:329]
    assert tarfile.TarInfo.frombuf(ours, "utf-8", "strict").size == size


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(form):
    long = {**MEMBERS, "d" * 60 + "/" + "e" * 80 + ".jpg": b"long"}
    if form != tarfile.USTAR_FORMAT:
        long |= {"f" * 300 + ".jpg": b"longer", "ü" * 90 + ".jpg": b"not ascii"}
    archive = tar_bytes(long, form)
    assert names_sizes(archive, len(archive)) == list(long.items())


def test_pax_sizes_override_the_header():
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = 3, {"size": "3"}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as writer:
        writer.addfile(info, io.BytesIO(b"abc"))
    assert names_sizes(archive.getvalue()) == [("a.jpg", b"abc")]


def test_a_leading_dot_slash_and_folders_are_dropped():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writer:
        folder = tarfile.TarInfo("./x/")
        folder.type = tarfile.DIRTYPE
        writer.addfile(folder)
        info = tarfile.TarInfo("./x/a.jpg")
        info.size = 1
        writer.addfile(info, io.BytesIO(b"z"))
    assert names_sizes(out.getvalue()) == [("x/a.jpg", b"z")]


def test_every_cut_is_noticed():
    archive = tar_bytes(MEMBERS, tarfile.USTAR_FORMAT)
    end = archive.rfind(b"y") + 1
    for length in [*range(0, end, 256), end]:
        with pytest.raises(tar.DamagedTar, match="cut short"):
            list(tar.read_members(io.BytesIO(archive[:length]), "t.tar"))
    with tarfile.open(fileobj=io.BytesIO(archive[:1536])) as short:
        assert short.getnames() == ["a/b.jpg"], "the reason for all this: tarfile says nothing"


def test_every_flipped_bit_of_a_header_is_noticed_or_changes_nothing():
    archive = bytearray(tar_bytes(MEMBERS, tarfile.USTAR_FORMAT))
    start = 512 + 1024  # of the second header
    for bit in range(512 * 8):
        archive[start + bit // 8] ^= 1 << bit % 8
        in_checksum = 148 <= bit // 8 < 156  # a blank or a zero may end the number
        try:
            assert names_sizes(bytes(archive), len(archive)) == list(MEMBERS.items())
            assert in_checksum, f"bit {bit} was not noticed"
        except tar.DamagedTar:
            pass
        archive[start + bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "a\\..\\b.jpg", ".."])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(tar.DamagedTar, match="leaves the archive's own folder"):
        names_sizes(tar_bytes({name: b"x"}))


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (b"S", "kind b'S'"),
    ],
)
def test_links_devices_and_unknown_kinds_are_refused(kind, word):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(tar.DamagedTar, match=word):
        names_sizes(info.tobuf(tarfile.USTAR_FORMAT) + tar.END)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_gigantic_extension_headers_are_refused_unread(kind):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, 1 << 33
    with pytest.raises(tar.DamagedTar, match="8589934592 bytes, at most 1048576"):
        names_sizes(info.tobuf(tarfile.GNU_FORMAT) + tar.END)


@pytest.mark.parametrize("size", [1 << 20, 1 << 62])
def test_sizes_beyond_the_archive_are_refused(size):
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    archive = info.tobuf(tarfile.GNU_FORMAT) + tar.END
    with pytest.raises(tar.DamagedTar, match="runs past the end"):
        names_sizes(archive, len(archive))


@pytest.mark.parametrize(
    "records",
    [b"5 a=\n", b"99 path=x\n", b"x path=y\n", b"-3 path=x\n", b"12 path=ab\r", b"0 a=b\n"],
)
def test_damaged_pax_records_are_refused(records):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    archive = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    archive += tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT) + tar.END
    if records == b"5 a=\n":  # a whole record, of a key that says nothing here
        assert names_sizes(archive) == [("a.jpg", b"")]
        return
    with pytest.raises(tar.DamagedTar, match="extension header"):
        names_sizes(archive)


def test_names_and_sizes_that_fit_no_header_are_refused():
    with pytest.raises(ValueError, match="101 bytes"):
        tar.make_header("é" * 50 + "a", 0)
    with pytest.raises(ValueError, match="8 GiB"):
        tar.make_header("a", 8 << 30)


@pytest.mark.parametrize(
    ("kind", "records", "word"),
    [
        (b"x", {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg"}, "sparse file .*'a.jpg'"),
        (b"x", {"SCHILY.realsize": "5"}, "sparse file"),
        (b"g", {"path": "all.jpg"}, "global header that names all files alike"),
        (b"x", {"size": "9" * 5000}, "no number in its extension header"),
    ],
)
def test_extension_records_that_change_what_a_member_is_are_refused(kind, records, word):
    text = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + len(str(len(rest) + 4))
        text += b"%d" % length + rest
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(text)
    archive = info.tobuf(tarfile.USTAR_FORMAT) + text + tar.padding_after(len(text))
    archive += tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT) + tar.END
    with pytest.raises(tar.DamagedTar, match=word):
        names_sizes(archive)


def test_something_behind_the_end_mark_is_noticed():
    for rest, wanted in ((b"", False), (bytes(300_000), False), (bytes(300_000) + b"x", True)):
        source = io.BytesIO(tar_bytes(MEMBERS, tarfile.USTAR_FORMAT) + rest)
        assert len(list(tar.read_members(source, "t.tar"))) == len(MEMBERS)
        assert tar.has_rest(source) is wanted

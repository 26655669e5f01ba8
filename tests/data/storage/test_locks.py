"""A lock keeps others out, and a file system without locks is told."""

import errno
import fcntl
import os

import pytest

from mocov3_ds.data.storage import locks


def test_a_second_holder_is_told_apart(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert locks.take_lock(first, tmp_path) and not locks.take_lock(second, tmp_path)
    os.close(first)
    assert locks.take_lock(second, tmp_path)
    os.close(second)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            locks.take_lock(0, tmp_path)
    else:
        assert locks.take_lock(0, tmp_path)
        assert f"{tmp_path}: no locks here ({os.strerror(code)})" in caplog.text


def test_those_who_only_look_do_not_keep_each_other_out(tmp_path):
    first, second, holder = (os.open(tmp_path, os.O_RDONLY) for _ in range(3))
    assert locks.take_lock(first, tmp_path, shared=True)
    assert locks.take_lock(second, tmp_path, shared=True)
    assert not locks.take_lock(holder, tmp_path)
    for descriptor in (first, second):
        os.close(descriptor)
    assert locks.take_lock(holder, tmp_path)
    looker = os.open(tmp_path, os.O_RDONLY)
    assert not locks.take_lock(looker, tmp_path, shared=True)
    os.close(looker)
    os.close(holder)

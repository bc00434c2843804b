"""Files appear whole or not at all, under a free name, and leave nothing: with faults, races between processes, and kills."""

import errno
import os
import signal
import stat
import time

import pytest
from comfyui_trilora.trilora_ops import atomic_files
from comfyui_trilora.trilora_ops.atomic_files import NameTaken, publish
from comfyui_trilora.trilora_ops.errors import TriLoRAError

CONTENT = b"adapter" * 1000
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def without_nameless(monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)


def without_links(monkeypatch):
    """As on FAT."""
    without_nameless(monkeypatch)

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)


def without_proc(monkeypatch):
    """Files without names, but no way to give them one."""
    link = os.link

    def refuse(source, *args, **kwargs):
        if str(source).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "no /proc")
        return link(source, *args, **kwargs)

    monkeypatch.setattr(os, "link", refuse)


WAYS = {"as this system can": lambda monkeypatch: None, "named": without_nameless, "no links": without_links, "no proc": without_proc}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way in which a file can be made."""
    WAYS[request.param](monkeypatch)
    return request.param


def in_child(action) -> int:
    """Run `action` in a forked process; how it ended: its exit code, or the signal that killed it as a negative number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_file_is_whole_and_has_the_usual_rights(tmp_path, way):
    before = os.umask(0o027)
    try:
        publish(tmp_path / "new" / "a.bin", CONTENT)
    finally:
        os.umask(before)
    assert os.listdir(tmp_path / "new") == ["a.bin"]
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    if os.name != "nt":
        assert stat.S_IMODE((tmp_path / "new" / "a.bin").stat().st_mode) == 0o640


@pytest.mark.parametrize("taken", ["file", "folder", "dangling link"])
def test_a_name_that_is_in_use_is_left_alone(tmp_path, way, taken):
    path = tmp_path / "a.bin"
    if taken == "file":
        path.write_bytes(b"precious")
    elif taken == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(NameTaken, match=r"a\.bin: a file of this name exists already"):
        publish(path, CONTENT)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert taken != "file" or path.read_bytes() == b"precious"


@posix
def test_of_writers_that_race_for_a_name_one_wins(tmp_path, way):
    """Eight processes start at the same moment; each has content of its own."""
    start, children = time.monotonic() + 0.5, []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                time.sleep(max(0.0, start - time.monotonic()))
                publish(tmp_path / "a.bin", bytes([number]) * 100_000)
                code = 0
            except NameTaken:
                code = 1
            finally:
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] + [1] * 7
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == bytes([codes.index(0)]) * 100_000


@posix
def test_a_killed_writer_leaves_no_file_and_no_remains_stay(tmp_path, way, monkeypatch):
    """Where a file can be without a name nothing is left at once, elsewhere after the next write into the folder."""

    def killed(file, content):
        file.write(content[:100])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "_write", killed)
        assert in_child(lambda: publish(tmp_path / "a.bin", CONTENT)) == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert "a.bin" not in left
    if hasattr(os, "O_TMPFILE"):
        assert left == []
    else:
        assert [name.endswith(".partial") for name in left] == [True]
    publish(tmp_path / "b.bin", CONTENT)
    assert os.listdir(tmp_path) == ["b.bin"]


@posix
def test_a_living_writers_file_is_not_taken_for_a_remains(tmp_path, monkeypatch):
    """One process is half-way through writing while another writes into the same folder."""
    without_nameless(monkeypatch)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            whole = atomic_files._write

            def slow(file, content):
                os.write(write, b"x")
                time.sleep(1.0)
                whole(file, content)

            atomic_files._write = slow
            publish(tmp_path / "slow.bin", CONTENT)
            code = 0
        finally:
            os._exit(code)
    os.read(read, 1)
    publish(tmp_path / "quick.bin", CONTENT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(os.listdir(tmp_path)) == ["quick.bin", "slow.bin"]


def test_only_our_own_remains_are_removed(tmp_path):
    """What an earlier version left goes too; other programs' partial files, folders and pipes stay."""
    ours = [f".{'0' * 32}.partial", f".my.adapter.{'a' * 32}.partial"]
    others = ["download.partial", f"{'0' * 32}.partial", f".{'0' * 31}.partial"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"half")
    special = f".{'f' * 32}.partial"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / special)
    else:
        (tmp_path / special).mkdir()
    if atomic_files.fcntl is None:  # without locks only what is old goes
        for name in ours:
            os.utime(tmp_path / name, (0, 0))
    publish(tmp_path / "a.bin", CONTENT)
    assert sorted(os.listdir(tmp_path)) == sorted(["a.bin", special, *others])


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "make the folder writable"), (errno.EFBIG, "no file of this size"),
     (errno.EIO, "choose another folder")],
)
def test_a_fault_while_writing_is_one_sentence_and_leaves_nothing(tmp_path, way, monkeypatch, code, words):
    def fail(file, content):
        file.write(content[:100])
        file.flush()
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic_files, "_write", fail)
    with pytest.raises(TriLoRAError) as error:
        publish(tmp_path / "a.bin", CONTENT)
    assert words in str(error.value) and os.strerror(code) in str(error.value) and "\n" not in str(error.value)
    assert not isinstance(error.value, NameTaken) and os.listdir(tmp_path) == []


def test_an_interrupt_while_writing_comes_out_and_leaves_nothing(tmp_path, way, monkeypatch):
    def interrupt(file, content):
        file.write(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "a.bin", CONTENT)
    assert os.listdir(tmp_path) == []


def test_a_reserved_name_is_given_back(tmp_path, monkeypatch):
    """Without hard links the name is taken by an empty file first; it goes when the real one cannot follow."""
    without_links(monkeypatch)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "a.bin", CONTENT)
    assert os.listdir(tmp_path) == []


@posix
def test_a_limit_on_the_size_of_files(tmp_path, way):
    """A real one, of the process."""
    import resource

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            publish(tmp_path / "a.bin", CONTENT)
        except TriLoRAError as error:
            return 0 if "no file of this size" in str(error) else 3
        return 4

    assert in_child(limited) == 0
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "loras").write_text("a file")
    with pytest.raises(TriLoRAError, match="a file lies where the folder should be"):
        publish(tmp_path / "loras" / "a.bin", CONTENT)
    with pytest.raises(TriLoRAError, match="a file lies where the folder should be"):
        publish(tmp_path / "loras" / "deeper" / "a.bin", CONTENT)
    with pytest.raises(TriLoRAError, match="choose a shorter name") as error:
        publish(tmp_path / ("a" * 5000), CONTENT)
    assert len(str(error.value)) < 600
    assert os.listdir(tmp_path) == ["loras"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="an administrator may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(TriLoRAError, match="make the folder writable"):
            publish(tmp_path / "a.bin", CONTENT)
    finally:
        tmp_path.chmod(0o755)

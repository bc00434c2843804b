"""A finished step is never lost: whatever fails or is cancelled after it, a file holds it and the reason still comes out."""

import errno
import os
import signal
import threading

import comfy.model_management
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, random_dataset, run_node, traces, weights_hash

INTERRUPT = comfy.model_management.InterruptProcessingException
STEPS = 3


@pytest.fixture(scope="module")
def model(host_nodes):
    return tiny_models.flow_model()


@pytest.fixture(scope="module")
def before(model):
    return weights_hash(model.patcher)


@pytest.fixture(scope="module")
def train(host_nodes, pack_module, model):
    """Function: runs Train Adapter as the executor does; (model, adapter, losses, report)."""
    dataset = random_dataset(pack_module("nodes.types"), model)
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=STEPS, schedule="constant", warmup=0.0)[0]
    method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    return lambda: run_node(host_nodes, "TriLoRATrainAdapter", model=model.patcher, dataset=dataset, method=method, settings=settings, target="attention")


@pytest.fixture
def files(host_nodes):
    """Function: paths below output/loras that the test has made, hidden ones too; they are removed afterwards."""
    folder = list_saved_adapters()
    known = set(folder.rglob("*"))
    yield lambda: sorted(set(folder.rglob("*")) - known)
    for path in set(folder.rglob("*")) - known:
        path.unlink()


@pytest.fixture(scope="module")
def learned(train):
    """The adapter of an undisturbed run."""
    return train()[1]


def fail_at(monkeypatch, owner, name: str, call: int, reason: BaseException):
    """The call of this number raises; all others work."""
    real, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise reason
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)


def assert_kept(pack_module, files, learned, texts, start: str = "trilora_finished_at_3"):
    (path,) = files()
    assert path.name.startswith(start)
    saved = pack_module("trilora_ops.checkpoint").read_adapter(path)
    assert saved.keys() == learned.keys()
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, learned[key], rtol=1e-4, atol=1e-6, msg=key)
    assert any(str(path) in text for text in texts)
    return path


def test_a_run_that_ends_well_leaves_no_file(train, files, learned, texts):
    _, adapter, _, _ = train()
    assert adapter.keys() == learned.keys() and files() == []
    assert "loss on fixed noise" in texts[-1]


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_page_hears_of_a_file_that_stays_alone(train, files, texts, pack_module, monkeypatch, ends_well):
    """Its lists are not made anew for one that goes again."""
    heard = []
    monkeypatch.setattr(pack_module("nodes.compat"), "announce", lambda event, facts: heard.append((event, facts["file"])))
    if ends_well:
        train()
    else:
        fail_at(monkeypatch, pack_module("nodes.applying"), "apply_state", 1, fresh("cancel"))
        with pytest.raises(INTERRUPT):
            train()
    assert heard == [("trilora.saved", path.name) for path in files()] and len(heard) == (not ends_well)


def test_a_page_that_has_gone_hides_nothing(train, files, learned, texts, pack_module, monkeypatch):
    monkeypatch.setattr(pack_module("nodes.compat"), "announce", lambda *args: (_ for _ in ()).throw(RuntimeError("the page has gone")))
    train()
    assert files() == []
    fail_at(monkeypatch, pack_module("nodes.applying"), "apply_state", 1, fresh("memory"))
    with pytest.raises(MemoryError, match="no memory left; all 3 steps are done; saved as"):
        train()
    assert len(files()) == 1


def test_the_file_is_there_before_anything_else_can_fail(train, files, learned, pack_module, monkeypatch):
    """A process that is killed while it measures the loss for the second time leaves the adapter."""
    run, calls = pack_module("nodes.training_run"), []
    real = run.fixed_noise_losses

    def watched(*args):
        calls.append([path.name for path in files()])
        return real(*args)

    monkeypatch.setattr(run, "fixed_noise_losses", watched)
    train()
    assert calls[0] == [] and [name.startswith("trilora_finished_at_3") for name in calls[1]] == [True]


AFTER = {  # what comes after the last step: (module, function, number of the call that fails)
    "the second measurement": ("nodes.training_run", "fixed_noise_losses", 2),
    "the export": ("trilora_ops.metadata", "describe", 2),
    "the report": ("nodes.training_run", "describe_training", 1),
    "the look at what moved": ("nodes.training_run", "judge", 1),
    "applying": ("nodes.applying", "apply_state", 1),
    "the picture": ("nodes.training_report", "picture", 1),
    "the last line": ("nodes.training_report", "last_line", 1),
}
REASONS = {"error": RuntimeError("websocket closed"), "memory": MemoryError("no memory left"), "disk": OSError(errno.EIO, "Input/output error"),
           "key": KeyError("layer"), "cancel": INTERRUPT(), "keyboard": KeyboardInterrupt()}


def fresh(reason: str) -> BaseException:
    return type(REASONS[reason])(*REASONS[reason].args)


@pytest.mark.parametrize("reason", ["error", "cancel"])
@pytest.mark.parametrize("place", AFTER)
def test_whatever_fails_after_the_last_step_the_adapter_is_kept(train, files, learned, texts, pack_module, monkeypatch, model, before, place, reason):
    module, name, call = AFTER[place]
    owner = pack_module("nodes.training_run" if name == "describe" else module)
    raised = fresh(reason)
    fail_at(monkeypatch, owner, name, call, raised)
    with pytest.raises(type(raised)):
        train()
    assert_kept(pack_module, files, learned, texts)
    assert weights_hash(model.patcher) == before and traces(model.patcher) == []


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_comes_out_as_it_is_and_says_where_the_file_is(train, files, learned, texts, pack_module, monkeypatch, reason):
    raised = fresh(reason)
    fail_at(monkeypatch, pack_module("nodes.applying"), "apply_state", 1, raised)
    with pytest.raises(type(raised)) as error:
        train()
    path = assert_kept(pack_module, files, learned, texts)
    assert error.value is raised
    assert str(path) in str(raised)
    assert all(str(arg) in str(raised) for arg in REASONS[reason].args if isinstance(arg, str))


def test_a_text_that_cannot_be_shown_hides_nothing(train, files, learned, pack_module, monkeypatch):
    """Every text of the page fails from the last step on, also the one about the file."""
    compat, lines = pack_module("nodes.compat"), []

    def broken(text, node_id):
        lines.append(text)
        if any(line.startswith("measuring the loss after") for line in lines):
            raise RuntimeError("the page has gone")

    monkeypatch.setattr(compat, "show_text", broken)
    with pytest.raises(RuntimeError, match="the page has gone; all 3 steps are done; saved as"):
        train()
    assert_kept(pack_module, files, learned, lines)


def test_a_folder_that_is_cleared_after_the_last_step_costs_nothing(train, files, learned, texts, pack_module, monkeypatch):
    """The file is written again, so that the sentence about it is true."""

    def cleared(*args):
        for path in files():
            path.unlink()
        raise RuntimeError("late")

    monkeypatch.setattr(pack_module("nodes.applying"), "apply_state", cleared)
    with pytest.raises(RuntimeError, match="late; all 3 steps are done; saved as"):
        train()
    assert_kept(pack_module, files, learned, texts)


@pytest.mark.parametrize("link", ["loras", "loras/mine", "loras of a folder that is gone"])
def test_a_folder_that_is_a_link_takes_the_file(host_nodes, train, learned, pack_module, monkeypatch, tmp_path, link):
    """People keep their LoRAs on another disk."""
    output, disk = tmp_path / "output", tmp_path / "disk"
    place = output / link.split(" ")[0]
    place.parent.mkdir(parents=True)
    if "gone" not in link:
        disk.mkdir()
    place.symlink_to(disk)
    monkeypatch.setattr(pack_module("nodes.files").folder_paths, "get_output_directory", lambda: str(output))
    name = run_node(host_nodes, "TriLoRASaveAdapter", adapter=learned, name="mine/a%year%" if "mine" in link else "a%year%", dtype="fp32")[0]
    (path,) = disk.rglob("*.safetensors")
    assert (output / "loras" / name).samefile(path) and "%" not in name and ("mine" in link) == name.startswith("mine")
    if "mine" not in link:
        fail_at(monkeypatch, pack_module("nodes.applying"), "apply_state", 1, fresh("error"))
        with pytest.raises(RuntimeError, match="saved as"):
            train()
        assert len(list(disk.rglob("*.safetensors"))) == 2


def test_two_runs_at_once_are_done_one_after_the_other(train, model, learned, before, files):
    """They share the layers, and the switch that tells ComfyUI's kernels of a training."""
    done = []
    threads = [threading.Thread(target=lambda: done.append(train()[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(done) == 2 and files() == []
    assert all(torch.equal(adapter[key], learned[key]) for adapter in done for key in learned)
    assert weights_hash(model.patcher) == before and traces(model.patcher) == []


DISKS = {"full": OSError(errno.ENOSPC, "No space left on device"), "read-only": OSError(errno.EROFS, "Read-only file system")}


@pytest.mark.parametrize("disk", DISKS)
def test_a_disk_that_takes_nothing_costs_no_finished_run(train, files, texts, pack_module, monkeypatch, learned, disk):
    """The adapter is still there for Save Adapter, and the node says that no copy was kept."""
    monkeypatch.setattr(pack_module("trilora_ops.atomic_files"), "_write", lambda *args: (_ for _ in ()).throw(DISKS[disk]))
    _, adapter, _, report = train()
    assert adapter.keys() == learned.keys() and files() == []
    assert "no copy of the adapter could be kept" in texts[-1] and DISKS[disk].strerror in texts[-1]
    assert "no copy of the adapter could be kept" in report


@pytest.mark.parametrize("reason", ["cancel", "memory", "keyboard"])
@pytest.mark.parametrize("when", ["during training", "after it"])
@pytest.mark.parametrize("disk", DISKS)
def test_a_second_fault_never_hides_the_first(train, files, texts, pack_module, monkeypatch, disk, when, reason):
    """Cancelled or out of memory, and then the disk is full: the first comes out, and the second is a sentence beside it."""
    raised = fresh(reason)
    monkeypatch.setattr(pack_module("trilora_ops.atomic_files"), "_write", lambda *args: (_ for _ in ()).throw(DISKS[disk]))
    if when == "during training":
        real, host = pack_module("nodes.comfy_host").ComfyHost.denoise, pack_module("nodes.comfy_host").ComfyHost
        monkeypatch.setattr(host, "denoise", real)
        fail_at(monkeypatch, host, "denoise", 8 + 3, raised)  # 8 draws before the first step
    else:
        fail_at(monkeypatch, pack_module("nodes.applying"), "apply_state", 1, raised)
    with pytest.raises(type(raised)) as error:
        train()
    assert error.value is raised and files() == []
    (text,) = [text for text in texts if "could not be saved" in text]
    assert DISKS[disk].strerror in text and text.startswith("stopped after 2 of 3" if when == "during training" else "all 3 steps are done")
    assert "could not be saved" in str(raised) and DISKS[disk].strerror in str(raised)


def test_an_interrupt_while_the_file_is_written_is_tried_again(train, files, learned, texts, pack_module, monkeypatch):
    fail_at(monkeypatch, pack_module("trilora_ops.atomic_files"), "_write", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train()
    assert_kept(pack_module, files, learned, texts)


def test_every_poll_of_a_run_may_cancel_it(train, files, pack_module, monkeypatch, model, before, error):
    """At each place where the loop asks: the host's exception comes out, and from the first finished step on there is a file."""
    host = pack_module("nodes.comfy_host").ComfyHost
    polls = []
    with monkeypatch.context() as patch:
        patch.setattr(host, "check_interrupt", lambda self: polls.append(1))
        train()
    assert files() == [] and len(polls) > 20
    kept = []
    for call in range(1, len(polls) + 1):
        with monkeypatch.context() as patch:
            patch.setattr(host, "check_interrupt", lambda self: None)
            fail_at(patch, host, "check_interrupt", call, INTERRUPT())
            with pytest.raises(INTERRUPT):
                train()
        kept.append(len(files()) - sum(kept))
        assert traces(model.patcher) == []
    assert set(kept) == {0, 1} and kept == sorted(kept), "once a step was finished, each cancelled run leaves one file"
    assert kept.count(1) >= 8 + 2  # the second measurement and two steps
    assert weights_hash(model.patcher) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_no_remains(pack_module, learned, files, monkeypatch):
    atomic = pack_module("trilora_ops.atomic_files")

    def killed(file, content):
        file.write(content[:100])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            atomic._write = killed
            pack_module("nodes.files").save_state(learned, "killed", torch.float32)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    pack_module("nodes.files").save_state(learned, "killed", torch.float32)
    assert [path.name for path in files()] == ["killed_00001_.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_save_under_one_name_all_keep_their_file(pack_module, learned, files):
    """The number of the file is chosen when the file is made, not before."""
    save, children = pack_module("nodes.files").save_state, []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                save(learned, "raced", torch.float32)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert [path.name for path in files()] == [f"raced_{n:05}_.safetensors" for n in range(1, 5)]


@pytest.mark.parametrize("disk", [*DISKS, "a file in place of the folder"])
def test_save_adapter_says_in_one_sentence_why_it_cannot(host_nodes, pack_module, learned, files, monkeypatch, error, tmp_path, disk):
    if disk in DISKS:
        monkeypatch.setattr(pack_module("trilora_ops.atomic_files"), "_write", lambda *args: (_ for _ in ()).throw(DISKS[disk]))
    else:
        (tmp_path / "loras").write_text("a file")
        monkeypatch.setattr(pack_module("nodes.files").folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(error) as said:
        run_node(host_nodes, "TriLoRASaveAdapter", adapter=learned, name="full", dtype="fp32")
    assert "cannot be written to" in str(said.value) and "\n" not in str(said.value)
    assert files() == []

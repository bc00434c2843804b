"""Cancelling: the host's own exception comes out, the model is untouched, and what was learned is in a file."""

import comfy.model_management
import comfy.ops
import comfy.utils
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import list_saved_adapters, random_dataset, traces, weights_hash

INTERRUPT = comfy.model_management.InterruptProcessingException
STEPS = 5
# The host polls for an interrupt in each operation, or, before it did so, only where the loop asks between two steps.
POLLS_IN_OPERATIONS = hasattr(comfy.ops, "run_every_op")


class Trainee:
    """A tiny flow model and a run over it that can be disturbed at a step."""

    def __init__(self, pack_module):
        self.pack_module = pack_module
        self.tiny = tiny_models.flow_model()
        self.deep = self.tiny.patcher.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
        self.dataset = random_dataset(pack_module("nodes.types"), self.tiny)
        self.before = weights_hash(self.tiny.patcher)
        self.done = 0  # finished steps of the run under way

    def run(self, steps: int = STEPS, checkpointing: bool = False, on_step=lambda done: None):
        """The node's run; ``on_step`` hears of every finished step, as the host's progress bar does (it drops some)."""

        class Bar:
            def __init__(bar, total, *_):
                self.done = 0

            def update_absolute(bar, done, *_):
                self.done = done
                on_step(done)

        config = self.pack_module("training.config").TrainingConfig(
            steps=steps, learning_rate=1e-3, schedule="constant", warmup=0.0, checkpointing=checkpointing
        )
        lora = self.pack_module("trilora_ops.residuals.lora").LoraConfig(rank=2)
        method = self.pack_module("trilora_ops.registry").Method(lora)
        host = self.pack_module("nodes.comfy_host").ComfyHost(self.tiny.patcher)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.utils, "ProgressBar", Bar)
            return self.pack_module("nodes.training_run").run(host, self.dataset, method, config, "linear", None)

    def assert_untouched(self):
        """Weights, forwards, flags as they were before."""
        assert weights_hash(self.tiny.patcher) == self.before
        assert traces(self.tiny.patcher) == []
        assert not getattr(comfy.model_management, "in_training", False)
        assert all(p.is_inference() for p in self.tiny.patcher.model.diffusion_model.parameters())


@pytest.fixture(scope="module")
def trainee(pack_module):
    return Trainee(pack_module)


@pytest.fixture(autouse=True)
def no_interrupt_left():
    yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture
def new_files(host_nodes):
    """Function: the adapter files written since the test began."""
    folder = list_saved_adapters()
    before = set(folder.rglob("*"))
    return lambda: sorted(set(folder.rglob("*")) - before)


@pytest.fixture(scope="module")
def learned(trainee):
    """Function: the adapter after so many undisturbed steps."""
    known = {}
    return lambda steps: known[steps] if steps in known else known.setdefault(steps, trainee.run(steps)[0])


def interrupt() -> None:
    comfy.model_management.interrupt_current_processing()


def disturb(trainee, where: str, after: int):
    """Hooks on a deep layer that interrupt once ``after`` steps are done; returns their handles."""

    def in_forward(module, args, output):
        if trainee.done == after and torch.is_grad_enabled():
            interrupt()

    def raise_interrupt(gradient):
        raise INTERRUPT()

    def in_backward(module, args, output):
        if trainee.done == after and output.requires_grad:
            output.register_hook(raise_interrupt)

    return trainee.deep.register_forward_hook(in_backward if where == "inside autograd" else in_forward)


@pytest.mark.parametrize("where", ["between steps", "in the forward pass", "in a recomputed block", "inside autograd"])
def test_an_interrupted_run_saves_what_was_learned(trainee, learned, new_files, pack_module, where):
    """Wherever it strikes after step 2, the file holds exactly the adapter of the steps that were finished."""
    handle = None
    if where == "between steps":
        action = {"on_step": lambda done: interrupt() if done == 2 else None}
    else:
        action, handle = {"checkpointing": where == "in a recomputed block"}, disturb(trainee, where, after=2)
    try:
        with pytest.raises(INTERRUPT):
            trainee.run(**action)
    finally:
        if handle:
            handle.remove()
    done = 2 if POLLS_IN_OPERATIONS or where in ("between steps", "inside autograd") else 3
    trainee.assert_untouched()
    (file,) = new_files()
    assert file.name.startswith(f"trilora_stopped_at_{done}_0")
    saved, expected = pack_module("trilora_ops.checkpoint").read_adapter(file), learned(done)
    assert saved.metadata["trilora.steps"] == str(done)
    assert saved.keys() == expected.keys()
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("where", ["before the run", "in the first step"])
def test_an_interrupt_before_the_first_finished_step_writes_no_file(trainee, new_files, where):
    handle = None
    if where == "before the run":
        interrupt()
    else:
        handle = disturb(trainee, "inside autograd", after=0)
    try:
        with pytest.raises(INTERRUPT):
            trainee.run()
    finally:
        if handle:
            handle.remove()
    trainee.assert_untouched()
    assert new_files() == []


def test_an_interrupt_after_the_last_step_loses_nothing(trainee, learned, new_files, pack_module):
    """The loss is measured once more after training: an interrupt there must not throw the trained adapter away."""
    learned(2)
    try:
        trainee.run(steps=2, on_step=lambda done: interrupt() if done == 2 else None)
    except INTERRUPT:
        (file,) = new_files()
        saved = pack_module("trilora_ops.checkpoint").read_adapter(file)
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, learned(2)[key], rtol=1e-4, atol=1e-6, msg=key)
    else:  # the host polls at its next node
        assert comfy.model_management.processing_interrupted()
    trainee.assert_untouched()


def test_a_failure_saves_what_was_learned_too(trainee, learned, new_files, pack_module):
    """Out of memory, a full disk for the preview, a bug: the work of finished steps is kept, and the reason comes out."""

    def fail(done):
        if done == 2:
            raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory left"):
        trainee.run(on_step=fail)
    (file,) = new_files()
    saved = pack_module("trilora_ops.checkpoint").read_adapter(file)
    assert saved.metadata["trilora.steps"] == "2" and saved.keys() == learned(2).keys()
    trainee.assert_untouched()


def test_a_picture_that_cannot_be_drawn_costs_no_adapter(host_nodes, trainee, pack_module, monkeypatch, caplog):
    """A broken plotting library is an everyday fault; hours of training must not be lost to it."""
    from comfyui_trilora.tests.host.tiny_run import run_node

    def broken(*args, **kwargs):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(pack_module("nodes.training_report"), "plot_loss", broken)
    settings = run_node(host_nodes, "TriLoRATrainingSettings", steps=1)[0]
    method = run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    model, adapter, loss, report = run_node(host_nodes, "TriLoRATrainAdapter", model=trainee.tiny.patcher, dataset=trainee.dataset,
                                            method=method, settings=settings, target="attention")
    assert adapter and model.patches and len(loss["loss"]) == 1
    assert "numpy.core.multiarray failed to import" in caplog.text

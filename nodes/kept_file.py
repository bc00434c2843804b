"""What a run has learned, as a file from its last step until everything that follows has succeeded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

import comfy.model_management
import torch

from ..trilora_ops.checkpoint import AdapterState
from . import compat
from .files import announce_saved, write_state
from .notices import notice

log = logging.getLogger("trilora")


class KeptFile:
    """A file under output/loras that goes away when the `with` block ends well, and stays, with its path said, when it does not.

    Evaluating, reporting, drawing and applying come after the last step, and each of them can fail or be cancelled. The reason
    why the block ended comes out as it is, with a sentence about the file; a file that cannot be written never takes its place.
    """

    def __init__(self, node_id: str | None):
        self.node_id = node_id
        self.path: str | None = None
        self._export: Callable[[], AdapterState] | None = None
        self._name = self._what = ""
        self._fault: BaseException | None = None

    def keep(self, name: str, what: str, export: Callable[[], AdapterState]) -> AdapterState:
        """Write the adapter that `export` gives, and return it. A file that cannot be written is a notice, since nothing is lost yet.

        name: of the file, without number and ending. what: "all 500 steps are done", for the sentence about it.
        """
        self._name, self._what, self._export = name, what, export
        state = export()
        try:
            self.path = write_state(state, name, torch.float32)
        except comfy.model_management.InterruptProcessingException:  # an Exception on older versions
            raise
        except Exception as fault:
            self._fault = fault
            notice(f"no copy of the adapter could be kept while the run ends: {fault}. Save the adapter elsewhere")
        return state

    def rescue(self, name: str, what: str, export: Callable[[], AdapterState]) -> None:
        """The same where the block is about to end with an exception: it raises nothing itself."""
        self._name, self._what, self._export = name, what, export
        try:
            self.path = write_state(export(), name, torch.float32)
        except BaseException as fault:  # the reason for stopping comes out, not this one
            self._fault = fault

    def __enter__(self) -> "KeptFile":
        return self

    def __exit__(self, kind, reason: BaseException | None, traceback) -> None:
        if reason is None:
            self._remove()
            return
        if self._export is None:  # nothing was learned yet
            return
        if self.path is None or not os.path.exists(self.path):  # somebody has cleared the folder
            self.path = None
            self.rescue(self._name, self._what, self._export)
        text = self._sentence()
        log.warning("%s", text)
        _say_in(reason, text)
        with suppress(Exception):  # a page that has gone must not hide the reason either
            compat.show_text(text.replace(" saved as ", " saved as\n"), self.node_id)
        if self.path is not None:
            with suppress(Exception):
                announce_saved(self.path)

    def _sentence(self) -> str:
        if self.path is not None:
            return f"{self._what}; saved as {self.path}"
        return f"{self._what}; what was learned could not be saved: {_described(self._fault)}"

    def _remove(self) -> None:
        if self.path is not None:
            try:
                os.remove(self.path)
            except OSError as error:
                log.warning("%s could not be removed (%s); it holds the adapter that this run gives", self.path, error)


def _described(fault: BaseException | None) -> str:
    return str(fault) or type(fault).__name__


def _say_in(reason: BaseException, text: str) -> None:
    """Add a sentence to what an exception says; its type stays, since ComfyUI treats some types in their own way."""
    with suppress(Exception):  # a class of its own kind may refuse
        if isinstance(reason, OSError) and reason.strerror:
            reason.strerror = f"{reason.strerror}; {text}"
        else:
            reason.args = (f"{_described(reason)}; {text}",)
    if text not in str(reason) and hasattr(reason, "add_note"):
        reason.add_note(text)

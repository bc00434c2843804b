"""Notices reach the log and the node that is running, and those of the last run go."""

import logging

import pytest


@pytest.fixture
def shown(pack_module, monkeypatch):
    texts = []
    monkeypatch.setattr(pack_module("nodes.compat"), "show_text", lambda text, node_id: texts.append((node_id, text)))
    return texts


def test_a_notice_is_logged_and_shown_once(pack_module, shown, caplog):
    notices = pack_module("nodes.notices")
    with caplog.at_level(logging.WARNING, "trilora"), notices.shown_on("7"):
        notices.notice("two layers were left out")
        notices.notice("two layers were left out")
        notices.notice("3 of 5 images have no caption")
    assert shown == [("7", "two layers were left out\n3 of 5 images have no caption")]
    assert "3 of 5 images" in caplog.text


def test_a_clean_run_takes_the_last_runs_notice_away_once(pack_module, shown):
    notices = pack_module("nodes.notices")
    for said in ("left out", None, None):
        with notices.shown_on("8"):
            if said:
                notices.notice(said)
    assert [text for _, text in shown] == ["left out", "nothing was left out"]


def test_a_failed_run_shows_its_error_alone_and_collecting_ends(pack_module, shown):
    notices = pack_module("nodes.notices")
    with pytest.raises(ValueError), notices.shown_on("9"):
        notices.notice("left out")
        raise ValueError("broken")
    with notices.collected() as outer:
        with notices.collected() as inner:
            notices.notice("inside")
        notices.notice("outside")
    assert (inner, outer, shown) == (["inside"], ["outside"], [])

"""What a node's text becomes before it goes to a page: no character of it may be acted upon, and all of it must be read."""

import re
import unicodedata

import pytest

JOINER = "\u2060"
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def as_text(pack_module):
    return pack_module("nodes.shown_text").as_text


def read(text: str) -> str:
    """What a person sees: joiners have no width, and line breaks are written with two spaces."""
    return text.replace(JOINER, "").replace("  \n", "\n").replace("\u00a0", " ")


@pytest.mark.parametrize("text", [
    EVIL, "</span><script>alert(1)</script>", "<!-- a -->", "<?php", "a < b <= c", "&lt;b&gt; & &#60;", "C:\\new\\x_y\\", "[[label|https://e.vil]]",
    "[a](b)", "![a](b)", "[a]: b", "https://e.vil www.e.vil me@e.vil", "# head", "- item", "1. item", "> quote", "    code", "---", "===", "a\n\nb", "my_adapter_00001_.safetensors",
    "Block-wise full (SD1.x)", "IN04-IN08=0.5, OUT.cross=0", "[1, 2] and (3)",
])  # fmt: skip
def test_the_text_reads_as_it_was(as_text, text):
    assert read(as_text(text)) == text.rstrip()


@pytest.mark.parametrize("text", ["*a* **b**", "`a`", "~a~", "_a_ __b__"])
def test_what_markdown_cannot_be_kept_from_is_replaced_by_its_like(as_text, text):
    shown = read(as_text(text))
    assert len(shown) == len(text) and not set("*`~") & set(shown) and not re.search(r"(?<!\w)_", shown)
    letters = [(mine, theirs) for mine, theirs in zip(shown, text, strict=True) if theirs.isalnum() or theirs == " "]
    assert all(mine == theirs for mine, theirs in letters)


@pytest.mark.parametrize("text", [EVIL, "a" + EVIL, "</b>", "<!--", "<?", "&lt;", "&#60;", "[[a|b]]", "[a](b)", "[a][b]", "[a]: b", "http://a", "www.a", "a@b", "\\*", "\\"])
def test_nothing_starts_a_tag_an_entity_or_a_link(as_text, text):
    shown = as_text(text)
    assert not re.search(r"<[A-Za-z/!?]|&[#\w]|\[\[|\][(:\[]|://|www\.|@\w|\\[^\w\s\u2060]|\\$", shown), shown


def test_every_line_is_a_line_and_no_heading_list_or_code(as_text):
    lines = as_text("# a\r\n- b\r    c\n\nd").split("\n")
    assert len(lines) == 5 and all(line.startswith(JOINER) for line in lines)
    assert all(line.endswith("  ") for line in lines[:-1]), "Markdown breaks a line after two spaces"
    assert lines[2] == JOINER + "\u00a0" * 4 + "c  "


def test_long_texts_and_names_that_are_no_text_can_be_sent(as_text):
    assert len(as_text("a" * 10**6)) < 21_000
    as_text("a\udcff\0b").encode("utf-8")
    assert all(unicodedata.category(letter) != "Cs" for letter in as_text("\ud800"))


def test_all_texts_on_nodes_go_this_way(pack_module, monkeypatch):
    import server

    sent = []
    monkeypatch.setattr(server.PromptServer.instance, "send_progress_text", lambda text, node_id: sent.append(text))
    compat, notices = pack_module("nodes.compat"), pack_module("nodes.notices")
    compat.show_text(EVIL, "1")
    with notices.shown_on("1"):
        notices.notice(f"left out: {EVIL}")
        notices.notice("and more")
    with notices.shown_on("1"):
        pass
    assert not any("<i" in text for text in sent) and [read(text) for text in sent] == [EVIL, f"left out: {EVIL}\nand more", "nothing was left out"]

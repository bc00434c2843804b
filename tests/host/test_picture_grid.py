"""Picture Grid: where every pixel goes, what a label costs, and what is refused."""

import random

import pytest
import torch
from comfyui_trilora.tests.host.tiny_run import run_node


@pytest.fixture(scope="module")
def grid(pack_module):
    return pack_module("nodes.picture_grid").grid


def pictures(*sizes: tuple[int, int], channels: int = 3) -> list[torch.Tensor]:
    """Random pictures between 0.1 and 0.9, so that neither white nor black is in them."""
    generator = torch.Generator().manual_seed(len(sizes))
    return [0.1 + 0.8 * torch.rand((*size, channels), generator=generator) for size in sizes]


def found(whole: torch.Tensor, picture: torch.Tensor) -> tuple[int, int]:
    """(top, left) of the one place where a picture's pixels stand in a larger one."""
    height, width = picture.shape[:2]
    places = [(int(top), int(left)) for top, left in torch.nonzero((whole == picture[0, 0]).all(dim=2))]
    (place,) = [(top, left) for top, left in places if torch.equal(whole[top:top + height, left:left + width], picture)]
    return place


@pytest.mark.parametrize("seed", range(4))
def test_every_picture_stands_whole_in_its_cell(grid, seed):
    """Row by row, cells apart and as large as the largest, smaller pictures in the middle, everything else white."""
    draw = random.Random(seed)
    sizes = [(draw.randint(20, 60), draw.randint(20, 60)) for _ in range(draw.randint(2, 7))]
    shown, columns = pictures(*sizes), draw.randint(1, 8)
    whole = grid(shown, [], columns)
    columns = min(columns, len(shown))
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    gap = (whole.shape[1] - columns * width) // (columns + 1)
    assert gap >= 2 and whole.shape == (-(-len(shown) // columns) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    for number, picture in enumerate(shown):
        top, left = found(whole, picture)
        row, column = divmod(number, columns)
        assert top == gap + row * (height + gap) + (height - picture.shape[0]) // 2
        assert left == gap + column * (width + gap) + (width - picture.shape[1]) // 2
        whole[top:top + picture.shape[0], left:left + picture.shape[1]] = 1.0
    assert (whole == 1.0).all()


def test_labels_stand_above_their_pictures(grid):
    shown = pictures(*[(64, 96)] * 4)
    plain, labelled = grid(shown, [], 2), grid(shown, ["upper", "", "", "In-Block1, Out-Block2 " * 4], 2)
    assert labelled.shape[0] > plain.shape[0] and labelled.shape[1] == plain.shape[1]
    tops = []
    for number, picture in enumerate(shown):
        top, left = found(labelled, picture)
        above = labelled[(tops[number - 2] + 64 if number > 1 else 0):top, left:left + 96]
        assert bool((above < 0.5).any()) is (number in (0, 3))
        tops.append(top)
    assert tops[0] == tops[1] and tops[2] == tops[3]
    assert tops[2] - tops[0] - 64 > tops[0], "a long label takes several lines"


def test_a_row_without_labels_has_no_strip(grid):
    shown = pictures((30, 40), (30, 40))
    plain, first = grid(shown, [], 1), grid(shown, ["one"], 1)
    (top, _), (plain_top, _) = found(first, shown[0]), found(plain, shown[0])
    assert first.shape[0] - plain.shape[0] == top - plain_top > 0


def test_other_labels_are_other_pictures(grid):
    (shown,) = pictures((50, 120))
    assert not torch.equal(grid([shown], ["upper"], 1), grid([shown], ["lower"], 1))
    assert torch.equal(grid([shown], ["  upper "], 1), grid([shown], ["upper"], 1))


@pytest.mark.parametrize("text", ["Wolfeschlegelsteinhausenbergerdorff", "a b c d e f g h i j k l m n", "ß é λ Ж", "one"])
def test_lines_fit_and_nothing_of_a_label_is_lost(pack_module, text):
    lines = pack_module("nodes.picture_grid").wrapped(text, lambda line: len(line) <= 7)
    assert all(0 < len(line) <= 7 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_the_node_takes_batches_in_the_order_of_its_inputs(host_nodes, grid):
    """Ten pictures by nine inputs, one a batch of two with an alpha channel, given in another order."""
    shown = pictures(*[(16, 24)] * 10)
    inputs = {f"picture_{n}": shown[n][None] for n in range(9, 2, -1)}
    alpha = torch.cat([torch.stack(shown[1:3]), torch.full((2, 16, 24, 1), 0.25)], dim=3)
    (whole,) = run_node(host_nodes, "TriLoRAPictureGrid", **inputs, picture_2=alpha, picture_1=shown[0][None], columns=5)
    assert torch.equal(whole, grid(shown, [], 5)[None])


def test_a_label_too_many_is_named(host_nodes):
    (shown,) = pictures((16, 24))
    with pytest.raises(ValueError, match=r"labels: 3 lines for 1 picture \('two / three' has none\)"):
        run_node(host_nodes, "TriLoRAPictureGrid", picture_1=shown[None], labels="one\ntwo\nthree")
    assert run_node(host_nodes, "TriLoRAPictureGrid", picture_1=shown[None], labels="one\n\n")[0].shape[0] == 1

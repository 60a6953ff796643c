"""The loss by which queries know what a mask covers, and masks of one image are told from each other."""

from math import exp, log

import pytest
import torch

from trl_recipes.mask_regions import GAIN, OTHERS_WEIGHT, MaskRegions, mean_on_masks, shares_of_queries

SIDES = [1, 2, 4]


def corner(row: int, column: int, side: int = 16) -> torch.Tensor:
    mask = torch.zeros(side, side)
    half = side // 2
    mask[row * half : (row + 1) * half, column * half : (column + 1) * half] = 1
    return mask


def saying(regions: MaskRegions, shares: torch.Tensor, strength: float = 6.0) -> torch.Tensor:
    """Hidden states whose logits are about +-strength by what is covered."""
    wanted = torch.where(shares > 0.5, strength, -strength)[..., None]
    return (wanted - regions.logits(torch.zeros(len(regions.direction)))) / GAIN * regions.direction


def test_shares_are_of_the_cells_of_every_scale():
    shares = shares_of_queries(corner(0, 1)[None], SIDES)
    expected = [0.25, 0, 1, 0, 0] + [0, 0, 1, 1] * 2 + [0] * 8
    torch.testing.assert_close(shares, torch.tensor([expected]))


def test_the_loss_is_low_where_queries_say_what_is_covered():
    regions = MaskRegions(8, SIDES)
    shares = shares_of_queries(torch.stack([corner(0, 1), corner(1, 0)]), SIDES)
    hidden, images = saying(regions, shares), torch.tensor([0, 0])
    right, swapped = regions(hidden, shares, images), regions(hidden.flip(0), shares, images)
    silent = regions(torch.zeros(2, 21, 8), shares, images)
    assert right < 0.6 < silent < swapped  # of the one cell of the first scale a quarter is covered
    assert float(regions.logits(torch.zeros(8)).sigmoid()) == pytest.approx(0.1)


def test_only_masks_of_one_image_are_told_from_each_other():
    regions = MaskRegions(8, SIDES)
    shares = shares_of_queries(torch.stack([corner(0, 1), corner(1, 0)]), SIDES)[:, -16:]
    stubborn = torch.where(shares[:1] > 0, 5.0, -5.0).expand(2, -1)  # the same whatever is asked for
    assert regions.compare(stubborn, shares, torch.tensor([0, 1])) == 0
    assert regions.compare(stubborn, shares, torch.tensor([0, 0])) > 5
    listening = torch.where(shares > 0, 5.0, -5.0)
    assert regions.compare(listening, shares, torch.tensor([0, 0])) < 1e-3
    same = shares[:1].expand(2, -1)  # two requests for one thing contradict each other in nothing
    assert regions.compare(stubborn, same, torch.tensor([0, 0])) == 0


def test_a_thing_that_shows_nowhere_is_marked_nowhere():
    shares = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0.5, 0]])
    torch.testing.assert_close(mean_on_masks(torch.tensor([[0.9, 0, 0.3, 0]]), shares), torch.tensor([[0.0, 0.7]]))


def test_nothing_drawn_is_no_loss():
    regions = MaskRegions(8, SIDES)
    nothing = regions.compare(torch.zeros(1, 16), torch.zeros(1, 16), torch.tensor([0]))
    assert nothing == 0


def test_the_loss_is_the_one_that_is_worked_out_by_hand():
    """The last mask lies within the one before it and, in another image, upon the first."""
    regions = MaskRegions(8, [1, 2])
    shares = torch.tensor([[0.5, 1, 1, 0, 0], [1.0, 1, 1, 1, 1], [0.25, 1, 0, 0, 0]])
    images, hidden = [0, 0, 1], torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(regions(hidden, shares, torch.tensor(images)), by_hand(regions, hidden, shares, images))
    images = [0, 1, 1]
    torch.testing.assert_close(regions(hidden, shares, torch.tensor(images)), by_hand(regions, hidden, shares, images))


def by_hand(regions: MaskRegions, hidden: torch.Tensor, shares: torch.Tensor, images: list[int]) -> torch.Tensor:
    """The loss of masks of a scale of one cell and one of four."""
    logits, masks = regions.logits(hidden).tolist(), shares.tolist()
    cells = [
        [log(1 + exp(logit)) - share * logit for logit, share in zip(*pair, strict=True)]
        for pair in zip(logits, masks, strict=True)
    ]
    loss = (sum(row[0] for row in cells) / 3 + sum(sum(row[1:]) for row in cells) / 12) / 2

    def fit(i: int, j: int) -> float:  # of request i and mask j: the mean logit on the mask
        return exp(sum(a * b for a, b in zip(logits[i][1:], masks[j][1:], strict=True)) / sum(masks[j][1:]))

    def same(i: int, j: int) -> bool:  # more than half of mask j lies in mask i
        return sum(map(min, masks[i][1:], masks[j][1:])) / sum(masks[j][1:]) > 0.5

    for i in range(3):
        near = [j for j in range(3) if images[j] == images[i]]
        of_masks = sum(fit(i, j) for j in near if same(i, j)) / sum(fit(i, j) for j in near)
        of_requests = sum(fit(j, i) for j in near if same(j, i)) / sum(fit(j, i) for j in near)
        loss -= OTHERS_WEIGHT * (log(of_masks) + log(of_requests)) / 3
    return torch.tensor(loss)

"""Image features of things as if they had never been seen, for a language model that must not trust them too far.

A model knows the cut-outs that it was trained on far better than any others: their features are close to their names.
What learns to read these features learns to expect it, and takes a thing that is not close to its name for another, or
for none. So in some of the things the features of all cells are turned by one angle, away from what they are, towards
one direction that is partly another name's.
"""

import torch
from torch.nn import functional as F

FARTHEST = 1.5  # radians
OTHER_NAME = 0.75  # how long the other name is in the direction, beside a random one of length 1
SIDE_BY_SIDE = 3  # cells that show no one thing belong to one that is beside them


def make_unfamiliar(features: torch.Tensor, nouns: torch.Tensor, names: torch.Tensor, share: float) -> torch.Tensor:
    """Image features (S, cells, hidden) with some of the things turned; lengths stay about what they are.

    The half of the width that is near the names (see `WordRegions`) is turned by up to `FARTHEST`, the other half by
    half of that. Of one image, all things of one name are turned alike.

    Args:
        nouns: (S, cells), which name each cell shows, N for the background and -100 for none; see `WordList.of_cells`.
        names: unit vectors (N, hidden / 2) of the names.
        share: of the names in each image that are turned.
    """
    count, width = names.shape
    thing = thing_of_cells(nouns, background=count)
    shape = (len(features), count + 1)
    angle = FARTHEST * torch.rand(shape, device=features.device) * (torch.rand(shape, device=features.device) < share)
    angle[:, count] = 0.0
    other = torch.randint(count, shape, device=features.device).gather(1, thing)
    angle = angle.gather(1, thing)[..., None]
    directions = torch.randn(*shape, features.shape[-1], device=features.device)
    directions = directions.gather(1, thing[..., None].expand(-1, -1, features.shape[-1]))
    near, rest = directions.split([width, features.shape[-1] - width], dim=-1)
    near = F.normalize(near, dim=-1) + OTHER_NAME * names[other]
    first, second = features.float().split([width, features.shape[-1] - width], dim=-1)
    turned = torch.cat([turn(first, near, angle), turn(second, rest, angle / 2)], dim=-1)
    return turned.to(features.dtype)


def thing_of_cells(nouns: torch.Tensor, background: int) -> torch.Tensor:
    """Which name's thing each cell belongs to (S, cells): its own, or one beside it where it shows none; `background`
    for none."""
    side = round(nouns.shape[1] ** 0.5)
    own = nouns.masked_fill((nouns < 0) | (nouns == background), -1)
    beside = F.max_pool2d(own.view(-1, 1, side, side).float(), SIDE_BY_SIDE, stride=1, padding=SIDE_BY_SIDE // 2)
    own = torch.where(nouns < 0, beside.view_as(own).long(), own)
    return own.masked_fill(own < 0, background)


def turn(vectors: torch.Tensor, towards: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Vectors (..., d) mixed with a direction (..., d) of the same length, as far as an angle (..., 1) says."""
    length = vectors.norm(dim=-1, keepdim=True)
    return angle.cos() * vectors + angle.sin() * length * F.normalize(towards, dim=-1)

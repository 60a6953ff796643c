"""Settings of the composed scenes and the named presets of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "easy": {"min_objects": 1, "max_objects": 2, "min_scale": 0.4, "max_scale": 0.85},
    "medium": {"min_objects": 1, "max_objects": 4, "min_scale": 0.25, "max_scale": 0.7},
    "full": {"min_objects": 1, "max_objects": 6, "min_scale": 0.15, "max_scale": 0.6},
    "names": {
        "min_objects": 4,
        "max_objects": 6,
        "min_scale": 0.2,
        "max_scale": 0.5,
        "group_share": 0.25,
        "only_names": True,
    },
}


@dataclass(frozen=True)
class SceneConfig:
    """How scenes are composed. Lengths called scale are fractions of `image_size`.

    Attributes:
        only_names: everything is asked for by its name, and things that are not there; no other kind of request.
        image_size: side of the square picture, pixels.
        min_objects: fewest objects in a scene.
        max_objects: most objects in a scene.
        min_scale: longest side of the smallest object.
        max_scale: longest side of the largest object.
        group_share: share of the scenes with two or more objects that hold several of one noun.
        photo_share: relative weight of photographic cut-outs.
        render_share: relative weight of rendered models.
        stylised_share: relative weight of drawn and stylised objects.
        min_visible: least visible share of an object's in-frame area for it to be a target.
        min_target_pixels: least visible area of a target, as a fraction of the picture.
        overflow: most of an object's side that may lie beyond the picture's edge.
        overflow_share: share of the objects that may reach over an edge.
        shadow_share: share of the scenes with contact shadows.
        flip_share: chance that a sprite is mirrored.
        warp: how far a sprite's corners are pulled about, as a share of its sides; makes more of few cut-outs, for
            training.
        gradient_share: chance of a light gradient over the picture.
        jitter: strength of the brightness and tint jitter (0 = off; 1 = as intended).
        blur_share: chance of a slight blur.
        noise_share: chance of sensor noise.
        jpeg_share: chance of JPEG compression.
        jpeg_quality: lowest and highest JPEG quality.
    """

    only_names: bool = False
    image_size: int = 256
    min_objects: int = 1
    max_objects: int = 6
    min_scale: float = 0.15
    max_scale: float = 0.6
    group_share: float = 0.62
    photo_share: float = 0.44
    render_share: float = 0.40
    stylised_share: float = 0.16
    min_visible: float = 0.3
    min_target_pixels: float = 0.0008
    overflow: float = 0.3
    overflow_share: float = 0.12
    shadow_share: float = 0.85
    flip_share: float = 0.5
    warp: float = 0.0
    gradient_share: float = 0.6
    jitter: float = 1.0
    blur_share: float = 0.3
    noise_share: float = 0.6
    jpeg_share: float = 0.9
    jpeg_quality: tuple[int, int] = (45, 96)

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= 250:
            raise ValueError(
                f"min_objects={self.min_objects} and max_objects={self.max_objects} must satisfy "
                "1 <= min_objects <= max_objects <= 250."
            )
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale={self.min_scale} and max_scale={self.max_scale} must satisfy "
                "0 < min_scale <= max_scale <= 1."
            )
        if self.image_size < 32:
            raise ValueError(f"image_size={self.image_size} is too small for a scene; use 32 or more.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SceneConfig:
        """A preset ("easy", "medium", "full", "names") with some fields changed."""
        return cls().with_preset(name, **changes)

    def with_preset(self, name: str, **changes: Any) -> SceneConfig:
        """This configuration with a preset's number and sizes of objects; the other fields stay.

        Raises:
            ValueError: the preset or a field is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
        unknown = set(changes) - {one.name for one in fields(self)}
        if unknown:
            raise ValueError(f"SceneConfig has no field {', '.join(sorted(unknown))}.")
        return replace(self, **{**PRESETS[name], **changes})

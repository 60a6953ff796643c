"""A learning curve as a picture: training loss, and what validation measured, over the steps."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 60, 60, 40, 46
COLOURS = {"loss": (150, 150, 150), "giou": (204, 0, 80), "ciou": (0, 96, 192), "n_acc": (0, 140, 90)}
LABELS = {"loss": "training loss", "giou": "gIoU", "ciou": "cIoU", "n_acc": "N-acc"}


def learning_curve(losses: Sequence[tuple[float, float]], metrics: Sequence[dict[str, float]]) -> Image.Image:
    """One picture with two axes: metrics in 0..1 on the left, the loss on the right.

    Args:
        losses: (step, loss) of the training.
        metrics: `step` and values of each evaluation.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    last = max([1.0, *(step for step, _ in losses), *(entry["step"] for entry in metrics)])
    ceiling = max([1e-6, *(loss for _, loss in losses)]) * 1.05
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(step: float, share: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * step / last, bottom - (bottom - TOP) * share

    for tenth in range(0, 11, 2):
        y = place(0, tenth / 10)[1]
        draw.line([(LEFT, y), (right, y)], fill=(230, 230, 230))
        draw.text((LEFT - 28, y - 8), f"{tenth / 10:.1f}", fill="black", font=font)
        draw.text((right + 6, y - 8), f"{ceiling * tenth / 10:.3g}", fill=COLOURS["loss"], font=font)
        x = place(last * tenth / 10, 0)[0]
        draw.text((x - 10, bottom + 6), f"{last * tenth / 10:.0f}", fill="black", font=font)
    draw.text(((LEFT + right) / 2 - 14, bottom + 24), "steps", fill="black", font=font)
    series = {"loss": [place(step, loss / ceiling) for step, loss in losses]}
    for name in ("giou", "ciou", "n_acc"):
        series[name] = [place(entry["step"], entry[name]) for entry in metrics if name in entry]
    x = float(LEFT)
    for name, points in series.items():
        if not points:
            continue
        draw.line(points, fill=COLOURS[name], width=1 if name == "loss" else 3)
        for px, py in points if name != "loss" else ():
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=COLOURS[name])
        draw.text((x, 12), LABELS[name], fill=COLOURS[name], font=font)
        x += draw.textlength(LABELS[name], font=font) + 24
    return picture

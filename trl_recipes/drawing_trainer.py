"""`Trainer` for models that draw: the head runs at the answers alone, both parts of the loss are logged, and evaluation
draws masks instead of measuring a loss."""

from typing import Any

import torch
from transformers import Trainer


class DrawingTrainer(Trainer):
    """Subclasses say in `evaluate_drawing` what is drawn and measured.

    A batch may hold `image_index` (B,): which of the images in `pixel_values` each row is about; each image is then
    read once, however many rows ask about it. Without it there is one image for each row.
    """

    def evaluate_drawing(self) -> dict[str, float]:
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        index = inputs.pop("image_index", None)
        if index is not None:
            image = model.get_image_features(inputs.pop("pixel_values"))
            image.pooler_output = image.pooler_output[index]
            inputs["mm_encoder_outputs"] = {"image": image}
        answers = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))  # the head runs only there
        outputs = model(**inputs, logits_to_keep=answers)
        if model.training and (self.state.global_step + 1) % self.state.logging_steps == 0:  # this step is logged
            self._parts = {
                "text_loss": round(float(outputs.text_loss.detach()), 4),
                "visual_loss": round(float(outputs.visual_loss.detach()), 4),
            }
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **getattr(self, "_parts", {})}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        found = self.evaluate_drawing()
        self.model.train()
        metrics = {f"{metric_key_prefix}_{name}": round(value, 4) for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

"""`Trainer` for models that draw: the head runs at the answers alone, both parts of the loss are logged, and evaluation
draws masks instead of measuring a loss."""

from typing import Any

import torch
from transformers import DynamicCache, Trainer

from .mask_regions import at_queries


class DrawingEvaluation(Trainer):
    """Evaluates by drawing; subclasses say in `evaluate_drawing` what is drawn and measured."""

    def evaluate_drawing(self) -> dict[str, float]:
        raise NotImplementedError

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        found = self.evaluate_drawing()
        metrics = {f"{metric_key_prefix}_{name}": round(value, 4) for name, value in found.items()}
        self.model.eval()  # by which some trainers tell what is logged
        self.log(metrics)
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class DrawingTrainer(DrawingEvaluation):
    """The loss of models that draw.

    A batch may hold `image_index` (B,): which of the images in `pixel_values` each row is about; each image is then
    read once, however many rows ask about it. Without it there is one image for each row. It may also hold, under
    `words`, rows of another length that draw nothing, on the same images; the loss is that of one batch with all rows.

    With `shared_length`, all rows begin with the same so many tokens, up to the image and no label among them: the
    language model, too, reads these once for each image. (Not with gradient checkpointing, which keeps no cache.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[str, float] = {}

    def extra_loss(self, model: Any, image: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A loss on image features, to be added; takes what it needs out of `inputs`. What it leaves in `image` is what
        the rows are about."""
        return None

    def query_loss(self, hidden: torch.Tensor, images: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """A loss on the last hidden states (N, T, hidden) at the queries of the pictures, one in each row, to be added;
        asked for where a batch holds `mask_shares`, here `shares` (N, T). `images` (N,): which image each is about."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with self.accelerator.autocast():  # which otherwise covers `model.forward` alone
            parts, logged = [inputs], {}
            shares, images = inputs.pop("mask_shares", None), inputs.get("image_index")
            if "image_index" in inputs:
                image = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
                extra = self.extra_loss(model, image, inputs)
                if extra is not None:
                    logged["word_region_loss"] = extra
                shared = inputs.pop("shared_length", 0)
                parts = [inputs, inputs.pop("words")] if "words" in inputs else [inputs]
                if shared and not self.args.gradient_checkpointing:
                    parts = go_on(model.base_model, image, parts, shared)
                else:
                    parts = [about(image, part) for part in parts]
            for part in parts:  # the head runs only at answers; a cache would be filled for nothing
                part["use_cache"] = "cache" in part
                part["logits_to_keep"] = before_labels(part["labels"])
            parts[0]["output_hidden_states"] = shares is not None
            outputs = [model(**part) for part in parts]
            loss, text_loss = self.whole_loss(outputs, parts)
            if shares is not None:
                unwrapped = self.accelerator.unwrap_model(model)
                hidden, rows = at_queries(unwrapped, outputs[0].hidden_states[-1], parts[0]["input_ids"])
                learned = (parts[0]["labels"][rows] != -100).any(1)  # other rows only fill up the batch
                rows = rows[learned]
                logged["mask_region_loss"] = self.query_loss(hidden[learned], images[rows], shares[rows])
            loss = sum(logged.values(), start=loss)
            logged |= {"text_loss": text_loss, "visual_loss": outputs[0].visual_loss}
        if model.training and (self.state.global_step + 1) % self.state.logging_steps == 0:  # this step is logged
            self._parts = {name: round(float(value.detach()), 4) for name, value in logged.items()}
        outputs[0].loss = loss
        return (loss, outputs[0]) if return_outputs else loss

    def whole_loss(self, outputs: list[Any], parts: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and text loss of all parts, the first of which may draw: text labels count alike wherever they are."""
        first = outputs[0]
        if len(outputs) == 1:
            return first.loss, first.text_loss
        config = self.accelerator.unwrap_model(self.model).config
        labels = [part["labels"][:, 1:] for part in parts]
        counts = [((one != -100) & ~config.is_visual(one)).sum() for one in labels]
        text = sum(out.text_loss * count for out, count in zip(outputs, counts, strict=True)) / sum(counts).clamp(min=1)
        return text + config.visual_loss_weight * first.visual_loss, text

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs, self._parts = {**logs, **self._parts}, {}
        super().log(logs, *args, **kwargs)


def before_labels(labels: torch.Tensor) -> torch.Tensor:
    """Which positions (B, L) predict a label (B, L)."""
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


def go_on(model: Any, image: Any, parts: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The inputs of parts of a batch after their first `length` tokens, with what the model keeps of these, read once
    for each image."""
    ids = parts[0]["input_ids"][:1, :length].expand(len(image.pooler_output), -1)
    read = DynamicCache()
    model(input_ids=ids, mm_encoder_outputs={"image": image}, cache=read, use_cache=True)
    rest = []
    for part in parts:
        part, own = dict(part), DynamicCache()
        index = part.pop("image_index")
        for number, layer in enumerate(read.layers):
            own.update(layer.keys.index_select(0, index), layer.values.index_select(0, index), number)
        rest.append(part | {name: part[name][:, length:] for name in ("input_ids", "labels")})
        rest[-1]["cache"] = own
    return rest


def about(image: Any, part: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a part of a batch, with the features of the image that each of its rows is about."""
    part = dict(part)
    own = type(image)(pooler_output=image.pooler_output[part.pop("image_index")])
    return part | {"mm_encoder_outputs": {"image": own}}

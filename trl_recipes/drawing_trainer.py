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

    Labels of text, and those of pictures, count alike wherever they are in an optimizer step: its loss is that of all
    its rows in one batch, however they are split into batches to be accumulated and among processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._usual_labels: torch.Tensor | None = None  # of text, and of pictures: mean number in a batch of this step
        self._logged: dict[str, torch.Tensor] = {}  # parts of the loss, summed up since they were logged
        self._steps = 0  # since then
        self._batches_of_step = 1

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.count_labels(batch).to(device) for batch in batches]
        if counts:
            self._batches_of_step, self._steps = len(batches), self._steps + 1
            self._usual_labels = self.accelerator.gather(torch.stack(counts).float().mean(0)[None]).mean(0)
        return batches, items

    def count_labels(self, *parts: dict[str, Any]) -> torch.Tensor:
        """How many labels (2,) of text and of pictures there are in parts of a batch, and in their `words`."""
        config = self.accelerator.unwrap_model(self.model).config
        every = [*parts, *(part["words"] for part in parts if "words" in part)]
        labels = torch.cat([part["labels"][:, 1:].flatten() for part in every])
        visual = config.is_visual(labels)
        return torch.stack([((labels != -100) & ~visual).sum(), visual.sum()])

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
            text_loss, visual_loss = self.text_and_visual_loss(outputs, parts)
            if shares is not None:
                unwrapped = self.accelerator.unwrap_model(model)
                hidden, rows = at_queries(unwrapped, outputs[0].hidden_states[-1], parts[0]["input_ids"])
                learned = (parts[0]["labels"][rows] != -100).any(1)  # other rows only fill up the batch
                rows = rows[learned]
                logged["mask_region_loss"] = self.query_loss(hidden[learned], images[rows], shares[rows])
            weight = self.accelerator.unwrap_model(model).config.visual_loss_weight
            loss = sum(logged.values(), start=text_loss + weight * visual_loss)
            logged |= {"text_loss": text_loss, "visual_loss": visual_loss}
        if model.training:
            share = 1 / self._batches_of_step
            self._logged |= {name: self._logged.get(name, 0) + share * value.detach() for name, value in logged.items()}
        outputs[0].loss = loss
        return (loss, outputs[0]) if return_outputs else loss

    def text_and_visual_loss(
        self, outputs: list[Any], parts: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the text and of the pictures of all parts, only the first of which may draw, weighted so that their
        means over the batches of an optimizer step are means over its labels."""
        counts = [self.count_labels(part) for part in parts]
        text, visual = sum(counts)
        text_loss = outputs[0].text_loss
        if len(outputs) > 1:
            sums = (out.text_loss * count[0] for out, count in zip(outputs, counts, strict=True))
            text_loss = sum(sums) / text.clamp(min=1)
        if self._usual_labels is None:  # not in training
            return text_loss, outputs[0].visual_loss
        weights = torch.stack([text, visual]) / self._usual_labels.clamp(min=1e-6)
        return text_loss * weights[0], outputs[0].visual_loss * weights[1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._logged:
            means = torch.stack([total.float() for total in self._logged.values()]) / max(self._steps, 1)
            means = self.accelerator.gather(means[None]).mean(0).tolist()
            logs = logs | {name: round(mean, 4) for name, mean in zip(self._logged, means, strict=True)}
            self._logged, self._steps = {}, 0
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

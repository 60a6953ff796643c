"""What the training commands ask of their options before anything is made or trained."""

from transformers import TrainingArguments


def refuse_many_processes(training: TrainingArguments) -> None:
    """For trainers that call more of the model than `forward`, which a wrapped model has not.

    Raises:
        ValueError: there are several processes, or one with several GPUs.
    """
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            "this command trains in one process, on one GPU: start it without accelerate launch, and with "
            "CUDA_VISIBLE_DEVICES=0 before it"
        )

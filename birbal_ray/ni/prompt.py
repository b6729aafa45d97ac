"""Few-shot prompts, byte for byte as the published recipe built them."""

from __future__ import annotations

from birbal_ray.ni.schema import Task, TaskError

PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
STOP = "\n\n"
DEFAULT_NUM_SHOTS = 4


def shared_prefix(task: Task, num_shots: int = DEFAULT_NUM_SHOTS, *, strict: bool = False) -> str:
    """What all prompts of a task begin with: preamble, definition, positive examples in file order.

    At most `num_shots` examples. With `strict`, a task that has fewer raises TaskError.
    """
    if strict and len(task.positive_examples) < num_shots:
        raise TaskError(
            f"{task.name}.json: 'Positive Examples' has {len(task.positive_examples)} "
            f"{'entry' if len(task.positive_examples) == 1 else 'entries'}, num_shots is {num_shots}"
        )
    shots = "".join(
        f"### Input:\n{example.input}\n\n### Response:\n{example.output}\n\n"
        for example in task.positive_examples[:num_shots]
    )
    return f"{PREAMBLE}\n\n### Instruction:\n{task.definition}\n\n{shots}"


def own_part(text: str) -> str:
    """What follows the shared prefix for one input."""
    return f"### Input:\n{text}\n\n### Response:\n"


def training_prefix(instruction: str) -> str:
    """What all prompts of a task begin with in the training format; empty for a blank instruction."""
    return f"### Instruction:\n{instruction}\n\n" if instruction.strip() else ""


def few_shot_prompt(task: Task, text: str, num_shots: int = DEFAULT_NUM_SHOTS) -> str:
    """The whole prompt for one input of a task."""
    return shared_prefix(task, num_shots) + own_part(text)


def extract_answer(completion: str) -> str:
    """What is compared with the references: the text before the first blank line, outer white space removed."""
    return completion.split(STOP, 1)[0].strip()

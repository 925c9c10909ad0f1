"""Prompts and rewards of GSM8K for `grpo.yaml`: Axolotl imports this file by its name."""

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def transform(cfg, *args, **kwargs):
    """Return how a row of GSM8K becomes a prompt, with the number that is its answer."""

    def row(example, tokenizer=None):
        answer = example["answer"].rpartition("####")[2].strip()
        return {"prompt": example["question"] + "\nAnswer: ", "answer": answer}

    return row, {"remove_columns": ["question"]}


def right_number(prompts, completions, answer, **kwargs):
    """Reward 1 for a completion whose last number is the answer, else 0."""
    found = (_NUMBER.findall(text) for text in completions)
    return [
        float(bool(numbers) and numbers[-1].replace(",", "") == wanted.replace(",", ""))
        for numbers, wanted in zip(found, answer, strict=True)
    ]

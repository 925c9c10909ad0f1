"""Tune an image classifier on a quantized encoder (ViT): the blocks at 4 bits, a new head on top.

    pip install pillow torchvision
    python recipes/multimodal/image_classifier.py --out out/beans [--model M] [--data D] [--cpu]

The data have the columns `image` and `labels`.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForImageClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    set_seed,
)

from qalora_plugin import MergeCallback, QALoRAConfig, quantize_model, verify_merge


def main(options):
    set_seed(0)  # the head is new
    out, base = Path(options.out), Path(options.out) / "base"
    if not base.exists():
        quantize_model(options.model, base, bits=4, group_size=32, method="rtn")
    data = load_dataset(options.data, split="train")
    labels = dict(enumerate(data.features["labels"].names))
    processor = AutoProcessor.from_pretrained(base)

    def pixels(rows):
        images = [image.convert("RGB") for image in rows["image"]]
        return {**processor(images, return_tensors="pt"), "labels": rows["labels"]}

    model = AutoModelForImageClassification.from_pretrained(
        base, id2label=labels, label2id={name: number for number, name in labels.items()}
    )
    trainer = Trainer(
        get_peft_model(model, QALoRAConfig(r=16, lora_alpha=16, modules_to_save=["classifier"])),
        args=TrainingArguments(
            str(out / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=5e-3,
            use_cpu=options.cpu,
            remove_unused_columns=False,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=data.with_transform(pixels),
        processing_class=processor,
        callbacks=[MergeCallback(out / "merged")],
    )
    trainer.train()
    print(verify_merge(out / "merged", out / "run" / "adapter", base).as_text())
    return trainer


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("--data", default="AI-Lab-Makerere/beans")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())

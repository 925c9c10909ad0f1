"""Tune a vision-language model: its language model at 4 bits, its vision tower as it is.

    pip install pillow torchvision
    python recipes/multimodal/vision_language.py --out out/smolvlm [--model M] [--data D] [--cpu]

The data have columns as TRL takes them: `images`, and `prompt` and `completion` as messages.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, quantize_model, verify_merge


def main(options):
    out, base = Path(options.out), Path(options.out) / "base"
    data = load_dataset(options.data, split="train")
    if not base.exists():
        answers = data.select_columns(["completion"]).select(range(min(len(data), 2000)))
        texts = [row["completion"][-1]["content"] for row in answers]
        windows = {"calibration": texts, "seq_len": options.calibration_seq_len}
        quantize_model(options.model, base, bits=4, group_size=32, **windows)
    dtype = "float32" if options.cpu else "bfloat16"
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(base, dtype=dtype),
        args=SFTConfig(
            str(out / "run"),
            max_length=None,  # a cut would part images from their tokens
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            use_cpu=options.cpu,
            bf16=not options.cpu,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(base),
        peft_config=QALoRAConfig(r=16, lora_alpha=16, adapt="both", task_type="CAUSAL_LM"),
        callbacks=[MergeCallback(out / "merged")],
    )
    trainer.train()
    print(verify_merge(out / "merged", out / "run" / "adapter", base).as_text())
    return trainer


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-256M-Instruct")
    parser.add_argument("--data", default="trl-lib/llava-instruct-mix")
    parser.add_argument("--out", required=True)
    parser.add_argument("--calibration-seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())

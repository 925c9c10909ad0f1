"""Run the recipes of recipes/multimodal on tiny random models: drive.py WORK -> JSON.

Executed in an environment with Pillow. Models, processors and images are made here, offline.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    ViTConfig,
    ViTModel,
)
from transformers.models import idefics3, vit
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qalora_plugin import export_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.format import exports
from qalora_plugin.errors import QALoRAError

# transformers 5.16 hides these without torchvision, which a comment in their files names
idefics3.Idefics3ImageProcessorPil = Idefics3ImageProcessorPil
vit.ViTImageProcessorPil = ViTImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "qalora_plugin" / "quickstart" / "base_model"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BLOCK = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def recipe(name):
    """Import a recipe by its file."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"recipes/multimodal/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(number):
    """Return the pixels of an image, uint8 [32, 32, 3], that is darker for odd numbers."""
    noise = np.random.default_rng(number).integers(0, 100, (32, 32, 3))
    return (noise + (0 if number % 2 else 150)).astype(np.uint8)


def make_vision_language(folder):
    """Write a tiny SmolVLM (Idefics3) with its processor, and conversations about images."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    edge = {"longest_edge": 32}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    text = BLOCK | {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama"}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = Idefics3Config(
        text_config=text,
        vision_config=BLOCK | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    rows = [
        {
            "images": [picture(n)],
            "prompt": [{"role": "user", "content": "is it dark?"}],
            "completion": [{"role": "assistant", "content": ["no", "yes"][n % 2] * 3}],
        }
        for n in range(8)
    ]
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": [Image()], "prompt": message, "completion": message})
    (folder / "pairs").mkdir()
    Dataset.from_list(rows, features).to_parquet(folder / "pairs" / "train.parquet")


def make_encoder(folder):
    """Write a tiny ViT without a head, with its processor, and labelled images."""
    torch.manual_seed(0)
    config = ViTConfig(**BLOCK, num_attention_heads=4, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    rows = [{"image": picture(n), "labels": n % 2} for n in range(8)]
    features = Features({"image": Image(), "labels": ClassLabel(names=["bright", "dark"])})
    (folder / "pictures").mkdir()
    Dataset.from_list(rows, features).to_parquet(folder / "pictures" / "train.parquet")


def differing(one, other):
    """Return the names of the tensors that two directories do not have in common, bit for bit.

    A base without a head has names without the model's prefix, and its merge keeps them, and the
    pooler that a classifier leaves out.
    """
    files = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    one, other = ({name.removeprefix("vit."): t for name, t in file.items()} for file in files)
    names = {name for name in one.keys() | other.keys() if not name.startswith("pooler.")}
    return sorted(
        n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])
    )


@torch.no_grad()
def compare(auto_class, trainer, out, inputs):
    """Compare what was trained with the merge of files, and that with a merge in memory."""
    trained = trainer.model.eval()(**inputs).logits
    merged = auto_class.from_pretrained(out / "merged", dtype=torch.float32)
    again = auto_class.from_pretrained(out / "base", dtype=torch.float32, **head(trainer))
    start = again(**inputs).logits
    loaded = PeftModel.from_pretrained(again, out / "run" / "adapter")
    loaded.merge_and_unload().save_pretrained(out / "memory")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "equal": torch.equal(trained, merged.eval()(**inputs).logits),
        "moved": not torch.equal(trained, start),
        "differing": differing(out / "merged", out / "memory"),
        "layers": sorted(open_quantized(out / "merged").layers),
        "losses": losses,
        "class": type(merged).__name__,
        "labels": merged.config.id2label,
    }


def head(trainer):
    """Return what a new head is made of, where there is one."""
    config = trainer.model.get_base_model().config
    return {} if hasattr(config, "text_config") else {"num_labels": config.num_labels}


def exported(out):
    """Try every export; the message of those that refuse."""
    found = {}
    for format in exports():
        source = out / "run" / "adapter" if format.of_adapter else out / "merged"
        try:
            path = format.beside(out / "merged")
            found[format.name] = export_model(source, path, format.name).layers
        except QALoRAError as error:
            found[format.name] = f"{type(error).__name__}: {error}"
    return found


def vision_language(work):
    make_vision_language(work)
    module, out = recipe("vision_language"), work / "smolvlm"
    data = ["--model", str(work / "vlm"), "--data", str(work / "pairs"), "--out", str(out)]
    small = ["--cpu", "--steps", "6", "--batch", "4", "--calibration-seq-len", "16"]
    small += ["--learning-rate", "0.02"]
    trainer = module.main(module.parse([*data, *small]))
    processor = AutoProcessor.from_pretrained(out / "merged")
    content = [{"type": "image"}, {"type": "text", "text": "is it dark?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(text=text, images=[picture(3)], return_tensors="pt")
    found = compare(AutoModelForImageTextToText, trainer, out, inputs)
    return found | {"exports": exported(out), "pixels": list(inputs["pixel_values"].shape)}


def image_classifier(work):
    make_encoder(work)
    module, out = recipe("image_classifier"), work / "beans"
    data = ["--model", str(work / "vit"), "--data", str(work / "pictures"), "--out", str(out)]
    trainer = module.main(module.parse([*data, "--cpu", "--steps", "12", "--batch", "4"]))
    inputs = AutoProcessor.from_pretrained(out / "merged")([picture(3)], return_tensors="pt")
    return compare(AutoModelForImageClassification, trainer, out, inputs)


if __name__ == "__main__":
    work = Path(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        results = {step.__name__: step(work) for step in (vision_language, image_classifier)}
    print(json.dumps(results))

"""Train a few steps as a user does, with TensorBoard, trackio and wandb, and read what each stored.

    python train.py PACKAGES FOLDER      PACKAGES: site-packages with the three

Writes FOLDER/stored.json: {tracker: {name: [value of each step]}, "asked": [addresses that were not
on this machine]}.
"""

import json
import struct
import sys
import time
from pathlib import Path

packages, folder = sys.argv[1:]
sys.path.append(packages)  # behind our own: these have torch's and transformers' dependencies too
ASKED = []


def watch(event, arguments):
    """Note what looks for another machine."""
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", "127.0.0.1"):
        ASKED.append(str(arguments[0]))
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
        if host not in ("127.0.0.1", "::1", "localhost"):
            ASKED.append(host)


sys.addaudithook(watch)

from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from qalora_plugin import FiguresCallback, QALoRAConfig  # noqa: E402
from qalora_plugin.quickstart.embedded import base_model_path  # noqa: E402

STEPS, RUN = 3, "run"
_LOG_BLOCK = 1 << 15


def train(base):
    """Train an adapter on the quantized quickstart model."""
    trainer = SFTTrainer(
        str(base),
        args=SFTConfig(
            str(Path(folder, "out")),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            max_length=32,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            report_to=["tensorboard", "trackio", "wandb"],
            project="qalora",
            run_name=RUN,
        ),
        train_dataset=Dataset.from_dict({"text": [f"row {i}: one two three" for i in range(8)]}),
        processing_class=AutoTokenizer.from_pretrained(base_model_path()),
        peft_config=QALoRAConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.add_callback(FiguresCallback(trainer))
    trainer.train()


def of_tensorboard():
    """Read TensorBoard's event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = Path(folder, "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {
        name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def of_trackio():
    """Read trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    return _columns(SQLiteStorage.get_logs("qalora", RUN))


def of_wandb():
    """Read the file that wandb leaves where it is offline."""
    import wandb

    wandb.finish()  # its own process writes the rest of the file, on a busy machine after this
    [file] = Path(folder).rglob("*.wandb")
    end = time.monotonic() + 60
    while True:
        rows = _history(file.read_bytes())
        if sum("train/loss" in row for row in rows) == STEPS or time.monotonic() > end:
            return _columns(rows)
        time.sleep(0.5)


def _history(data):
    """Return what was logged, a row a step."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for part in _records(data):
        record = Record()
        record.ParseFromString(part)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in items
            })  # fmt: skip
    return rows


def _records(data):
    """Yield the records of a log in LevelDB's format, which wandb begins with 7 bytes more."""
    at, record = 7, b""
    while at + 7 <= len(data):
        rest = _LOG_BLOCK - at % _LOG_BLOCK
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # it is being written
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def _columns(rows):
    """Return the numbers of rows by name."""
    found = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return found


if __name__ == "__main__":
    from qalora_plugin import quantize_model

    made = quantize_model(base_model_path(), Path(folder, "base"), method="rtn", progress=False)
    train(made.out)
    stored = {"tensorboard": of_tensorboard(), "trackio": of_trackio(), "wandb": of_wandb()}
    Path(folder, "stored.json").write_text(json.dumps(stored | {"asked": ASKED}))

"""A GGUF file is trained by its name, and comes back with other minima."""

import numpy as np
import pytest
from support.gguf_files import write_gguf

from qalora_plugin import MergeCallback, QALoRAConfig, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError, ConfigError, OutputError
from qalora_plugin.verify.export import verify_export


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A GGUF file with one layer in eight bits, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "model.gguf", kinds={"ffn_down": "Q8_0"})


def test_the_file_comes_back(file, make_trainer, tmp_path):
    callback = MergeCallback(tmp_path / "merged", formats=["original", "lora"])
    trainer = make_trainer(str(file), callbacks=[callback])
    trainer.train()
    assert len(trainer.model.active_peft_config.target_modules) == 12  # Q8_0 has no minimum
    assert verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter").layers == 12
    written = tmp_path / "merged-original.gguf"
    assert [result.out for result in callback.exported] == [written, tmp_path / "merged-lora"]
    one, other = (np.frombuffer(path.read_bytes(), np.uint8) for path in (file, written))
    source = open_quantized(file)
    minima = np.zeros(len(one), dtype=bool)
    for name in trainer.model.active_peft_config.target_modules:
        start, (rows, width) = source.reader.place(f"{name}.weight")
        for block in range(start, start + rows * width, 20):
            minima[block + 2 : block + 4] = True
    assert (one != other).sum() > 1000 and not (one != other)[~minima].any()
    assert verify_export(written, tmp_path / "merged").layers == 14


def test_what_cannot_come_back_is_refused_before_training(file, bases, make_trainer, tmp_path):
    with pytest.raises(ConfigError, match="format: expected one of"):
        MergeCallback(tmp_path / "merged", formats=["hqq"])
    ours = make_trainer(
        bases["ours"], callbacks=[MergeCallback(tmp_path / "merged", formats=["original"])]
    )
    with pytest.raises(CheckpointError, match=r"has no base\.source"):
        ours.train()
    (tmp_path / "merged-original.gguf").write_text("mine")
    callback = MergeCallback(tmp_path / "merged", formats=["original"])
    with pytest.raises(OutputError, match=r"merged-original\.gguf: exists"):
        make_trainer(str(file), callbacks=[callback]).train()
    eight = write_gguf(tmp_path / "eight.gguf", kind="Q8_0")
    with pytest.raises(ConfigError, match="'gguf', which cannot take that back"):
        make_trainer(str(eight))
    config = QALoRAConfig(r=4, adapt="scales", task_type="CAUSAL_LM")
    assert make_trainer(str(eight), adapter=config)


@pytest.mark.parametrize(
    ("format", "adapt", "message"),
    [
        ("gptq", "zeros", "gptq does not go with adapt: zeros"),
        ("lora", "scales", "lora does not go with adapt: scales"),
        ("original", "zeros", "original does not go with adapt: zeros: .* Set adapt: scales"),
    ],
)
def test_a_format_that_cannot_hold_what_is_trained_is_refused_before_training(
    format, adapt, message, bases, make_trainer, tmp_path
):
    """Stock GPTQ has integer zero-points, and LoRA no change of scales."""
    config = QALoRAConfig(r=4, adapt=adapt, task_type="CAUSAL_LM")
    callback = MergeCallback(tmp_path / "merged", formats=[format])
    trainer = make_trainer(bases["stock"], adapter=config, callbacks=[callback])
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0

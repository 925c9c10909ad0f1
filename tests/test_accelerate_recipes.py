"""recipes/accelerate: every file is one that `accelerate launch` reads, and names its modes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}


def test_every_mode_has_every_number_of_gpus() -> None:
    modes = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
    wanted = {f"{mode}-{gpus}gpu" for mode in modes for gpus in (1, 2, 4, 8)}
    wanted.remove("fsdp2-1gpu")  # the Trainer refuses FSDP with one process
    assert {path.stem for path in FILES} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    mode, _, gpus = path.stem.removesuffix("gpu").partition("-")
    config = load_config_from_file(str(path))
    assert config.num_processes == int(gpus)
    kind = "NO" if path.stem == "ddp-1gpu" else KINDS.get(mode, "DEEPSPEED")
    assert config.distributed_type == kind
    if kind == "DEEPSPEED":
        zero = config.deepspeed_config
        assert (ROOT / zero["deepspeed_config_file"]).is_file()
        assert zero["deepspeed_config_file"] == f"recipes/deepspeed/{mode}.json"
        assert zero["zero3_init_flag"] == mode.startswith("zero3")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"

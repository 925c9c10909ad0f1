"""Accelerate itself reads each file of recipes/accelerate, and the number of GPUs is an option."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[2]
KINDS = {
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "zero3_offload": "DEEPSPEED",
}


def launch(mode, *options):
    """What `accelerate launch` makes of a file and of the options beside it."""
    path = str(ROOT / "recipes" / "accelerate" / f"{mode}.yaml")
    arguments = ["--config_file", path, *options, "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_there_is_one_file_a_mode():
    files = (ROOT / "recipes" / "accelerate").glob("*.yaml")
    assert {path.stem for path in files} == set(KINDS)


@pytest.mark.parametrize("mode", KINDS)
def test_accelerate_reads_it(mode):
    path = f"recipes/accelerate/{mode}.yaml"
    command = f"accelerate launch --num_processes GPUS --config_file {path} train.py"
    assert command in (ROOT / path).read_text()
    config = load_config_from_file(str(ROOT / path))
    assert config.distributed_type == KINDS[mode]
    if KINDS[mode] == "DEEPSPEED":
        zero = config.deepspeed_config
        assert (ROOT / zero["deepspeed_config_file"]).is_file()
        assert zero["deepspeed_config_file"] == f"recipes/deepspeed/{mode}.json"
        assert zero["zero3_init_flag"] == mode.startswith("zero3")
    if mode == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("mode", KINDS)
def test_num_processes_is_said_by_the_command(mode):
    for number in (1, 2, 4, 8):
        found = launch(mode, "--num_processes", str(number))
        assert found.num_processes == number
        used = {"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed"}
        assert [k for k in used if getattr(found, used[k])] == [KINDS[mode]]
    with pytest.raises(ValueError, match="num_processes"):
        launch(mode)

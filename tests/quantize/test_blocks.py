"""Recording and driving blocks, and which layers share an input."""

import pytest
import torch
from support.architectures import ARCHITECTURES, token_ids
from torch import nn

from qalora_plugin.architecture.blocks import find_blocks
from qalora_plugin.errors import ConfigError
from qalora_plugin.quantize.blocks import call_block, find_stages, record, watch_inputs


def _model(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    model.config.get_text_config().use_cache = False
    return model


def _linears(block):
    return {name: m for name, m in block.named_modules() if type(m) is nn.Linear}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_driving_the_blocks_gives_the_models_own_hidden_states(name):
    model = _model(name)
    _, blocks = find_blocks(model)
    ids = token_ids(3)
    wanted = []
    handle = blocks[-1].register_forward_hook(lambda module, args, output: wanted.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    want = wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0]
    recording = record(model, blocks, list(ids.split(2)), torch.device("cpu"))
    assert [h.shape[0] for h in recording.hidden] == [2, 1]
    outputs = []
    for batch, hidden in enumerate(recording.hidden):
        for index, block in enumerate(blocks):
            hidden = call_block(block, recording.calls[index][batch], hidden)
        outputs.append(hidden)
    assert torch.allclose(torch.cat(outputs), want, atol=1e-5)


def test_layers_that_share_an_input_are_one_stage():
    for name, want in {
        "llama": [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}],
        "phi": [{"q", "k", "v", "fc1"}, {"dense"}, {"fc2"}],
        "gpt_neox": [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
        "bert": [{"query", "key", "value"}, {"dense"}, {"dense"}, {"dense"}],
    }.items():
        model = _model(name)
        _, blocks = find_blocks(model)
        recording = record(model, blocks, [token_ids()], torch.device("cpu"))
        linears = _linears(blocks[0])
        stages = find_stages(blocks[0], linears, recording.calls[0][0], recording.hidden[0])
        short = [{n.rpartition(".")[2].removesuffix("_proj") for n in s.names} for s in stages]
        assert short == want
        assert all(stage.calls == 1 for stage in stages)


def test_inputs_are_seen_without_running_further():
    model = _model("llama")
    _, blocks = find_blocks(model)
    recording = record(model, blocks, list(token_ids(4).split(2)), torch.device("cpu"))
    block = blocks[0]
    stages = find_stages(block, _linears(block), recording.calls[0][0], recording.hidden[0])
    later = []
    block.mlp.down_proj.register_forward_hook(lambda *args: later.append(1))
    seen = []
    watch_inputs(
        block, block.self_attn.o_proj, stages[1], recording.calls[0], recording.hidden, seen.append
    )
    assert [tuple(x.shape) for x in seen] == [(2, 12, 32)] * 2
    assert later == []


def test_equal_arguments_are_kept_once():
    model = _model("gemma3")
    _, blocks = find_blocks(model)
    recording = record(model, blocks, list(token_ids(6).split(1)), torch.device("cpu"))
    ids = {
        id(value)
        for calls in recording.calls
        for call in calls
        for value in [*call.args, *call.kwargs.values()]
        if isinstance(value, torch.Tensor)
    }
    assert len(ids) <= 4  # positions and a mask or two, not six of each


class _Odd(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.run = run

    def forward(self, input_ids):
        return self.run(self, self.embed(input_ids))


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: self.layers[1](self.layers[0](x) + 1),  # something in between
        lambda self, x: self.layers[0](self.layers[1](x)),  # another order
        lambda self, x: self.layers[1](self.layers[0](self.layers[0](x))),  # one twice
        lambda self, x: self.layers[0](x),  # one left out
    ],
)
def test_other_ways_of_calling_blocks_are_refused(run):
    model = _Odd(run)
    with pytest.raises(ConfigError, match="blocks"):
        record(model, model.layers, [token_ids()], torch.device("cpu"))
    assert all("forward" not in vars(layer) for layer in model.layers)


class _Chosen(nn.Linear):
    """A block that hands its choice of tokens on, as the sparse attention of GLM-5.2 does."""

    def forward(self, hidden_states, chosen=None, bias=None):
        own = hidden_states.sum(-1).topk(2).indices if chosen is None else chosen
        return super().forward(hidden_states), own, torch.ones(1)


def test_a_block_that_reads_what_another_chose_is_refused():
    model = _Odd(None)
    model.layers = nn.ModuleList(_Chosen(8, 8) for _ in range(2))

    def hand_on(part):
        def run(self, x):
            out = self.layers[0](x)
            return self.layers[1](out[0], **{part: out[1 if part == "chosen" else 2]})[0]

        model.run = run
        return record(model, model.layers, [token_ids()], torch.device("cpu"))

    with pytest.raises(ConfigError, match="block 1 reads more that depends on them"):
        hand_on("chosen")
    assert hand_on("bias").calls[1][0].kwargs["bias"] == 1  # like T5's, which hidden states leave


def test_no_blocks():
    with pytest.raises(ConfigError, match="ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))

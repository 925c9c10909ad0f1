"""A vLLM engine that answers requests, one JSON object a line; executed in the environment `vllm`.

    python rollout_engine.py MODEL

{"weights": FILE} gives a safetensors file to the model's own `load_weights`, tensor by tensor, as
TRL does. {"ids": [[...], ...], "tokens": n} draws n tokens after each prompt at temperature 1;
the answer has "completions" and the "logprobs" of what was drawn. Errors are answers, too.
"""

import json
import sys

from safetensors.torch import load_file
from vllm import LLM, SamplingParams


def load(engine, file):
    """Load tensors one by one."""
    tensors = load_file(file)

    def put(model):
        for name, tensor in tensors.items():
            model.load_weights([(name, tensor)])

    engine.apply_model(put)
    engine.reset_prefix_cache()
    return {"loaded": len(tensors)}


def draw(engine, ids, tokens):
    """Draw completions, with the log-probability of each token."""
    params = SamplingParams(
        temperature=1.0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    outputs = [found.outputs[0] for found in engine.generate(prompts, params, use_tqdm=False)]
    return {
        "completions": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [found[token].logprob for token, found in zip(o.token_ids, o.logprobs, strict=True)]
            for o in outputs
        ],
    }


def main(model):
    engine = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        disable_log_stats=True,
        seed=0,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "weights" in request:
                answer = load(engine, request["weights"])
            else:
                answer = draw(engine, request["ids"], request["tokens"])
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

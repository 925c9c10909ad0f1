"""Run models in vLLM, one after the other in one process; executed in the environment `vllm`.

    python generate.py JOBS OUT

JOBS is a JSON file: a list of {"model", "ids", "tokens", options of vLLM's LLM}; "ids" are prompts
of token ids, "tokens" how many follow greedily, "logprobs" for how many of the likeliest tokens
those of the prompts are wanted (all).
OUT gets, for each job, "error" (the message, where vLLM refuses), or "tokens" and "logprobs".
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def log_probabilities(output):
    """Return (token, log probability) after each prompt token, in the order of the tokens."""
    return [
        sorted((token, found.logprob) for token, found in position.items())
        for position in output.prompt_logprobs[1:]
    ]


def run(job):
    model, ids, tokens = job.pop("model"), job.pop("ids"), job.pop("tokens")
    wanted = job.pop("logprobs", -1)
    options = {"dtype": "float32", "enforce_eager": True, "seed": 0} | job
    engine = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        max_logprobs=-1,
        disable_log_stats=True,
        **options,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=wanted, detokenize=False
    )
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [log_probabilities(output) for output in outputs],
    }


def describe(error):
    """Return an error's message with those of the errors that led to it."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def main(jobs, out):
    results = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            results.append(run(job))
        except Exception as error:
            results.append({"error": describe(error)})
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

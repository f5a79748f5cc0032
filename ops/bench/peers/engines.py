"""One peer as a process: it answers JSON lines on standard input with JSON lines on standard output.

    ← {"ready": "vllm 0.32.0"}                       once, when the model is loaded
    → {"id": 1, "prompts": [[5, 3, …], …], "new_tokens": 32}
    ← {"id": 1, "seconds": 0.8, "tokens": [32, …]}   or {"id": 1, "error": "…"}

`seconds` runs from the submission of all prompts at once to the last token of the last one. The engine `vllm-streams`
takes the requests of `run_phase` instead. A peer ends with its input.

This file runs by its path in a peer's own environment: nothing of Octet is there, and nothing is imported before its
time. usage: engines.py vllm|vllm-eager|vllm-streams|transformers CHECKPOINT THREADS MAX_SEQUENCES MAX_LEN
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import IO, Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""The fields of a request to those of its answer."""
Generate = Callable[[list[list[int]], int], list[int]]
"""Prompts and the number of new tokens to the number of tokens that each prompt got; no end of sequence."""
Stream = Callable[[list[int], int], AsyncIterator[object]]
"""A prompt and the number of new tokens to something that comes with each token, or few at once."""


def serve(ready: str, answer: Answer, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until there are no more."""
    print(json.dumps({"ready": ready}), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        try:
            reply = answer(request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"id": request["id"], **reply}), file=replies, flush=True)


def timed(generate: Generate) -> Answer:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        start_s = time.perf_counter()
        tokens = generate(request["prompts"], request["new_tokens"])
        return {"seconds": time.perf_counter() - start_s, "tokens": tokens}

    return answer


async def run_phase(stream: Stream, request: dict[str, Any]) -> dict[str, Any]:
    """Streams that run, and long prompts that arrive once all of them do.

    Args:
        request: `prompts` and `new_tokens` of the streams; `long_prompts`, of two new tokens each, the first of which
            comes when every stream has its first token, and then one every `every_s`.

    Returns: `streams`, when something came for each, and `long`, when each was sent and when its first token came; in
        seconds of one clock.
    Raises: what the first stream raised that did not run through.
    """
    arrivals: list[list[float]] = [[] for _ in request["prompts"]]
    long: list[tuple[float, float]] = []
    running = asyncio.Event()

    async def follow(index: int, prompt: list[int]) -> None:
        async for _ in stream(prompt, request["new_tokens"]):
            arrivals[index].append(time.perf_counter())
            if all(arrivals):
                running.set()

    async def disturb(prompt: list[int]) -> None:
        sent_s, first_s = time.perf_counter(), 0.0
        async for _ in stream(prompt, 2):
            first_s = first_s or time.perf_counter()
        long.append((sent_s, first_s))

    try:
        async with asyncio.TaskGroup() as tasks:
            for index, prompt in enumerate(request["prompts"]):
                tasks.create_task(follow(index, prompt))
            await running.wait()
            for prompt in request["long_prompts"]:
                tasks.create_task(disturb(prompt))
                await asyncio.sleep(request["every_s"])
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return {"streams": arrivals, "long": long}


def claim_stdout() -> IO[str]:
    """The standard output as it is now; what libraries print from now on goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def load_transformers(checkpoint: str, threads: int, sampling: dict[str, Any]) -> tuple[str, Answer]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    # Its classes are only partly typed.
    model_class: Any = transformers.Glm4MoeForCausalLM
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=bool(sampling),
                **sampling,
                pad_token_id=0,
            )
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return f"transformers {transformers.__version__}", timed(generate)


def vllm_options(checkpoint: str, threads: int, max_sequences: int, max_len: int) -> dict[str, Any]:
    """Of its engines, after what it reads from the environment is set."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    return {
        "model": checkpoint,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": max_len,
        "max_num_seqs": max_sequences,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }


def load_vllm(options: dict[str, Any], settings: dict[str, Any], *, eager: bool) -> tuple[str, Answer]:
    import vllm

    llm: Any = vllm.LLM(**options, enforce_eager=eager)

    def generate(prompts: list[list[int]], new_tokens: int) -> list[int]:
        chosen = {"temperature": 0, **settings, "max_tokens": new_tokens}
        sampling = vllm.SamplingParams(**chosen, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return f"vllm {vllm.__version__} {'eager' if eager else 'compiled'}", timed(generate)


def load_vllm_streams(options: dict[str, Any]) -> tuple[str, Answer]:
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    loop, numbers = asyncio.new_event_loop(), itertools.count()

    async def load() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    engine = loop.run_until_complete(load())

    def stream(prompt: list[int], new_tokens: int) -> AsyncIterator[object]:
        sampling = vllm.SamplingParams(
            max_tokens=new_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        outputs: AsyncIterator[object] = engine.generate({"prompt_token_ids": prompt}, sampling, str(next(numbers)))
        return outputs

    return f"vllm {vllm.__version__} compiled", lambda request: loop.run_until_complete(run_phase(stream, request))


def main() -> None:
    replies = claim_stdout()
    engine, checkpoint, *numbers, settings = sys.argv[1:]
    threads, max_sequences, max_len = map(int, numbers)
    sampling = json.loads(settings)
    if engine == "transformers":
        ready, answer = load_transformers(checkpoint, threads, sampling)
    else:
        options = vllm_options(checkpoint, threads, max_sequences, max_len)
        if engine == "vllm-streams":
            ready, answer = load_vllm_streams(options)
        else:
            ready, answer = load_vllm(options, sampling, eager=engine == "vllm-eager")
    serve(ready, answer, sys.stdin, replies)


if __name__ == "__main__":
    main()

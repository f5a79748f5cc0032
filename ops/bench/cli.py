"""The command line of the benchmarks: `octet bench …`. What a command needs is imported when it runs."""

from __future__ import annotations

import os
import pathlib
import random
from typing import Annotated

import typer

from ops.connection import DEFAULT_ADDRESS, Address
from ops.outputs import checked

bench = typer.Typer(no_args_is_help=True, help="Measure; every command prints ratios taken in one run.")

_ENV_DIR = pathlib.Path("~/.cache/octet/peers")
_EnvDir = Annotated[pathlib.Path, typer.Option(help="Where peers' environments are built (3.4 GiB for vLLM) and kept.")]
_Running = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Ask the cluster that runs there with this model, start none.")
]
_LoadSeed = Annotated[
    int | None, typer.Option(min=0, help="Of arrivals and prompts; default: drawn, and printed, for no cache to know.")
]
_JsonFile = Annotated[
    pathlib.Path | None, typer.Option("--json", callback=checked, help="Write the numbers to this file.")
]


@bench.command("memory")
def bench_memory(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: a random checkpoint of 111 M.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Shards.")] = 2,
) -> None:
    """Resident memory of an expert shard, against its experts' weights."""
    from ops.bench.memory import bench_memory as run

    run(model_dir, experts)


@bench.command("serve")
def bench_serve(
    grpc: Address = DEFAULT_ADDRESS,
    streams: Annotated[int | None, typer.Option(min=1, help="Closed loop: so many users at once.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Open loop: Poisson arrivals per second.")] = None,
    trace: Annotated[pathlib.Path | None, typer.Option(help="Open loop: a Mooncake trace, as JSON lines.")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    time_scale: Annotated[float, typer.Option(min=0.001, help="Of a trace; 2 is twice as fast.")] = 1.0,
    length_scale: Annotated[float, typer.Option(min=0.0001, help="Of a trace's prompts and answers.")] = 1.0,
    slo_ttft: Annotated[float, typer.Option(help="Goodput: seconds to the first token.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(help="Goodput: seconds per token after it.")] = 0.2,
    seed: _LoadSeed = None,
    stream_interval: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a chunk after the first; default: the server's.")
    ] = None,
    json_file: _JsonFile = None,
    plot: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.png", callback=checked, help="Draw the load (needs the extra 'bench')."),
    ] = None,
) -> None:
    """TTFT, TPOT, ITL, throughput and goodput of a running cluster under load."""
    from ops.bench.serve import LoadOptions
    from ops.bench.serve import bench_serve as run

    options = LoadOptions(
        streams=streams,
        rate=rate,
        trace=trace,
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        time_scale=time_scale,
        length_scale=length_scale,
        slo_ttft_s=slo_ttft,
        slo_tpot_s=slo_tpot,
        seed=_drawn(seed),
        stream_interval=stream_interval,
    )
    run(grpc, options, json_file, plot)


@bench.command("overload")
def bench_overload(
    grpc: Address = DEFAULT_ADDRESS,
    streams: Annotated[int, typer.Option(min=1, help="Of the closed loop that finds the sustainable rate.")] = 16,
    multiples: Annotated[list[float] | None, typer.Option("--multiple", min=0.01, help="May be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of every multiple.")] = 30.0,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds of every request.")] = 10.0,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    seed: _LoadSeed = None,
    json_file: _JsonFile = None,
) -> None:
    """Goodput and refusals of a running cluster at multiples of the rate that it sustains; by default 0.5 to 10."""
    from ops.bench.overload import OverloadOptions
    from ops.bench.overload import bench_overload as run

    options = OverloadOptions(
        streams=streams,
        multiples=tuple(multiples or (0.5, 1.0, 2.0, 5.0, 10.0)),
        seconds=seconds,
        deadline_s=deadline,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=_drawn(seed),
    )
    run(grpc, options, json_file)


@bench.command("prefix")
def bench_prefix(
    grpc: Address = DEFAULT_ADDRESS,
    prefix_tokens: Annotated[int, typer.Option(min=1)] = 2000,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Time to the first token with a cached prefix, against without, on a running cluster."""
    from ops.bench.prefix import bench_prefix as run

    run(grpc, prefix_tokens, repeats)


@bench.command("longcontext")
def bench_longcontext() -> None:
    """Memory and time to the first token of prompts of 2K, 8K and 32K tokens."""
    from ops.bench.longcontext import bench_longcontext as run

    run()


@bench.command("speculation")
def bench_speculation(threads: Annotated[int, typer.Option(min=1)] = 1) -> None:
    """What a decode step with drafts of an MTP head costs, in one process."""
    from ops.bench.speculation import bench_speculation as run

    run(threads)


@bench.command("oversubscription")
def bench_oversubscription(
    streams: Annotated[int, typer.Option(min=1, help="Sequences that the KV pages are enough for.")] = 8,
    factor: Annotated[int, typer.Option(min=2, help="So many times as many are asked for at once.")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Throughput of a cluster of its own when it is asked for more sequences than its KV pages hold."""
    from ops.bench.oversubscription import bench_oversubscription as run

    run(streams, factor, repeats)


@bench.command("soak")
def bench_soak(
    minutes: Annotated[float, typer.Option(min=0.5)] = 10.0,
    users: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", callback=checked, help="Write every sample to this file.")
    ] = None,
) -> None:
    """Mixed random load on a cluster of its own; fails if memory grows, a request fails, or a page is lost."""
    from ops.bench.soak import bench_soak as run

    raise typer.Exit(run(minutes * 60, users, json_file))


@bench.command("checkpoint")
def bench_checkpoint(model_dir: pathlib.Path) -> None:
    """Write the random checkpoint of 111 M parameters that benchmarks serve."""
    from ops.bench.checkpoints import BENCH, write_checkpoint

    write_checkpoint(model_dir, BENCH)


@bench.command("linear")
def bench_linear() -> None:
    """Linear layers over packed panels, beside torch's operator."""
    from ops.bench.linear import bench_linear as run

    run()


@bench.command("sampling")
def bench_sampling(threads: Annotated[int, typer.Option(min=1)] = 1) -> None:
    """The choice of tokens on a CPU, beside the operators that GPUs run."""
    from ops.bench.sampling import bench_sampling as run

    run(threads)


@bench.command("balance")
def bench_balance(
    plot: Annotated[
        pathlib.Path | None, typer.Option(callback=checked, help="Draw it, as a PNG; needs matplotlib.")
    ] = None,
) -> None:
    """How level the balancer, and the choice of replicas per batch, make the loads of a large model, and how fast."""
    from ops.bench.balance import bench_balance as run

    run(plot)


@bench.command("telemetry")
def bench_telemetry(
    rounds: Annotated[int, typer.Option(min=0, help="Of three clusters in turn; 0 leaves them out.")] = 5,
) -> None:
    """What counting costs, as a share of the step that is counted."""
    from ops.bench.telemetry import bench_telemetry as run

    run(rounds)


@bench.command("lane")
def bench_lane() -> None:
    """A dispatch and combine without experts, against gloo's own all-to-all."""
    from ops.bench.lane import bench_lane as run

    run()


@bench.command("breakdown")
def bench_breakdown(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: a random checkpoint of 111 M.")] = None,
    streams: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    long_prompt_tokens: Annotated[int, typer.Option(min=1, help="Eight more, to learn what a context costs.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=4)] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    experts: Annotated[int, typer.Option(min=1, help="Shards.")] = 2,
    json_file: _JsonFile = None,
) -> None:
    """Where a decode step's time goes, the least it could take, and what steps cost by their size."""
    from ops.bench.breakdown.calibration import BreakdownOptions
    from ops.bench.breakdown.command import bench_breakdown as run

    options = BreakdownOptions(
        streams=_numbers("--streams", streams),
        prompt_tokens=prompt_tokens,
        long_prompt_tokens=long_prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        shards=experts,
    )
    run(model_dir, options, json_file)


@bench.command("peers")
def bench_peers(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: a random checkpoint of 111 M.")] = None,
    peers: Annotated[str, typer.Option(help="Separated by commas.")] = "local,transformers,vllm,vllm-eager",
    streams: Annotated[str, typer.Option(help="Numbers of prompts at once, separated by commas.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="After the first.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of one-process peers; default: all cores.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sample; default: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1, help="With --temperature.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="With --temperature.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Of the cluster.")] = None,
    grpc: _Running = None,
    env_dir: _EnvDir = _ENV_DIR,
    json_file: _JsonFile = None,
) -> None:
    """This project against its own one-process engine, transformers and vLLM, in alternation."""
    from ops.bench.peers.command import PeersOptions
    from ops.bench.peers.command import bench_peers as run

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    options = PeersOptions(
        peers=tuple(peers.split(",")),
        streams=_numbers("--streams", streams),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        overrides=tuple(overrides or ()),
        address=grpc,
        sampling={name: value for name, value in sampling.items() if value is not None},
        env_dir=env_dir,
    )
    run(model_dir, options, json_file)


@bench.command("interference")
def bench_interference(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: a random checkpoint of 111 M.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:A.B=VALUE,…]", help="A cluster to measure; several take turns."),
    ] = None,
    grpc: _Running = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="vLLM, too.")] = False,
    streams: Annotated[int, typer.Option(min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of each stream.")] = 200,
    long_prompts: Annotated[int, typer.Option(min=1)] = 3,
    long_tokens: Annotated[int, typer.Option(min=1)] = 2000,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two long prompts.")] = 1.5,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of vLLM; default: all cores.")] = None,
    env_dir: _EnvDir = _ENV_DIR,
    json_file: _JsonFile = None,
) -> None:
    """Inter-token latency of running streams while long prompts arrive, against quiet."""
    from ops.bench.interference.command import InterferenceOptions
    from ops.bench.interference.command import bench_interference as run

    options = InterferenceOptions(
        variants=tuple(variant or ()),
        address=grpc,
        vllm=vllm,
        streams=streams,
        new_tokens=new_tokens,
        long_prompts=long_prompts,
        long_tokens=long_tokens,
        every_s=every,
        rounds=rounds,
        threads=threads or len(os.sched_getaffinity(0)),
        env_dir=env_dir,
    )
    run(model_dir, options, json_file)


@bench.command("changes")
def bench_changes(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: the embedded model.")] = None,
    kinds: Annotated[str, typer.Option(help="Of change, separated by commas; default: all.")] = "",
    streams: Annotated[int, typer.Option(min=1, help="Closed loop: so many users at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 48,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    random_events: Annotated[
        int | None, typer.Option("--random", min=1, help="Instead: so many pools scaled at random, one after another.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    json_file: _JsonFile = None,
) -> None:
    """The longest gap in any stream while experts move, pools change their size and members are killed."""
    from ops.bench.changes.command import ChangesOptions, bench_random_changes
    from ops.bench.changes.command import bench_changes as run
    from ops.bench.changes.kinds import parse_kinds

    options = ChangesOptions(
        kinds=parse_kinds(kinds),
        streams=streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    if random_events is None:
        raise typer.Exit(run(model_dir, options, json_file))
    raise typer.Exit(bench_random_changes(model_dir, options, random_events, seed, json_file))


@bench.command("degraded")
def bench_degraded(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Default: the embedded model.")] = None,
    shards: Annotated[int, typer.Option(min=2, help="Before one of them is killed.")] = 4,
    streams: Annotated[int, typer.Option(min=1, help="Closed loop: so many users at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 48,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Of each window.")] = 10.0,
    json_file: _JsonFile = None,
) -> None:
    """Tokens per second with one of the expert shards dead, and not replaced, against all of them."""
    from ops.bench.changes.command import ChangesOptions
    from ops.bench.changes.degraded import bench_degraded as run

    options = ChangesOptions(
        kinds=(), streams=streams, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
    )
    raise typer.Exit(run(model_dir, options, shards, seconds, json_file))


@bench.command("kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(help="cuda, with the shapes of GLM-4.6; or cpu, with tiny ones.")] = "cuda",
    layers: Annotated[int | None, typer.Option(min=1, help="That take turns; default: as many as fit.")] = None,
    json_file: _JsonFile = None,
) -> None:
    """What share of a GPU's bandwidth and matmul rate a layer's kernels reach."""
    from ops.bench.kernels.command import bench_kernels as run

    run(device, layers, json_file)


@bench.command("simulator")
def bench_simulator(
    rounds: Annotated[int, typer.Option(min=1, help="Each measures costs, clusters and costs again, in turn.")] = 3,
    streams: Annotated[int, typer.Option(min=1)] = 8,
    requests: Annotated[int, typer.Option(min=1)] = 48,
    json_file: _JsonFile = None,
) -> None:
    """Simulated against measured throughput and TPOT of clusters of three sizes on this machine."""
    from ops.bench.simulator.command import SimulatorOptions
    from ops.bench.simulator.command import bench_simulator as run

    run(SimulatorOptions(rounds=rounds, streams=streams, requests=requests), json_file)


def _drawn(seed: int | None) -> int:
    return random.randrange(2**32) if seed is None else seed


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Different ones. Raises: typer.BadParameter."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(
            f"found {text!r}, expected whole numbers from 1, separated by commas", param_hint=option
        )
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f"found {text!r}, expected each number once", param_hint=option)
    return numbers

"""The command line: `octet serve | generate | status | check | demo`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Annotated

import rich
import typer

from octet.client import Client
from octet.config import OctetConfig, load_config
from octet.errors import OctetError
from ops import render

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve GLM-4.6-class mixture-of-experts models with separate prefill, decode and expert pools.",
)

bench = typer.Typer(no_args_is_help=True, help="Measure; every command prints ratios taken in one run.")
app.add_typer(bench, name="bench")

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_Address = Annotated[str, typer.Option("--grpc", help="host:port of a frontend.")]
_ConfigFile = Annotated[
    pathlib.Path | None, typer.Option("-c", "--config", help="A YAML file; see deploy/laptop.yaml.")
]
_Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one config field.")]
_Size = Annotated[int | None, typer.Option(min=1)]


def main() -> None:
    """The `octet` command. Errors of ours end it with one line and exit code 1."""
    try:
        app()
    except OctetError as error:
        rich.print(f"[bold red]octet:[/] {rich.markup.escape(str(error))}", file=render.STDERR)
        raise SystemExit(1) from None


@app.command()
def serve(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Hugging Face directory; default: embedded.")] = None,
    config: _ConfigFile = None,
    overrides: _Set = None,
    prefill: _Size = None,
    decode: _Size = None,
    experts: _Size = None,
    grpc_port: Annotated[int | None, typer.Option(help="0 picks a free port.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, or 'auto'.")] = None,
) -> None:
    """Start a cluster and serve until SIGTERM or Ctrl-C."""
    from ops.serve import serve as run

    flags = {
        "model.path": None if model_dir is None else str(model_dir),
        "pools.prefill.size": prefill,
        "pools.decode.size": decode,
        "pools.experts.size": experts,
        "frontend.port": grpc_port,
        "ray.address": address,
    }
    raise typer.Exit(run(_config(config, overrides, flags)))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text; with --token-ids, numbers separated by commas or spaces.")],
    grpc: _Address = _DEFAULT_ADDRESS,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The prompt is token ids.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the response as JSON.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    n: Annotated[int | None, typer.Option(help="Choices.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 300.0,
) -> None:
    """Send one request to a running cluster and print its answer."""
    from ops import request

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "n": n,
        "stop": stop,
    }
    parsed = request.parse_prompt(prompt, token_ids=token_ids, chat=chat)
    with Client(grpc, timeout_s=timeout) as client:
        request.run(client, parsed, options, stream=stream, as_json=json)


@app.command()
def status(
    grpc: _Address = _DEFAULT_ADDRESS,
    json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Show the pools, their members and what every expert does."""
    with Client(grpc, timeout_s=30.0) as client:
        answer = client.status()
    if json:
        print(render.as_json(answer))
    else:
        render.print_status(answer)


@app.command()
def check(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Hugging Face directory; default: embedded.")] = None,
    config: _ConfigFile = None,
    overrides: _Set = None,
) -> None:
    """Validate a checkpoint without loading it, and print what each pool would hold."""
    from ops.check import check as run

    run(_config(config, overrides, {"model.path": None if model_dir is None else str(model_dir)}))


@app.command()
def demo() -> None:
    """Start the embedded model on three pools, ask it something, show what its experts did, and stop."""
    from ops.demo import demo as run

    run()


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
    grpc: _Address = _DEFAULT_ADDRESS,
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
    seed: int = 0,
    json_file: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    plot: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.png", help="Draw the load (needs the extra 'bench').")
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
        seed=seed,
    )
    run(grpc, options, json_file, plot)


@bench.command("prefix")
def bench_prefix(
    grpc: _Address = _DEFAULT_ADDRESS,
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
    json_file: Annotated[pathlib.Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
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


@bench.command("balance")
def bench_balance() -> None:
    """How level the balancer, and the choice of replicas per batch, make the loads of a large model, and how fast."""
    from ops.bench.balance import bench_balance as run

    run()


@bench.command("lane")
def bench_lane() -> None:
    """A dispatch and combine without experts, against gloo's own all-to-all."""
    from ops.bench.lane import bench_lane as run

    run()


def _config(file: pathlib.Path | None, overrides: list[str] | None, flags: Mapping[str, object]) -> OctetConfig:
    """Defaults, then the file, then --set, then the flags of their own."""
    given = [f"{field}={value}" for field, value in flags.items() if value is not None]
    return load_config(file, [*(overrides or []), *given])


if __name__ == "__main__":
    main()

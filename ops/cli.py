"""The command line: `octet serve | generate | status | metrics | check | demo`, and what else there is."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated

import rich
import typer
from rich.console import Console

from octet.config import OctetConfig, load_config
from octet.errors import OctetError
from octet.v1 import octet_pb2 as pb
from ops import render
from ops.bench.cli import bench
from ops.changes import parse_sizes, print_rebalance
from ops.chaos.cli import chaos
from ops.connection import DEFAULT_ADDRESS, Address, connect, secure
from ops.experts_cli import experts
from ops.finite import finite
from ops.render_decisions import print_decisions
from ops.render_experts import print_experts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve GLM-4.6-class mixture-of-experts models with separate prefill, decode and expert pools.",
)

app.callback()(secure)
app.add_typer(experts, name="experts")
app.add_typer(bench, name="bench")
app.add_typer(chaos, name="chaos")

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
    grpc: Address = DEFAULT_ADDRESS,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="The prompt is token ids.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the response as JSON.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    min_new_tokens: Annotated[int | None, typer.Option(min=0)] = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    n: Annotated[int | None, typer.Option(help="Choices.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind an end of sequence.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Alternatives per token, with their log-probabilities; with --json.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Lower is served first.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 300.0,
) -> None:
    """Send one request to a running cluster and print its answer."""
    from ops import request

    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "n": n,
        "stop": stop,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        "priority": priority,
    }
    parsed = request.parse_prompt(prompt, token_ids=token_ids, chat=chat)
    with connect(grpc, timeout_s=timeout) as client:
        request.run(client, parsed, options, stream=stream, as_json=json)


@app.command()
def status(
    grpc: Address = DEFAULT_ADDRESS,
    json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="Show every expert's load, and who waits for whom.")
    ] = False,
    decisions: Annotated[bool, typer.Option("--decisions", help="Show what the autoscaler did, and why.")] = False,
    window: Annotated[float | None, typer.Option(min=0.1, help="Seconds of telemetry; default: all there is.")] = None,
    watch: Annotated[
        float | None,
        typer.Option(min=0.1, callback=finite, metavar="SECONDS", help="Draw it anew so often, until Ctrl-C."),
    ] = None,
) -> None:
    """Show the pools, their members and what every expert does."""
    from ops.watch import watch as run

    show: Callable[[pb.GetStatusResponse, Console], None] = render.print_status
    if json or experts or decisions:
        show = render.print_json if json else print_experts if experts else print_decisions
    with connect(grpc, timeout_s=30.0) as client:
        if watch is not None:
            run(lambda: client.status(window_s=window), watch, show)
            return
        show(client.status(window_s=window), Console(highlight=False))


@app.command()
def metrics(
    grpc: Address = DEFAULT_ADDRESS,
    host: Annotated[str, typer.Option(help="To listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 9464,
    window: Annotated[float, typer.Option(min=0.1, callback=finite, help="Seconds that loads are means over.")] = 15.0,
    experts: Annotated[bool, typer.Option(help="Tell of every expert: a series each, layer by layer.")] = True,
) -> None:
    """Offer a running cluster's counters and loads to Prometheus, over HTTP, until SIGTERM or Ctrl-C."""
    from ops.metrics import ANSWER_S, serve

    with connect(grpc, timeout_s=ANSWER_S) as client:
        serve(client, host, port, window, experts=experts)


@app.command()
def rebalance(
    grpc: Address = DEFAULT_ADDRESS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be moved.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Move experts from shard to shard after their load, while the cluster serves."""
    with connect(grpc, timeout_s=600.0) as client:
        answer = client.rebalance(dry_run=dry_run)
    if json:
        print(render.as_json(answer))
    else:
        print_rebalance(answer, dry_run=dry_run)


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=SIZE...", help="experts=4 decode=2 prefill=1")],
    grpc: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 600.0,
) -> None:
    """Bring pools to other sizes while the cluster serves; returns when it is so."""
    wanted = parse_sizes(sizes)
    with connect(grpc, timeout_s=timeout) as client:
        answer = client.scale(**wanted)
    print("  ".join(f"{pool.pool} {pool.size}" for pool in answer.sizes), f" epoch {answer.epoch}")


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
def simulate(
    trace: Annotated[pathlib.Path, typer.Argument(help="A Mooncake trace, as JSON lines.")],
    config: Annotated[pathlib.Path, typer.Option("-c", "--config", help="Such as deploy/fleet.yaml.")],
    overrides: _Set = None,
    model: Annotated[str, typer.Option(help="glm-4.6, embedded, or a model directory.")] = "glm-4.6",
    profile: Annotated[str, typer.Option(help="h100 or cpu.")] = "h100",
    calibrate: Annotated[
        pathlib.Path | None, typer.Option(metavar="F.json", help="Costs from `octet bench breakdown --json`.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=3, help="All of them, or with --autoscale the budget.")] = None,
    fixed: Annotated[str | None, typer.Option(metavar="P,D,E", help="Sizes; default: the config's.")] = None,
    autoscale: Annotated[bool, typer.Option("--autoscale", help="Sizes are the beginning only.")] = False,
    search: Annotated[bool, typer.Option("--search-fixed", help="Find the smallest fixed sizes that do.")] = False,
    attainment: Annotated[float, typer.Option(min=0.001, max=1, help="Of requests, with --search-fixed.")] = 0.99,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first of the trace.")] = None,
    copies: Annotated[int, typer.Option(min=1, help="Stack the trace so many times, shifted in time.")] = 1,
    time_scale: Annotated[
        float, typer.Option(min=0.001, callback=finite, help="2 plays the trace twice as fast.")
    ] = 1.0,
    hours: Annotated[float | None, typer.Option(min=0.01, callback=finite, help="Stretch it over so long.")] = None,
    day: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="TROUGH", help="Under a day's envelope, from TROUGH to 1 and back."),
    ] = None,
    experts_trace: Annotated[pathlib.Path | None, typer.Option(help="Expert loads: exported telemetry.")] = None,
    skew: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Else drawn: exponents of the layers.")] = "0.2,1.0",
    drift: Annotated[float, typer.Option(min=0, max=0.5, help="Of the experts swap loads each time.")] = 0.0,
    drift_every: Annotated[float, typer.Option(min=1, callback=finite, help="Seconds.")] = 600.0,
    redundant: Annotated[int, typer.Option(min=0, help="Slots per layer beyond one for each expert.")] = 32,
    balance: Annotated[bool, typer.Option(help="Without, experts stay where they are numbered.")] = True,
    lose_every: Annotated[
        float | None,
        typer.Option(min=0.1, callback=finite, metavar="SECONDS", help="So often, on average, any member is lost."),
    ] = None,
    price: Annotated[float, typer.Option(min=0, callback=finite, help="Of a GPU hour.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the run to this file.")] = None,
    plot: Annotated[pathlib.Path | None, typer.Option(metavar="FILE.png", help="Draw it (extra 'bench').")] = None,
) -> None:
    """Play a trace against a cluster that is not there: same scheduler, balancer and autoscaler, computed costs."""
    from ops.simulate.command import SimulateOptions, numbers
    from ops.simulate.command import simulate as run

    options = SimulateOptions(
        trace=trace,
        model=model,
        profile=profile,
        calibrate=calibrate,
        gpus=gpus,
        fixed=None if fixed is None else numbers("--fixed", fixed, int, 3),
        autoscale=autoscale,
        search=search,
        attainment=attainment,
        requests=requests,
        copies=copies,
        time_scale=time_scale,
        hours=hours,
        trough=day,
        experts_trace=experts_trace,
        skew=numbers("--skew", skew, float, 2),
        drift=drift,
        drift_every_s=drift_every,
        redundant=redundant,
        balance=balance,
        lose_every_s=lose_every,
        price=price,
        seed=seed,
        json_file=json_file,
        plot_file=plot,
    )
    run(_config(config, overrides, {}), options)


@app.command()
def demo(
    chaos: Annotated[bool, typer.Option("--chaos", help="Kill one of everybody while it writes, and compare.")] = False,
) -> None:
    """Start the embedded model on three pools, ask it something, show what its experts did, and stop."""
    from ops.chaos.demo import demo_chaos
    from ops.demo import demo as run

    if chaos:
        raise typer.Exit(demo_chaos())
    run()


def _config(file: pathlib.Path | None, overrides: list[str] | None, flags: Mapping[str, object]) -> OctetConfig:
    """Defaults, then the file, then --set, then the flags of their own."""
    return load_config(file, overrides or [], {field: value for field, value in flags.items() if value is not None})


if __name__ == "__main__":
    main()

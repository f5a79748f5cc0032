"""The command line of the chaos harness: `octet chaos …`. What a command needs is imported when it runs."""

from __future__ import annotations

import os
import pathlib
import secrets
from typing import Annotated

import typer

from ops.finite import finite
from ops.outputs import checked

chaos = typer.Typer(no_args_is_help=True, help="Do harm on purpose, and check that every promise is kept.")


@chaos.command("run")
def run(
    model_dir: Annotated[pathlib.Path | None, typer.Argument(help="Hugging Face directory; default: embedded.")] = None,
    schedule: Annotated[list[pathlib.Path] | None, typer.Option(help="YAML or JSON; may be repeated.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw a schedule instead; the same again for the same seed.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="So many, from this seed on.")] = 1,
    duration: Annotated[
        float, typer.Option(min=1.0, callback=finite, help="Seconds of load of each that is drawn.")
    ] = 4.0,
    users: Annotated[int, typer.Option(min=1, help="Each with one stream at a time.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of every answer.")] = 48,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Of the cluster's config.")
    ] = None,
    settle: Annotated[bool, typer.Option("--settle", help="Wait after each schedule for all that was lost.")] = False,
    hosts: Annotated[
        int, typer.Option(min=1, max=2, help="2: the cluster is on two, in network namespaces; takes root.")
    ] = 1,
    ray_replies: Annotated[
        float,
        typer.Option(
            "--lose-ray-replies", min=0.0, max=0.2, metavar="SHARE", help="Ray loses these of the calls of actors."
        ),
    ] = 0.0,
    ray_control: Annotated[
        float,
        typer.Option(
            "--lose-ray-control",
            min=0.0,
            max=0.2,
            metavar="SHARE",
            help="Ray loses these of its calls to the GCS and to raylets, thrice: on the way, underway, and back.",
        ),
    ] = 0.0,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE", help="Harm that running cluster, not one of my own: its processes are killed."
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="Of its Ray.")] = "auto",
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", callback=checked, help="Write the report to this file.")
    ] = None,
    html_file: Annotated[
        pathlib.Path | None, typer.Option("--html", callback=checked, help="Draw the timeline in this file.")
    ] = None,
) -> None:
    """Run schedules of faults under load. Exit code 1 if a client saw, or the cluster kept, what it should not."""
    if hosts == 2:
        # Ray reads them when it is imported. Who only joins shows no token unless it is told to.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from ops.chaos.command import Against, ChaosOptions, run_chaos, schedules_of
    from ops.chaos.questions import Asked
    from ops.chaos.run import Load

    options = ChaosOptions(
        schedules=schedules_of(schedule or (), seed, count, duration),
        load=Load(users=users, seed=seed or 0),
        asked=Asked(new_tokens=new_tokens),
        overrides=tuple(overrides or ()),
        against=None if against is None else Against(ray_address=address, namespace=against),
        num_hosts=hosts,
        lost_replies=ray_replies,
        lost_control=ray_control,
        each_complete=settle,
    )
    raise typer.Exit(run_chaos(model_dir, options, json_file, html_file))


@chaos.command("draw")
def draw(
    seed: Annotated[int, typer.Argument(min=0)],
    duration: Annotated[float, typer.Option(min=1.0, callback=finite, help="Seconds of load.")] = 4.0,
) -> None:
    """Print the schedule of a seed, as a file that --schedule takes."""
    from ops.chaos.drawing import draw_schedule
    from ops.chaos.schedule import dump_schedule

    print(dump_schedule(draw_schedule(seed, duration)), end="")


@chaos.command("points")
def points() -> None:
    """Print the named steps at which faults can be armed, and by whom they are reached."""
    from octet.faults import POINTS

    for point, where in POINTS.items():
        print(f"{point:16} {', '.join(where)}")

"""Starting and stopping a cluster from a driver process: what `octet serve`, the demo and the tests use."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray._private.services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.control.controller import Controller
from cluster.control.keeper import Keeper
from cluster.control.start_progress import StartProgress
from cluster.inventory import CONTROLLER
from cluster.plan import ServingPlan
from cluster.planning import make_plan
from cluster.workers.worker_start import forking, runtime_env
from octet.addresses import with_port
from octet.background import MEMBERS
from octet.config import OctetConfig, load_config
from octet.errors import ConfigError, OctetError, StartupError

_POLL_S = 0.3
_CONNECT_S = 10.0
_ANSWER_S = 30.0
_OBJECT_STORE_BYTES = 128 * 2**20
"""Octet puts nothing large into Ray's object store."""
_SETTINGS = {"worker_niceness": MEMBERS}
"""Ray's own 15 leaves those hardly any room that step back (`octet.background`): 19 is the most."""

Report = Callable[[StartProgress], None]


class RunningCluster:
    """A cluster that serves. Made by `launch`."""

    def __init__(self, plan: ServingPlan, controller: Any, port: int, owns_ray: bool) -> None:
        self.plan, self._controller, self._port, self._owns_ray = plan, controller, port, owns_ray

    @property
    def address(self) -> str:
        """`host:port` of the gRPC API, as a client on this machine reaches it."""
        host = self.plan.config.frontend.host
        return with_port("127.0.0.1" if host in ("0.0.0.0", "::", "[::]") else host, self._port)

    def state(self) -> tuple[str, str]:
        """The controller's state, and the reason where it is not READY."""
        try:
            answer: tuple[str, str] = _ask(self._controller.state, _ANSWER_S)
        except ray.exceptions.RayError as error:
            return "FAILED", f"the controller does not answer: {error}"
        return answer

    def stop(self, drain: bool = True) -> None:
        """Let live requests end (bounded by `frontend.drain_s`), then take every process down."""
        try:
            if drain:
                _ask(self._controller.drain, self.plan.config.frontend.drain_s + _ANSWER_S)
            _ask(self._controller.stop, _ANSWER_S)
        except ray.exceptions.RayError as error:
            logging.getLogger(__name__).warning("the controller could not stop the cluster: %s", error)
        _end(self.plan, self._controller)
        if self._owns_ray:
            ray.shutdown()


def launch(config: OctetConfig, report: Report = lambda progress: None) -> RunningCluster:
    """Check the model, connect to Ray (or start it), and bring every pool up.

    Uses the Ray connection of this process if there is one. Whatever was started is stopped again on an error.

    Raises: CheckpointError, ConfigError, StartupError.
    """
    plan = make_plan(config)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        report(StartProgress(phase="starting Ray" if config.ray.address is None else "connecting to Ray"))
        _connect(config)
    controller = None
    try:
        # Whoever is told may end the start here, before there is anything of the cluster.
        report(StartProgress(phase="starting the controller"))
        controller = _start_controller(plan)
        port = _wait_for_start(plan, controller, report)
    except BaseException:
        if controller is not None:
            _abandon(plan, controller)
        if owns_ray:
            ray.shutdown()
        raise
    return RunningCluster(plan, controller, port, owns_ray)


def attach(ray_address: str, namespace: str) -> RunningCluster:
    """A cluster that somebody else has started; stopping it stops it for everybody.

    Raises: ConfigError if there is none.
    """
    if not ray.is_initialized():
        _connect(load_config(overrides=[f"ray.address={ray_address}", f"ray.namespace={namespace}"]))
    try:
        controller = ray.get_actor(CONTROLLER, namespace=namespace)
        serving: Any = ray.get(controller.serving.remote(), timeout=_ANSWER_S)
    except (ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            "ray.namespace", repr(namespace), "one with an Octet cluster that serves", str(error)
        ) from error
    return RunningCluster(serving[0], controller, serving[1], owns_ray=False)


def _connect(config: OctetConfig) -> None:
    """Raises: ConfigError."""
    _check_address(config.ray.address)
    # Nothing is sent anywhere unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    own = config.ray.address is None
    if own:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "_system_config": _SETTINGS}
    try:
        with contextlib.ExitStack() as within:
            if own:
                within.enter_context(_signalled_apart())
                if config.ray.fork_workers:
                    within.enter_context(forking())
            ray.init(address=config.ray.address or "local", namespace=config.ray.namespace, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError("ray.address", config.ray.address, "a running Ray cluster", str(error)) from error


@contextlib.contextmanager
def _signalled_apart() -> Iterator[None]:
    """Ray's processes that are started within are in groups of their own.

    A signal to this process's group, as `timeout` and service managers send it, is for this process alone: Ray ends
    when it is done with it. Ray has no option for that.
    """
    services: Any = ray._private.services
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _check_address(address: str | None) -> None:
    """Whether anybody listens there: Ray itself tries for minutes. Raises: ConfigError."""
    host, separator, port = (address or "").rpartition(":")
    if not separator or not port.isdigit() or "://" in host:
        # Not given, or a name such as 'auto'.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except OSError as error:
        fix = f"nothing answers there ({error.strerror or error}); `ray start --head` says what its address is"
        raise ConfigError("ray.address", repr(address), "HOST:PORT of a Ray head that runs, or 'auto'", fix) from error


def _start_controller(plan: ServingPlan) -> Any:
    namespace = plan.config.ray.namespace
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        return (
            ray.remote(Controller)
            .options(
                name=CONTROLLER,
                namespace=namespace,
                num_cpus=0,
                scheduling_strategy=here,
                # Every member holds one call open.
                max_concurrency=10_000,
                # Its process is replaced, and ends with this one. No call is made twice without its caller.
                max_restarts=-1,
                max_task_retries=0,
                enable_task_events=False,
                runtime_env=runtime_env(plan.config),
            )
            .remote(plan)
        )
    except ValueError as error:
        raise ConfigError("ray.namespace", repr(namespace), "one without an Octet cluster", str(error)) from error


def _wait_for_start(plan: ServingPlan, controller: Any, report: Report) -> int:
    start = controller.start.remote()
    # The controller has a deadline of its own, from when its process runs.
    start_s = plan.config.ray.start_timeout_s + _ANSWER_S
    deadline_s = time.monotonic() + start_s
    while True:
        done, _ = ray.wait([start], timeout=_POLL_S)
        if done:
            break
        if time.monotonic() > deadline_s:
            raise StartupError(f"the cluster was not up within {start_s:g} s")
        try:
            report(ray.get(controller.progress.remote(), timeout=_ANSWER_S))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            # On a busy machine its process takes its time to start, and says nothing until then; an answer may be lost.
            continue
    try:
        port: int = ray.get(start, timeout=_ANSWER_S)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OctetError):
            raise cause from None
        raise StartupError(str(error)) from error
    except ray.exceptions.RayActorError as error:
        raise StartupError(f"the controller's process is gone: {error}") from error
    return port


def _abandon(plan: ServingPlan, controller: Any) -> None:
    """Best effort after a failed start: the error that is on its way up matters more."""
    try:
        ray.get(controller.stop.remote(), timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        logging.getLogger(__name__).warning("the controller could not clean up: %s", error)
    _end(plan, controller)


def _end(plan: ServingPlan, controller: Any) -> None:
    """Of the controller, and of whatever it did not get at: its members are not Ray's to end with it."""
    ray.kill(controller)
    keeper = Keeper(plan.config.ray.namespace)
    keeper.sweep()
    keeper.erase()


def _ask(method: Any, timeout_s: float) -> Any:
    """Once more where the controller's process was lost meanwhile, and another one is on its way."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(method.remote(), timeout=max(0.0, deadline_s - time.monotonic()))
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)

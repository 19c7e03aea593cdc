"""The supervisor: the one process that starts, watches and stops a farebox's store, Dodo sandbox and Ray.

1. The check of the configuration, the store, Ray and the sandbox start at the same time.
2. The sandbox gets the products for sale, Ray Serve the configuration.
3. When the API is ready, the demo's tenants are created, and the run is healthy.
4. While it runs, a store or sandbox that ends is started again, on a full disk as soon as there is room; if Ray ends,
   the run has failed.
5. Ray Serve, Ray, the sandbox and the store are stopped in this order.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import httpx
import psutil

from billing.errors import BillingError
from cluster import valkey
from cluster.errors import ClusterError
from cluster.local import children, demo, launch, ray_node
from cluster.local.children import OWNER, Child
from cluster.local.configuration import begin_check, end_check, store_options_in
from cluster.local.dodo_products import missing_products, sync_products
from cluster.local.environment import SANDBOX, OperatorEnvironment, inherited, service_environment
from cluster.local.launch import LaunchError, Progress
from cluster.local.preflight import check_machine, check_ports
from cluster.local.restarts import RESTARTS_MAX, Restarts
from cluster.local.settings import Settings, free_block
from cluster.local.state import Home, Phase, Run, Secrets, write_private
from cluster.local.store import migrate_store, verify_store
from cluster.serve_api import ServeApi, ServeConfig, ServeUnavailable

RAY_START_TIMEOUT_S, SANDBOX_START_TIMEOUT_S = 120.0, 30.0
SERVE_STOP_S, RAY_STOP_S, CHILD_STOP_S = 6.0, 0.5, 1.0
"""Most of the time goes to Ray Serve, whose gateways settle open requests. In all a stop takes less than 10 s."""
ROOM_MIN_BYTES = 64 * 1024**2
"""With less free space the run is degraded, and a child that has ended waits: it may have ended of a full disk."""
_WATCH_S = 0.5


class StopRequested(KeyboardInterrupt):
    """This process got SIGINT, SIGTERM or SIGHUP."""


class Supervisor:
    """The processes of one farebox. Use it in the main thread: children end when the thread that started them ends."""

    def __init__(self, settings: Settings, home: Home, progress: Progress, timeout_s: float) -> None:
        self._settings = settings
        self._home = home
        self._progress = _lasting(progress)
        self._timeout_s = timeout_s
        self._operator = OperatorEnvironment.read()
        self._has_sandbox = self._operator.farebox_dodo_environment == SANDBOX
        self._store: valkey.Valkey | None = None
        self._children: dict[str, Child] = {}
        self._api: ServeApi | None = None
        self._restarts = Restarts()
        self._secrets: Secrets = home.secrets()
        self._run = self._first_run()

    def start(self) -> None:
        """Start everything and wait until it is healthy. The caller holds the folder's lock."""
        settings, home = self._settings, self._home
        check_machine(settings)
        self._operator.keep_in(home)
        if ended := children.end_processes_of(home.path):
            self._begin(f"ended {ended} processes of an earlier run")
        check_ports(settings, needs_sandbox=self._has_sandbox)
        self._run = replace(self._run, ports_base=free_block(home.path).base)
        check = begin_check(settings, home)
        store_url = self._start_store()
        env = service_environment(settings, self._secrets, store_url, self._operator)
        self._start_ray(env)
        if self._has_sandbox:
            self._start_sandbox()
        self._begin("checking the configuration")
        config = end_check(check, settings, home)
        if self._has_sandbox:
            self._wait_for_sandbox()
        self._make_at_dodo(config, env)
        self._deploy(config)
        if self._has_sandbox:
            self._begin("creating the demo's tenants")
            demo.ensure_tenants(settings, home, self._secrets)
        self._run = home.write_run(replace(self._run, phase=Phase.HEALTHY, step=""))

    def _make_at_dodo(self, config: ServeConfig, env: Mapping[str, str]) -> None:
        """In the sandbox, create what it lacks of what is sold. At the real Dodo, that is a command's to ask for."""
        if self._has_sandbox:
            self._begin("creating products in the Dodo sandbox")
            sync_products(config, env)
        elif missing := asyncio.run(missing_products(config, env)):
            self._begin(f"not at Dodo, and so not on sale until `farebox dodo sync`: {', '.join(missing)}")

    def watch(self) -> None:
        """Restart the store and the sandbox when they end, until a signal arrives.

        A full disk ends neither this process nor the run: it is degraded until there is room again.

        Raises:
            StopRequested: the signal.
            LaunchError: Ray ended, or the others ended too often.
        """
        while True:
            time.sleep(_WATCH_S)
            if self._children["ray"].has_ended:
                raise LaunchError(f"Ray ended unexpectedly; the end of its log:\n{self._children['ray'].tail()}")
            has_room = shutil.disk_usage(self._home.path).free >= ROOM_MIN_BYTES
            problems = [] if has_room else [_no_room(self._home.path)]
            if self._store is not None and self._store.process.poll() is not None:
                problems += self._restart("the store", self._restart_store, has_room)
            sandbox = self._children.get("sandbox")
            if sandbox is not None and sandbox.has_ended:
                problems += self._restart("the sandbox", self._run_sandbox, has_room)
            self._show("; ".join(problems))

    def stop(self) -> None:
        """Stop everything. The store is last, so that gateways can still settle open requests."""
        self._run = self._home.write_run(replace(self._run, phase=Phase.STOPPING))
        if self._api is not None:
            self._progress("stopping Ray Serve")
            self._stop_serve(self._api)
        self._progress("stopping Ray")
        for name in ("ray", "sandbox"):
            if child := self._children.pop(name, None):
                child.end(RAY_STOP_S if name == "ray" else CHILD_STOP_S)
        store = {self._store.pid} if self._store else set()
        children.end_processes_of(self._home.path, store, CHILD_STOP_S)
        if self._store is not None:
            self._progress("stopping the store")
            self._store.stop()
            self._store = None
        self._home.remove_run()

    def fail(self, problem: str) -> None:
        """Write why this run failed, for ``farebox up --detach`` and ``farebox status``."""
        self._home.write_run(replace(self._run, phase=Phase.FAILED, problem=problem))

    def _start_store(self) -> str:
        if url := self._operator.redis_url:
            self._begin("using the store of REDIS_URL")
        else:
            self._begin("starting the store")
            self._store = self._run_store()
            url = self._store.url
            asyncio.run(migrate_store(url, self._begin))
        options = store_options_in(self._settings.config)
        asyncio.run(verify_store(url, options, self._operator.farebox_dodo_environment))
        self._run = replace(self._run, store_url=url)
        self._write_pids()
        return url

    def _restart_store(self) -> None:
        assert self._store is not None, "only a store that this process started ends here"
        self._store.kill()
        self._store = self._run_store()

    def _run_store(self) -> valkey.Valkey:
        return valkey.start(self._home.store, env=inherited() | {OWNER: str(self._home.path)})

    def _start_sandbox(self) -> None:
        self._begin("starting the Dodo sandbox")
        self._run_sandbox()

    def _run_sandbox(self) -> None:
        command = [sys.executable, "-m", "cluster.dodo_sandbox.server"]
        command += ["--port", str(self._settings.sandbox_port), "--state", str(self._home.dodo)]
        secrets = {
            "DODO_PAYMENTS_API_KEY": self._secrets.dodo_api_key,
            "DODO_PAYMENTS_WEBHOOK_KEY": self._secrets.webhook_secret,
        }
        self._start_child("sandbox", command, inherited() | ray_node.source_path() | secrets)

    def _wait_for_sandbox(self) -> None:
        sandbox, deadline = self._children["sandbox"], time.monotonic() + SANDBOX_START_TIMEOUT_S
        while True:
            try:
                httpx.get(self._settings.sandbox_url, timeout=2)
                return
            except httpx.HTTPError:
                if sandbox.has_ended or time.monotonic() > deadline:
                    raise LaunchError(
                        f"the Dodo sandbox did not start; the end of its log:\n{sandbox.tail()}"
                    ) from None
                time.sleep(0.05)

    def _start_ray(self, env: dict[str, str]) -> None:
        self._begin("starting Ray")
        settings, home = self._settings, self._home
        ours = ray_node.folder(home.path)
        ray_node.clear(ours)
        env = inherited() | ray_node.environment(settings, self._run.ports, ours, self._secrets.ray_token) | env
        self._start_child("ray", ray_node.command(settings, self._run.ports, ours), env)

    def _deploy(self, config: ServeConfig) -> None:
        ray = self._children["ray"]
        self._api = ServeApi(self._settings.dashboard_url, self._secrets.ray_token)
        self._begin("waiting for Ray")
        deadline = time.monotonic() + RAY_START_TIMEOUT_S
        while not self._api.is_up():
            if ray.has_ended or time.monotonic() > deadline:
                raise LaunchError(f"Ray did not start; the end of its log:\n{ray.tail()}")
            time.sleep(0.1)
        self._begin("deploying")
        write_private(self._home.deployed, json.dumps(config, indent=2))
        launch.put(self._api, config)
        launch.wait_healthy(self._api, self._settings.api_url, self._begin, self._timeout_s)

    def _stop_serve(self, api: ServeApi) -> None:
        try:
            api.delete(SERVE_STOP_S)
        except ServeUnavailable:
            self._progress(
                "Ray Serve did not stop in time: requests that still ran are billed when their leases expire"
            )
        api.close()

    def _start_child(self, name: str, command: list[str], env: dict[str, str]) -> None:
        log = self._home.logs / f"{name}.log"
        self._children[name] = children.start(name, command, env, self._home.path, log)
        self._write_pids()

    def _restart(self, what: str, start: Callable[[], None], has_room: bool) -> list[str]:
        """Start a child that has ended again; returns what is wrong as long as it does not run.

        Raises:
            LaunchError: it ended too often.
        """
        now_s = time.monotonic()
        if not has_room or not self._restarts.is_due(what, now_s):
            return [f"{what} has ended, and is started again {'soon' if has_room else 'when there is room'}"]
        if (times := self._restarts.note(what, now_s)) > RESTARTS_MAX:
            raise LaunchError(
                f"{what} ended {times} times within an hour: see the logs in {self._home.logs} and {self._home.store}"
            )
        self._show(f"{what} ended unexpectedly: starting it again")
        try:
            start()
        except (ClusterError, OSError) as error:
            return [f"{what} does not start, and is tried again soon: {error}"]
        return []

    def _show(self, problem: str) -> None:
        """Let ``run.json`` say what is wrong, or that all is well, also where an earlier write of it failed."""
        phase = Phase.DEGRADED if problem else Phase.HEALTHY
        if problem != self._run.problem:
            self._progress(problem or "healthy again")
        self._run = replace(self._run, phase=phase, problem=problem, pids=self._pids())
        if self._home.read_run() != self._run:
            self._home.write_run(self._run)

    def _pids(self) -> dict[str, int]:
        pids = {name: child.process.pid for name, child in self._children.items()}
        return pids if self._store is None else pids | {"store": self._store.pid}

    def _write_pids(self) -> None:
        self._run = self._home.write_run(replace(self._run, pids=self._pids()))

    def _begin(self, step: str) -> None:
        self._progress(step)
        self._run = self._home.write_run(replace(self._run, step=step))

    def _first_run(self) -> Run:
        settings = self._settings
        return Run(
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            api_url=settings.api_url,
            dashboard_url=settings.dashboard_url,
            sandbox_url=settings.sandbox_url if self._has_sandbox else "",
            store_url="",
            config=str(settings.config),
            ports_base=0,
            haproxy=settings.haproxy,
            dodo_environment=self._operator.farebox_dodo_environment,
        )


def supervise(
    settings: Settings,
    progress: Progress,
    on_healthy: Callable[[], None],
    timeout_s: float = launch.HEALTHY_TIMEOUT_S,
) -> None:
    """Run one farebox from start to stop; returns after a signal stopped it.

    ``on_healthy`` is called once; before that, ``timeout_s`` may pass.

    Raises:
        AlreadyRunning: another supervisor runs in this folder.
        ClusterError, BillingError: a part of it does not start, or does not keep running.
    """
    home, progress = Home.open(settings), _lasting(progress)
    with home.lock(), _signals():
        supervisor = Supervisor(settings, home, progress, timeout_s)
        problem = ""
        try:
            supervisor.start()
            on_healthy()
            supervisor.watch()
        except StopRequested:
            progress("stopping")
        except (ClusterError, BillingError) as error:
            problem = str(error)
            raise
        except OSError as error:
            problem = str(error)
            raise LaunchError(problem) from error
        finally:
            supervisor.stop()
            if problem:
                supervisor.fail(problem)


def _no_room(home: Path) -> str:
    return f"less than {ROOM_MIN_BYTES // 1024**2} MiB are free in {home}: make room, the rest goes on by itself"


def _lasting(progress: Progress) -> Progress:
    """``progress`` that ends nothing when its own log is on a full disk."""

    def report(step: str) -> None:
        with suppress(OSError):
            progress(step)

    return report


@contextmanager
def _signals() -> Iterator[None]:
    """Raise ``StopRequested`` at the first signal to end; ignore later ones, since the stop has begun."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise StopRequested

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

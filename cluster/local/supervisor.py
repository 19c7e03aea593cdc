"""The one process that owns a farebox: its store, its offline Dodo and its Ray, from start to stop.

Knows the order in which they start and end, and which of them are started again when they
die. What runs inside Ray Serve is the configuration's business.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import psutil

from cluster import valkey
from cluster.local import children, commerce, launch, ray_node
from cluster.local.children import OWNER, Child
from cluster.local.environment import SANDBOX, dodo_environment, inherited, service_environment
from cluster.local.launch import LaunchError, Say
from cluster.local.preflight import check_machine, check_ports
from cluster.local.settings import Settings, free_block
from cluster.local.state import Home, Phase, Run, Secrets, write_private
from cluster.serve_api import ServeApi, ServeConfig, ServeUnavailable

RAY_UP_TIMEOUT_S = 120.0
SERVE_STOP_S, RAY_STOP_S, CHILD_STOP_S = 6.0, 0.5, 1.0
"""Their sum, and the store's last write, stay under ten seconds. Serve has what is worth waiting for."""
RESTARTS_MAX = 5
"""Of the store or the sandbox within one run: one that keeps dying is not helped by another start."""
_WATCH_S = 0.5


class StopAsked(KeyboardInterrupt):
    """Somebody asked this process to end."""


class Supervisor:
    """Everything one farebox runs. Lives in a process's main thread, since its children die with that thread."""

    def __init__(self, settings: Settings, home: Home, say: Say, timeout_s: float) -> None:
        self._settings = settings
        self._home = home
        self._print = say
        self._timeout_s = timeout_s
        self._dodo = dodo_environment()
        self._store: valkey.Valkey | None = None
        self._children: dict[str, Child] = {}
        self._api: ServeApi | None = None
        self._restarts = 0
        self._secrets: Secrets = home.secrets()
        self._run = self._first_run()

    def start(self) -> None:
        """Start everything and wait until it is healthy; the folder's lock is held by the caller."""
        settings, home = self._settings, self._home
        check_machine(settings)
        if ended := children.end_strays(home.path):
            self._say(f"ended {ended} processes that an earlier run left")
        check_ports(settings, needs_sandbox=self._dodo == SANDBOX)
        self._run = replace(self._run, ports_base=free_block(home.path).base)
        check = commerce.begin_check(settings, home)
        store_url = self._start_store()
        env = service_environment(settings, self._secrets, store_url)
        self._start_ray(env)
        if self._dodo == SANDBOX:
            self._start_sandbox()
        self._say("checking the configuration")
        config = commerce.end_check(check, settings, home)
        if self._dodo == SANDBOX:
            self._say("telling the offline Dodo what is for sale")
            commerce.wait_for_sandbox(settings.sandbox_url, self._children["sandbox"])
            commerce.register(config, env)
        self._deploy(config)
        if self._dodo == SANDBOX:
            self._say("making the demo's tenants")
            commerce.seed_demo(settings, home, self._secrets)
        self._run = home.tell(replace(self._run, phase=Phase.HEALTHY, step=""))

    def watch(self) -> None:
        """Keep the store and the sandbox alive until somebody asks for the end.

        Raises:
            LaunchError: Ray is gone, or something keeps dying.
        """
        while True:
            time.sleep(_WATCH_S)
            if self._children["ray"].has_ended:
                raise LaunchError(f"Ray ended by itself; the end of its log:\n{self._children['ray'].tail()}")
            if self._store is not None and self._store.process.poll() is not None:
                self._count_restart("the store")
                self._store.kill()
                self._store = self._run_store()
            sandbox = self._children.get("sandbox")
            if sandbox is not None and sandbox.has_ended:
                self._count_restart("the sandbox")
                self._start_sandbox()
            self._tell_pids()

    def stop(self) -> None:
        """End everything in the order Serve, Ray, store, so that open settles find their store."""
        self._run = self._home.tell(replace(self._run, phase=Phase.STOPPING))
        if self._api is not None:
            self._print("ending Ray Serve")
            self._end_serve(self._api)
        self._print("ending Ray")
        for name in ("ray", "sandbox"):
            if child := self._children.pop(name, None):
                child.end(RAY_STOP_S if name == "ray" else CHILD_STOP_S)
        spared = {self._store.pid} if self._store else set()
        children.end_strays(self._home.path, spared, CHILD_STOP_S)
        if self._store is not None:
            self._print("ending the store")
            self._store.stop()
            self._store = None
        self._home.forget_run()

    def fail(self, problem: str) -> None:
        """Leave word of why this run ended, for whoever waits for it or asks later."""
        self._home.tell(replace(self._run, phase=Phase.FAILED, problem=problem))

    def _start_store(self) -> str:
        if url := os.environ.get("REDIS_URL"):
            self._say("using the store of REDIS_URL")
        else:
            self._say("starting the store")
            self._store = self._run_store()
            url = self._store.url
            commerce.migrate_store(url, self._say)
        commerce.verify_store(url, launch.store_terms_in(self._settings.config))
        self._run = replace(self._run, store_url=url)
        self._tell_pids()
        return url

    def _run_store(self) -> valkey.Valkey:
        return valkey.start(self._home.store, env=inherited() | {OWNER: str(self._home.path)})

    def _start_sandbox(self) -> None:
        self._say("starting the offline Dodo")
        command = [sys.executable, "-m", "cluster.dodo_sandbox.server"]
        command += ["--port", str(self._settings.sandbox_port), "--state", str(self._home.dodo)]
        secrets = {
            "DODO_PAYMENTS_API_KEY": self._secrets.dodo_api_key,
            "DODO_PAYMENTS_WEBHOOK_KEY": self._secrets.webhook_secret,
        }
        self._start_child("sandbox", command, inherited() | ray_node.source_path() | secrets)

    def _start_ray(self, env: dict[str, str]) -> None:
        self._say("starting Ray")
        settings, home = self._settings, self._home
        ours = ray_node.folder(home.path)
        ray_node.clear(ours)
        env = inherited() | ray_node.environment(settings, self._run.ports, ours, self._secrets.ray_token) | env
        self._start_child("ray", ray_node.command(settings, self._run.ports, ours), env)

    def _deploy(self, config: ServeConfig) -> None:
        ray = self._children["ray"]
        self._api = ServeApi(self._settings.dashboard_url, self._secrets.ray_token)
        self._say("waiting for Ray")
        deadline = time.monotonic() + RAY_UP_TIMEOUT_S
        while not self._api.is_up():
            if ray.has_ended or time.monotonic() > deadline:
                raise LaunchError(f"Ray did not start; the end of its log:\n{ray.tail()}")
            time.sleep(0.1)
        self._say("deploying")
        write_private(self._home.deployed, json.dumps(config, indent=2))
        launch.put(self._api, config)
        launch.wait_healthy(self._api, self._settings.api_url, self._say, self._timeout_s)

    def _end_serve(self, api: ServeApi) -> None:
        try:
            api.delete(SERVE_STOP_S)
        except ServeUnavailable:
            self._print("Ray Serve did not end in time: leases bill what was still running")
        api.close()

    def _start_child(self, name: str, command: list[str], env: dict[str, str]) -> None:
        log = self._home.logs / f"{name}.log"
        self._children[name] = children.start(name, command, env, self._home.path, log)
        self._tell_pids()

    def _count_restart(self, what: str) -> None:
        self._restarts += 1
        self._print(f"{what} ended by itself: starting it again")
        if self._restarts > RESTARTS_MAX:
            raise LaunchError(f"{what} keeps ending: see {self._home.logs} and {self._home.store}")

    def _tell_pids(self) -> None:
        pids = {name: child.process.pid for name, child in self._children.items()}
        if self._store is not None:
            pids["store"] = self._store.pid
        if pids != self._run.pids:
            self._run = self._home.tell(replace(self._run, pids=pids))

    def _say(self, step: str) -> None:
        self._print(step)
        self._run = self._home.advance(self._run, step)

    def _first_run(self) -> Run:
        settings = self._settings
        return Run(
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            api_url=settings.api_url,
            dashboard_url=settings.dashboard_url,
            sandbox_url=settings.sandbox_url if self._dodo == SANDBOX else "",
            store_url="",
            config=str(settings.config),
            ports_base=0,
            haproxy=settings.haproxy,
        )


def supervise(settings: Settings, say: Say, ready: Say, timeout_s: float = launch.HEALTHY_TIMEOUT_S) -> None:
    """Run one farebox from start to stop; returns when somebody asked for its end.

    ``ready`` is told once, when it is healthy.

    Raises:
        AlreadyRunning: this folder has its supervisor.
        Obstacle, SettingsError, LaunchError, StoreError, BillingError: what is in the way, and what to do.
    """
    home = Home.open(settings)
    with home.lock(), _signals():
        supervisor = Supervisor(settings, home, say, timeout_s)
        problem = ""
        try:
            supervisor.start()
            ready("")
            supervisor.watch()
        except StopAsked:
            say("asked to stop")
        except commerce.FAILURES as error:
            problem = str(error)
            raise
        finally:
            supervisor.stop()
            if problem:
                supervisor.fail(problem)


@contextmanager
def _signals() -> Iterator[None]:
    """Turn the first request to end into ``StopAsked``; later ones find us ending already."""

    def ask(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise StopAsked

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

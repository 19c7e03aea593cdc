"""Checks a ``serve_config.yaml`` before it is deployed: every key, value, price and adapter.

Ray Serve itself accepts most of the errors that are found here.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from billing.catalog.plans import PlanKind, Quota
from cluster.checking.document import Document, Place, Unreadable, read_document
from cluster.checking.findings import CheckedModel, CheckFailed, CheckReport, Finding
from cluster.checking.models import Base, BaseRefused, checked, open_adapter, open_base, real_path
from cluster.checking.shape import Shape, value_at
from cluster.checking.spelling import did_you_mean
from cluster.serve_api import GATEWAY, REPLICA, ServeConfig
from deployments.autoscaling import QueuedTokens
from deployments.config import BillingArgs, FareboxArgs, GatewayUserConfig, ModelEntry

QUEUED_TOKENS_POLICY = "deployments.autoscaling:QueuedTokens"
FAREBOX, BILLING = "deployments.app:build", "deployments.app:build_billing"
ARGS: Mapping[str, type[BaseModel]] = {FAREBOX: FareboxArgs, BILLING: BillingArgs}
DEPLOYMENTS: Mapping[str, tuple[str, ...]] = {FAREBOX: (GATEWAY, REPLICA), BILLING: ("BillingActor",)}


def check(path: Path) -> CheckReport:
    """Check a file. Errors in it are in the report and never raised."""
    return _check(path)[0]


def resolve(path: Path) -> ServeConfig:
    """The content of a valid file with absolute paths and every adapter's digest, ready to be sent to Ray Serve.

    Raises:
        CheckFailed: the file has errors.
    """
    report, document = _check(path)
    if document is None or not report.is_valid:
        raise CheckFailed(report)
    return _resolved(document, report, path.absolute().parent)


def portable(path: Path) -> str:
    """The same as YAML, with every folder as an absolute path, so that it can be applied from anywhere.

    Raises:
        CheckFailed: the file has errors.
    """
    config, folder = resolve(path), path.absolute().parent
    for args in (app.get("args") or {} for app in config["applications"]):
        args |= {name: real_path(args[name], folder) for name in ("adapter_cache_dir", "spool_dir") if name in args}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)


def _check(path: Path) -> tuple[CheckReport, Document | None]:
    try:
        document = read_document(path)
    except Unreadable as unreadable:
        return CheckReport(path, (Finding("", str(unreadable), unreadable.line),)), None
    shape = Shape(document)
    shape.serve()
    places = dict(_applications(shape, document))
    args = _args(shape, places)
    sales_place = (*_deployment(document, places.get(FAREBOX), GATEWAY), "user_config")
    sales = _sales(shape, document, sales_place, places)
    models = tuple(_models(shape, document, sales_place, args, path.absolute().parent))
    if args is not None and places.get(FAREBOX):
        _check_together(shape, document, places, args, sales)
    plans, packs = (tuple(sales.plans), tuple(sales.packs)) if sales else ((), ())
    findings = sorted(shape.findings, key=lambda finding: (finding.is_warning, finding.line))
    return CheckReport(path, tuple(findings), models, plans, packs), document


def _applications(shape: Shape, document: Document) -> Iterator[tuple[str, Place]]:
    """The places of farebox's two applications. Each must be there once, without unknown deployments."""
    found: set[str] = set()
    listed = document.values.get("applications")
    for number, app in enumerate(listed if isinstance(listed, list) else []):
        place: Place = ("applications", number)
        target = str(app.get("import_path")) if isinstance(app, Mapping) else ""
        if target not in DEPLOYMENTS:
            if target.startswith("deployments."):
                shape.add((*place, "import_path"), f"farebox has no {target}: {did_you_mean(target, tuple(ARGS))}")
            continue
        if target in found:
            shape.add(place, f"a second application with `import_path: {target}`: remove one")
            continue
        found.add(target)
        _check_deployments(shape, document, place, DEPLOYMENTS[target])
        yield target, place
    if FAREBOX not in found:
        shape.add(
            ("applications",),
            f"no application with `import_path: {FAREBOX}`: nothing would be served; add it, see serve_config.yaml",
        )
    if BILLING not in found:
        shape.add(
            ("applications",),
            f"no application with `import_path: {BILLING}`: no usage would be billed; add it, see serve_config.yaml",
        )


def _check_deployments(shape: Shape, document: Document, app: Place, known: tuple[str, ...]) -> None:
    listed = value_at(document.values, (*app, "deployments"))
    for number, deployment in enumerate(listed if isinstance(listed, list) else []):
        name = deployment.get("name") if isinstance(deployment, Mapping) else None
        place: Place = (*app, "deployments", number)
        if name not in known:
            shape.add(place, f"this application has no deployment {name!r}: {did_you_mean(str(name), known)}")
        elif "num_cpus" not in (deployment.get("ray_actor_options") or {}):
            shape.add(
                place, "has no `ray_actor_options: {num_cpus: …}`: Ray would reserve a whole core", is_warning=True
            )


def _args(shape: Shape, places: Mapping[str, Place]) -> FareboxArgs | None:
    """Check the ``args`` of both applications; returns those of the API."""
    parsed: FareboxArgs | None = None
    for target, place in places.items():
        shape.spelling((*place, "args"), ARGS[target])
        args = shape.parsed((*place, "args"), ARGS[target])
        parsed = args if isinstance(args, FareboxArgs) else parsed
    return parsed


def _deployment(document: Document, app: Place | None, name: str) -> Place:
    """The place of a deployment in its application, also if the file does not have it."""
    listed = value_at(document.values, (*(app or ()), "deployments"))
    for number, deployment in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(deployment, Mapping) and deployment.get("name") == name:
            return (*(app or ()), "deployments", number)
    return (*(app or ()), "deployments", name)


def _sales(shape: Shape, document: Document, place: Place, places: Mapping[str, Place]) -> GatewayUserConfig | None:
    if FAREBOX not in places:
        return None
    if value_at(document.values, place) is None:
        shape.add(place, "is missing: adapters, prices and plans belong there")
        return None
    shape.spelling(place, GatewayUserConfig)
    sales = shape.parsed(place, GatewayUserConfig)
    if sales is not None:
        _check_plans(shape, place, sales)
    return sales


def _check_plans(shape: Shape, place: Place, sales: GatewayUserConfig) -> None:
    plan = sales.plans.get(sales.default_plan)
    if plan is None:
        known = did_you_mean(sales.default_plan, tuple(sales.plans))
        shape.add((*place, "default_plan"), f"{sales.default_plan!r} is not one of the plans: {known}")
    elif plan.is_postpaid:
        note = f"{sales.default_plan!r} is billed after use: new tenants can send no request until they subscribe"
        shape.add((*place, "default_plan"), note, is_warning=True)
    if not sales.packs and any(plan.kind is PlanKind.PREPAID for plan in sales.plans.values()):
        shape.add(
            (*place, "plans"), "has a prepaid plan, but there are no `packs` that its tenants can buy", is_warning=True
        )
    ids = tuple(entry.id for entry in (sales.base, *sales.adapters))
    quotas: dict[Place, Quota] = {("packs", name, "grants"): pack.grants for name, pack in sales.packs.items()}
    quotas |= {("plans", name, "allowance"): p.allowance for name, p in sales.plans.items() if p.allowance}
    for where, quota in quotas.items():
        for unknown in (adapter for adapter in quota.adapters if adapter not in ids):
            shape.add((*place, *where, "adapters"), f"{unknown!r} is not a model here: {did_you_mean(unknown, ids)}")
    _check_arms(shape, place, sales)


def _check_arms(shape: Shape, place: Place, sales: GatewayUserConfig) -> None:
    """The packs and plans of an experiment's arm must exist, and be hidden: others are offered in every arm."""
    for number, experiment in enumerate(sales.pricing.experiments):
        for index, arm in enumerate(experiment.arms):
            where: Place = (*place, "pricing", "experiments", number, "arms", index)
            for kind, names, known in (("packs", arm.packs, sales.packs), ("plans", arm.plans, sales.plans)):
                for name in names:
                    if name not in known:
                        shape.add(
                            (*where, kind), f"{name!r} is not one of the {kind}: {did_you_mean(name, tuple(known))}"
                        )
                    elif not known[name].is_hidden:
                        shape.add(
                            (*where, kind),
                            f"{name!r} is not `visibility: hidden`, so every arm offers it",
                            is_warning=True,
                        )


def _models(
    shape: Shape, document: Document, place: Place, args: FareboxArgs | None, folder: Path
) -> Iterator[CheckedModel]:
    """Check every valid entry's files; errors become findings at the entry."""
    base = _base(shape, document, place, args, folder)
    seen: set[str] = set()
    for where, entry in _entries(document, place):
        problem = "an earlier entry has this id: change one of them" if entry.id in seen else ""
        seen.add(entry.id)
        model = _model(entry, args, base, folder, problem, is_base=where[-1] == "base")
        if model.problem:
            shape.add(where, model.problem)
        yield model


def _base(shape: Shape, document: Document, place: Place, args: FareboxArgs | None, folder: Path) -> Base | None:
    if args is None:
        return None
    if (wanted := value_at(document.values, (*place, "base", "id"))) not in (None, args.model.id):
        shape.add((*place, "base", "id"), f"must be {args.model.id!r}, the `id` under `args > model`, not {wanted!r}")
    try:
        return open_base(args, folder)
    except BaseRefused as error:
        shape.add((*place[:2], "args", "model", "path"), str(error))
        return None


def _entries(document: Document, place: Place) -> Iterator[tuple[Place, ModelEntry]]:
    """The entries that are valid by themselves. Errors of the others were reported before."""
    listed = value_at(document.values, (*place, "adapters"))
    number = len(listed) if isinstance(listed, list) else 0
    for where in ((*place, "base"), *((*place, "adapters", index) for index in range(number))):
        try:
            yield where, ModelEntry.model_validate(value_at(document.values, where))
        except ValidationError:
            continue


def _model(
    entry: ModelEntry, args: FareboxArgs | None, base: Base | None, folder: Path, problem: str, *, is_base: bool
) -> CheckedModel:
    try:
        entry.to_model()
    except ValidationError as error:
        problem = problem or f"`{error.errors()[0]['loc'][0]}` is invalid: {error.errors()[0]['msg']}"
    if is_base and entry.path:
        problem = problem or "the base model's path belongs in `args > model`: remove it here"
    elif not is_base and not entry.path:
        problem = problem or "`path` is missing: the adapter's folder or URL"
    if problem or is_base:
        return checked(entry, problem=problem)
    return open_adapter(entry, args, base, folder)


def _check_together(
    shape: Shape, document: Document, places: Mapping[str, Place], args: FareboxArgs, sales: GatewayUserConfig | None
) -> None:
    """Check values that are valid by themselves but may contradict each other."""
    app = places[FAREBOX]
    if value_at(document.values, ("http_options", "host")) is None:
        shape.add(
            ("http_options",), "has no `host`: Ray would listen on 0.0.0.0, every network interface", is_warning=True
        )
    serve_limit = value_at(document.values, ("http_options", "request_timeout_s"))
    if isinstance(serve_limit, int | float) and serve_limit <= args.answer_timeout_s:
        note = (
            f"not below Ray's request_timeout_s of {serve_limit:g} s, which would end requests as if their clients had "
            "disconnected, and charge them: lower it"
        )
        shape.add((*app, "args", "answer_timeout_s"), note, is_warning=True)
    replica = _deployment(document, app, REPLICA)
    open_calls = value_at(document.values, (*replica, "max_ongoing_requests"))
    wanted = args.engine.max_running + args.engine.max_queued
    if isinstance(open_calls, int) and open_calls < wanted:
        note = (
            f"{open_calls} is less than max_running + max_queued = {wanted}, so that Ray would queue requests: raise it"
        )
        shape.add((*replica, "max_ongoing_requests"), note, is_warning=True)
    _policy(shape, document, (*replica, "autoscaling_config", "policy"))
    for term, default in (("durability", "strict"), ("min_replicas_acked", 0)):
        asked = [value_at(document.values, (*place, "args", term)) for place in places.values()]
        if len({str(value or default) for value in asked}) > 1:
            shape.add(
                (*app, "args", term),
                "differs between the two applications, which share one store: set both to the same value",
            )
    pinned = [entry.id for entry in sales.adapters if entry.pinned] if sales else []
    if len(pinned) >= args.engine.adapter_slots:
        slots = args.engine.adapter_slots
        note = f"{len(pinned)} adapters are pinned, but `adapter_slots` is {slots}: pin fewer adapters or raise it"
        shape.add((*app, "args", "engine"), note)


def _policy(shape: Shape, document: Document, place: Place) -> None:
    """Check the options of our autoscaling policy. Ray would only log an error in them, and never scale."""
    if value_at(document.values, (*place, "policy_function")) != QUEUED_TOKENS_POLICY:
        return
    kwargs = value_at(document.values, (*place, "policy_kwargs"))
    try:
        QueuedTokens(**(kwargs if isinstance(kwargs, dict) else {}))
    except (TypeError, ValueError) as error:
        shape.add((*place, "policy_kwargs"), str(error).removeprefix("QueuedTokens.__init__() "))


def _resolved(document: Document, report: CheckReport, folder: Path) -> ServeConfig:
    config: ServeConfig = deepcopy(dict(document.values))
    digests = {model.id: model.digest for model in report.models}
    for app in config["applications"]:
        if app["import_path"] == BILLING and (archive := (app.get("args") or {}).get("archive_url")):
            app["args"]["archive_url"] = real_path(archive, folder)
        if app["import_path"] != FAREBOX:
            continue
        app["args"]["model"]["path"] = real_path(app["args"]["model"]["path"], folder)
        sales = next(d for d in app["deployments"] if d["name"] == GATEWAY)["user_config"]
        for entry in sales.get("adapters") or []:
            entry["path"] = real_path(entry["path"], folder)
            entry["digest"] = digests[entry["id"]]
    return config

"""``farebox check``: each error of a configuration is one finding, with its place and line."""

import json
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from typer.testing import CliRunner

from cluster.checking.check import check, resolve
from cluster.checking.findings import CheckFailed
from cluster.cli.findings import report_table
from cluster.cli.main import app
from deployments.gateway.catalog_holder import read_catalog
from deployments.inference.adapters import WEIGHTS_FILE, digest_adapter
from tests.support.configuration import ADAPTERS, Workspace, make_adapter


def test_shipped_file_is_valid(workspace: Workspace) -> None:
    report = workspace.check()
    assert report.findings == ()
    assert report.is_valid
    assert [model.id for model in report.models] == ["farebox-base", *ADAPTERS]
    assert report.plans == ("free", "prepaid", "payg", "pro")


@pytest.mark.parametrize(
    ("old", "new", "where", "problem"),
    [
        ("proxy_location:", "proxy_locaton:", "proxy_locaton", "did you mean `proxy_location`?"),
        ("  host: 127.0.0.1", "  hosts: 127.0.0.1", "http_options > hosts", "did you mean `host`?"),
        (
            "import_path: deployments.app:build\n",
            "import_path: deployments.app:build\n    rout_prefix: /\n",
            "farebox > rout_prefix",
            "did you mean `route_prefix`?",
        ),
        (
            "        max_ongoing_requests: 300",
            "        max_ongoing_request: 300",
            "LoraReplica > max_ongoing_request",
            "did you mean `max_ongoing_requests`?",
        ),
        (
            "          max_replicas: 2",
            "          max_replica: 2",
            "LoraReplica > autoscaling_config > max_replica",
            "did you mean `max_replicas`?",
        ),
        (
            "          num_cpus: 0.5",
            "          num_cpus: 0.5\n          num_gpu: 1",
            "ray_actor_options > num_gpu",
            "did you mean `num_gpus`?",
        ),
        (
            "        user_config:",
            "        user_confg: {}\n        user_config:",
            "Gateway > user_confg",
            "did you mean `user_config`?",
        ),
        ("  log_level: INFO", "  log_levl: INFO", "logging_config > log_levl", "did you mean `log_level`?"),
        (
            "        max_running: 16",
            "        max_runing: 16",
            "farebox > args > engine > max_runing",
            "did you mean `max_running`?",
        ),
        (
            "      flush_interval_s: 5.0",
            "      flush_intervall_s: 5.0",
            "billing > args > flush_intervall_s",
            "did you mean `flush_interval_s`?",
        ),
        (
            "              visibility: public",
            "              visiblity: public",
            "adapters > pirate > visiblity",
            "did you mean `visibility`?",
        ),
        (
            '                cached_input_per_1m: "0.05"',
            '                cached_per_1m: "0.05"',
            "pirate > price > cached_per_1m",
            "did you mean `cached_input_per_1m`?",
        ),
        (
            "              grace_days: 3",
            "              grace_day: 3",
            "plans > pro > grace_day",
            "did you mean `grace_days`?",
        ),
        (
            "              expires_days: 90",
            "              expire_days: 90",
            "packs > calls-1000 > expire_days",
            "did you mean `expires_days`?",
        ),
        (
            "limits: {requests_per_minute: 6000}",
            "limits: {request_per_minute: 6000}",
            "pro > limits > request_per_minute",
            "did you mean `requests_per_minute`?",
        ),
    ],
)
def test_misspelt_key_is_found_at_any_depth(workspace: Workspace, old: str, new: str, where: str, problem: str) -> None:
    workspace.edit(old, new)
    found_where, found_problem, line = workspace.only_error()
    assert found_where.endswith(where)
    assert problem in found_problem
    assert where.rpartition(" > ")[2] in workspace.text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("old", "new", "where", "problem"),
    [
        ('input_per_1m: "0.50"', "input_per_1m: 0.50", "pirate > price > input_per_1m", "in quotes"),
        (
            'per_request: "0.0005"',
            'per_request: "0.0005 EUR"',
            "yaml > price > per_request",
            "not an amount in dollars",
        ),
        ('per_request: "0.0005"', 'per_request: "-1"', "yaml > price > per_request", "greater than or equal to 0"),
        (
            'cached_input_per_1m: "0.05"',
            'cached_input_per_1m: "9"',
            "pirate > price",
            "a cache hit must never cost more",
        ),
        ("visibility: public", "visibility: everyone", "pirate > visibility", "'public'"),
        ("kind: pay_as_you_go", "kind: postpaid", "plans > payg > kind", "'pay_as_you_go'"),
        ('              credit_limit: "25.00"\n', "", "plans > payg", "needs `credit_limit`"),
        (
            'allowance: {usd: "1.00"}',
            'allowance: {usd: "1.00", requests: 5}',
            "plans > free > allowance",
            "either `requests` or `usd`",
        ),
        ('              price: "50.00"', '              price: "50.001"', "packs > large", "whole cents"),
        ("max_adapter_rank: 64", "max_adapter_rank: 60", "args > engine > max_adapter_rank", "multiple of 8"),
        (
            "flush_interval_s: 5.0",
            "flush_interval_s: soon",
            "billing > args > flush_interval_s",
            "valid number, unable to parse",
        ),
        ("  port: 8000", "  port: eight", "http_options > port", "valid integer"),
        ("max_ongoing_requests: 1000", "max_ongoing_requests: 0", "Gateway > max_ongoing_requests", "greater than 0"),
        ("min_replicas: 1", "min_replicas: 9", "LoraReplica > autoscaling_config", "min_replicas"),
        ("default_plan: prepaid", "default_plan: prepayed", "Gateway > default_plan", "did you mean `prepaid`?"),
        (
            "adapters: [pirate, support]",
            "adapters: [pirat, support]",
            "calls-1000 > grants > adapters",
            "'pirat' is not a model here: did you mean `pirate`?",
        ),
        ("        id: farebox-base", "        id: other-base", "base > id", "must be 'other-base'"),
        ("adapter_slots: 8", "adapter_slots: 0", "engine > adapter_slots", "greater than or equal to 1"),
    ],
)
def test_invalid_value_is_explained(workspace: Workspace, old: str, new: str, where: str, problem: str) -> None:
    workspace.edit(old, new)
    found_where, found_problem, line = workspace.only_error()
    assert found_where.endswith(where)
    assert problem in found_problem
    assert line > 0


def test_missing_price_names_the_remedy(workspace: Workspace) -> None:
    workspace.edit(
        '              price:\n                input_per_1m: "1.00"\n                output_per_1m: "3.00"\n', ""
    )
    where, problem, line = workspace.only_error()
    assert where.endswith("adapters > support > price")
    assert "`price` is missing" in problem
    assert "output_per_1m" in problem
    assert line == workspace.line_of("- id: support")


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("applications: [", "not YAML", 1),
        ("a: 1\n\tb: 2\n", "not YAML", 2),
        ("a: 1\nb: c: d\n", "not YAML", 2),
        ("- a\n- b\n", "must be a mapping", 1),
        ("", "must be a mapping", 1),
    ],
)
def test_yaml_error_names_the_line(tmp_path: Path, text: str, problem: str, line: int) -> None:
    (tmp_path / "c.yaml").write_text(text)
    (finding,) = check(tmp_path / "c.yaml").findings
    assert problem in finding.problem
    assert finding.line == line


def test_unreadable_file_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in check(tmp_path / "absent.yaml").findings[0].problem
    assert "not UTF-8" in check(tmp_path / "binary.yaml").findings[0].problem


@pytest.mark.parametrize(
    "text", ["applications: 5", "applications: [5]", "applications: []", "x: 1", "applications: [{}]"]
)
def test_any_content_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    report = check(tmp_path / "c.yaml")
    assert not report.is_valid
    assert any("nothing would be served" in finding.problem for finding in report.errors)
    assert any("no usage would be billed" in finding.problem for finding in report.errors)


def test_duplicate_key_is_an_error(workspace: Workspace) -> None:
    workspace.edit("          default_plan: prepaid", "          default_plan: free\n          default_plan: prepaid")
    where, problem, line = workspace.only_error()
    assert where.endswith("default_plan")
    assert "twice" in problem
    assert line == workspace.line_of("default_plan: prepaid")


def test_duplicate_id_is_an_error(workspace: Workspace) -> None:
    workspace.edit("            - id: support\n", "            - id: yaml\n")
    workspace.edit("adapters: [pirate, support]", "adapters: [pirate]")
    _, problem, _ = workspace.only_error()
    assert "has this id" in problem


def test_invalid_id_is_an_error(workspace: Workspace) -> None:
    workspace.edit("- id: yaml\n", '- id: "my yaml!"\n')
    _, problem, _ = workspace.only_error()
    assert "`id` is invalid" in problem


def test_only_adapters_have_a_path(workspace: Workspace) -> None:
    workspace.edit("            id: farebox-base\n", "            id: farebox-base\n            path: x\n")
    workspace.edit("              path: .farebox/models/adapters/yaml\n", "")
    problems = [finding.problem for finding in workspace.check().errors]
    assert any("remove it here" in problem for problem in problems)
    assert any("`path` is missing" in problem for problem in problems)


def test_missing_application_is_an_error(workspace: Workspace) -> None:
    workspace.text = workspace.text[: workspace.text.index("  - name: billing")]
    _, problem, _ = workspace.only_error()
    assert "no usage would be billed" in problem


def test_unknown_deployment_is_an_error(workspace: Workspace) -> None:
    workspace.edit("- name: LoraReplica", "- name: LoraReplicas")
    _, problem, _ = workspace.only_error()
    assert "did you mean" in problem
    workspace.edit("import_path: deployments.app:build_billing", "import_path: deployments.app:billing")
    assert any("farebox has no deployments.app:billing" in finding.problem for finding in workspace.check().errors)


def test_each_error_is_a_finding(workspace: Workspace) -> None:
    workspace.edit("proxy_location:", "proxy_locaton:")
    workspace.edit('input_per_1m: "0.50"', "input_per_1m: 0.50")
    assert [finding.where.rpartition(" ")[2] for finding in workspace.check().errors] == [
        "proxy_locaton",
        "input_per_1m",
    ]


def test_missing_base_model_names_the_remedy(workspace: Workspace) -> None:
    workspace.edit(".farebox/models/base", ".farebox/models/none")
    where, problem, line = workspace.only_error()
    assert where == "farebox > args > model > path"
    assert "no such folder" in problem
    assert "python -m cluster.demo.models" in problem
    assert line == workspace.line_of(".farebox/models/none")


def test_context_beyond_base_model_is_an_error(workspace: Workspace) -> None:
    workspace.edit("max_context_tokens: 512", "max_context_tokens: 4096")
    _, problem, _ = workspace.only_error()
    assert "has 512 positions" in problem


@pytest.mark.parametrize("term", ["durability: strict", "min_replicas_acked: 0"])
def test_store_options_must_agree(workspace: Workspace, term: str) -> None:
    workspace.edit(term, term.replace("strict", "trusted").replace("0", "1"))
    where, problem, _ = workspace.only_error()
    assert where == f"farebox > args > {term.partition(':')[0]}"
    assert "share one store" in problem


def test_archive_path_is_resolved(workspace: Workspace) -> None:
    workspace.edit('archive_url: ""', "archive_url: records")
    assert resolve(workspace.file)["applications"][1]["args"]["archive_url"] == str(workspace.folder / "records")


def test_pinned_adapters_must_leave_a_slot(workspace: Workspace) -> None:
    workspace.edit("adapter_slots: 8", "adapter_slots: 1")
    workspace.edit("              visibility: public", "              pinned: true")
    _, problem, _ = workspace.only_error()
    assert "pinned" in problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden": 32}, "the base model"),
        ({"rank": 72}, "more than the engine's 64"),
        ({"fill": float("nan")}, "not finite"),
    ],
)
def test_unfit_adapter_is_explained(workspace: Workspace, changes: dict[str, float], problem: str) -> None:
    make_adapter(workspace.models / "adapters" / "misfit", **changes)  # type: ignore[arg-type]
    workspace.edit("adapters/yaml", "adapters/misfit")
    where, found, _ = workspace.only_error()
    assert where == "farebox > Gateway > adapters > yaml"
    assert problem in found
    assert [model.id for model in workspace.check().models if not model.is_valid] == ["yaml"]


def test_missing_adapter_is_an_error(workspace: Workspace) -> None:
    (workspace.models / "adapters" / "pirate" / WEIGHTS_FILE).unlink()
    workspace.edit("adapters/support", "adapters/nowhere")
    assert [finding.where.rpartition(" ")[2] for finding in workspace.check().errors] == ["pirate", "support"]


def test_wrong_digest_is_an_error(workspace: Workspace) -> None:
    workspace.edit("              adapter_class: extract", f"              digest: {'ab' * 32}")
    _, problem, _ = workspace.only_error()
    assert "`digest` is abababababab" in problem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  host: 127.0.0.1", "  root_path: ''", "0.0.0.0"),
        ("max_ongoing_requests: 300", "max_ongoing_requests: 5", "Ray would queue requests"),
        ("default_plan: prepaid", "default_plan: payg", "until they subscribe"),
        ("          num_cpus: 0.5", "          memory: 1000000", "a whole core"),
        ("request_timeout_s: 600", "request_timeout_s: 570", "as if their clients had disconnected"),
    ],
)
def test_warnings_do_not_prevent_deployment(workspace: Workspace, old: str, new: str, problem: str) -> None:
    workspace.edit(old, new)
    report = workspace.check()
    assert report.is_valid
    assert [problem in finding.problem for finding in report.findings] == [True]


def test_resolve_gives_absolute_paths_and_digests(workspace: Workspace) -> None:
    config = resolve(workspace.file)
    ServeDeploySchema.model_validate(config)
    app = config["applications"][0]
    assert app["args"]["model"]["path"] == str(workspace.models / "base")
    catalog = read_catalog(app["deployments"][0]["user_config"])
    assert catalog.rejected == ()
    for name in ADAPTERS:
        model = catalog.by_id()[name]
        assert model.path == str(workspace.models / "adapters" / name)
        assert model.digest == digest_adapter(workspace.models / "adapters" / name)


def test_resolve_changes_nothing_else(workspace: Workspace) -> None:
    written, config = yaml.safe_load(workspace.text), resolve(workspace.file)
    assert config["applications"][1] == written["applications"][1]
    assert config["applications"][0]["args"]["spool_dir"] == ".farebox/spool"
    for entry in config["applications"][0]["deployments"][0]["user_config"]["adapters"]:
        entry["path"] = f".farebox/models/adapters/{entry['id']}"
        del entry["digest"]
    config["applications"][0]["args"]["model"]["path"] = ".farebox/models/base"
    assert config == written


def test_resolved_output_has_no_relative_path(workspace: Workspace) -> None:
    done = CliRunner().invoke(app, ["check", "--resolved", str(workspace.file)])
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.stdout)
    ServeDeploySchema.model_validate(printed)
    args = printed["applications"][0]["args"]
    assert args["spool_dir"] == str(workspace.folder / ".farebox" / "spool")
    assert args["adapter_cache_dir"] == str(workspace.folder / ".farebox" / "adapters")
    assert str(workspace.folder) in done.stdout
    assert not [word for word in done.stdout.split() if word.startswith((".farebox", "./"))]
    expected = resolve(workspace.file)
    expected["applications"][0]["args"] = args
    assert printed == expected
    assert read_catalog(printed["applications"][0]["deployments"][0]["user_config"]).rejected == ()


def test_invalid_file_is_not_printed(workspace: Workspace) -> None:
    workspace.edit("proxy_location:", "proxy_locaton:")
    done = CliRunner().invoke(app, ["check", "--resolved", str(workspace.file)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "proxy_locaton" in done.stderr


def test_resolve_raises_with_the_report(workspace: Workspace) -> None:
    workspace.edit("proxy_location:", "proxy_locaton:")
    with pytest.raises(CheckFailed, match=r"line .*proxy_locaton") as refused:
        resolve(workspace.file)
    assert not refused.value.report.is_valid


def test_adapter_entry_of_three_lines(workspace: Workspace) -> None:
    make_adapter(workspace.models / "adapters" / "haiku")
    lines = (
        "- id: haiku",
        "  path: .farebox/models/adapters/haiku",
        '  price: {output_per_1m: "2.00"}',
        "# ADD YOURS HERE",
    )
    workspace.edit("# ADD YOURS HERE", ("\n" + 12 * " ").join(lines))
    report = workspace.check()
    assert report.findings == ()
    assert report.models[-1].id == "haiku"


def test_table_shows_models_and_findings(workspace: Workspace) -> None:
    workspace.edit('input_per_1m: "0.50"', "input_per_1m: 0.50")
    console = Console(width=200, record=True, file=(workspace.folder / "out").open("w"))
    with console.file:  # type: ignore[attr-defined]
        console.print(report_table(workspace.check()))
    shown = console.export_text()
    assert digest_adapter(workspace.models / "adapters" / "yaml")[:12] in shown
    assert "request $0.0005" in shown
    assert "error line" in shown
    assert ": 1 error" in shown


def test_report_as_json(workspace: Workspace) -> None:
    content = json.loads(workspace.check().to_json())
    assert content["is_right"] is True
    assert [model["is_right"] for model in content["models"]] == [True] * 4

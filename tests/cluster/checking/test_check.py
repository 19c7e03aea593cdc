"""What is wrong with a configuration is said, each mistake once and where it stands, before anything is deployed."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from safetensors.numpy import save_file
from transformers import LlamaConfig
from typer.testing import CliRunner

from cluster.checking.check import check, resolve
from cluster.checking.findings import CheckFailed, CheckReport
from cluster.cli.main import app
from deployments.gateway.catalog_holder import read_catalog
from deployments.inference.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_adapter

ADAPTERS = ("pirate", "yaml", "support")
HIDDEN = 16


def make_base(folder: Path) -> None:
    LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def make_adapter(folder: Path, *, hidden: int = HIDDEN, rank: int = 8, fill: float = 0.5) -> Path:
    folder.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": np.full((rank, hidden), fill, np.float32),
        f"{module}.lora_B.weight": np.full((hidden, rank), fill, np.float32),
    }
    save_file(weights, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


class Desk:
    """A folder with the shipped configuration and models that fit it."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self.models = folder / ".farebox" / "models"
        make_base(self.models / "base")
        for number, name in enumerate(ADAPTERS):
            make_adapter(self.models / "adapters" / name, fill=number + 0.5)

    @property
    def file(self) -> Path:
        path = self.folder / "serve_config.yaml"
        path.write_text(self.text)
        return path

    def edit(self, old: str, new: str) -> None:
        assert old in self.text, f"the shipped file no longer has {old!r}"
        self.text = self.text.replace(old, new, 1)

    def line_of(self, text: str) -> int:
        return 1 + next(number for number, line in enumerate(self.text.splitlines()) if text in line)

    def check(self) -> CheckReport:
        return check(self.file)

    def only_error(self) -> tuple[str, str, int]:
        """Where, what and in which line: each mistake is one finding."""
        report = self.check()
        assert len(report.errors) == 1, [str(finding) for finding in report.errors]
        assert not report.is_right
        return report.errors[0].where, report.errors[0].problem, report.errors[0].line


@pytest.fixture
def desk(tmp_path: Path, repo: Path) -> Desk:
    return Desk(tmp_path, (repo / "serve_config.yaml").read_text())


def test_the_shipped_file_is_right_and_says_everything_explicitly(desk: Desk) -> None:
    report = desk.check()
    assert report.findings == ()
    assert report.is_right
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
def test_a_misspelt_key_is_refused_at_every_depth(desk: Desk, old: str, new: str, where: str, problem: str) -> None:
    desk.edit(old, new)
    found_where, found_problem, line = desk.only_error()
    assert found_where.endswith(where)
    assert problem in found_problem
    assert where.rpartition(" > ")[2] in desk.text.splitlines()[line - 1]


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
def test_an_impossible_value_is_refused_in_words(desk: Desk, old: str, new: str, where: str, problem: str) -> None:
    desk.edit(old, new)
    found_where, found_problem, line = desk.only_error()
    assert found_where.endswith(where)
    assert problem in found_problem
    assert line > 0


def test_a_missing_price_is_refused_with_what_to_write(desk: Desk) -> None:
    desk.edit('              price:\n                input_per_1m: "1.00"\n                output_per_1m: "3.00"\n', "")
    where, problem, line = desk.only_error()
    assert where.endswith("adapters > support > price")
    assert "`price` is missing" in problem
    assert "output_per_1m" in problem
    assert line == desk.line_of("- id: support")


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
def test_what_is_no_yaml_is_refused_with_its_line(tmp_path: Path, text: str, problem: str, line: int) -> None:
    (tmp_path / "c.yaml").write_text(text)
    (finding,) = check(tmp_path / "c.yaml").findings
    assert problem in finding.problem
    assert finding.line == line


def test_a_missing_or_binary_file_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in check(tmp_path / "absent.yaml").findings[0].problem
    assert "not UTF-8" in check(tmp_path / "binary.yaml").findings[0].problem


@pytest.mark.parametrize(
    "text", ["applications: 5", "applications: [5]", "applications: []", "x: 1", "applications: [{}]"]
)
def test_nonsense_is_reported_and_never_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    report = check(tmp_path / "c.yaml")
    assert not report.is_right
    assert any("nothing would be served" in finding.problem for finding in report.errors)
    assert any("no usage would be billed" in finding.problem for finding in report.errors)


def test_a_key_written_twice_is_refused(desk: Desk) -> None:
    desk.edit("          default_plan: prepaid", "          default_plan: free\n          default_plan: prepaid")
    where, problem, line = desk.only_error()
    assert where.endswith("default_plan")
    assert "twice" in problem
    assert line == desk.line_of("default_plan: prepaid")


def test_an_id_used_twice_is_refused_where_it_stands_again(desk: Desk) -> None:
    desk.edit("            - id: support\n", "            - id: yaml\n")
    desk.edit("adapters: [pirate, support]", "adapters: [pirate]")
    _, problem, _ = desk.only_error()
    assert "ids must differ" in problem


def test_an_id_that_no_client_could_send_is_refused(desk: Desk) -> None:
    desk.edit("- id: yaml\n", '- id: "my yaml!"\n')
    _, problem, _ = desk.only_error()
    assert "`id` is not as it must be" in problem


def test_a_base_entry_has_no_path_and_an_adapter_has_one(desk: Desk) -> None:
    desk.edit("            id: farebox-base\n", "            id: farebox-base\n            path: x\n")
    desk.edit("              path: .farebox/models/adapters/yaml\n", "")
    problems = [finding.problem for finding in desk.check().errors]
    assert any("remove it here" in problem for problem in problems)
    assert any("`path` is missing" in problem for problem in problems)


def test_without_one_of_the_two_applications_the_file_is_refused(desk: Desk) -> None:
    desk.text = desk.text[: desk.text.index("  - name: billing")]
    _, problem, _ = desk.only_error()
    assert "no usage would be billed" in problem


def test_an_unknown_deployment_or_import_path_is_refused(desk: Desk) -> None:
    desk.edit("- name: LoraReplica", "- name: LoraReplicas")
    _, problem, _ = desk.only_error()
    assert "did you mean" in problem
    desk.edit("import_path: deployments.app:build_billing", "import_path: deployments.app:billing")
    assert any("farebox has no deployments.app:billing" in finding.problem for finding in desk.check().errors)


def test_two_mistakes_are_two_findings(desk: Desk) -> None:
    desk.edit("proxy_location:", "proxy_locaton:")
    desk.edit('input_per_1m: "0.50"', "input_per_1m: 0.50")
    assert [finding.where.rpartition(" ")[2] for finding in desk.check().errors] == ["proxy_locaton", "input_per_1m"]


def test_a_missing_base_model_is_refused_and_says_how_to_make_the_demo_s(desk: Desk) -> None:
    desk.edit(".farebox/models/base", ".farebox/models/none")
    where, problem, line = desk.only_error()
    assert where == "farebox > args > model > path"
    assert "no such folder" in problem
    assert "python -m cluster.demo.models" in problem
    assert line == desk.line_of(".farebox/models/none")


def test_a_context_longer_than_the_base_model_s_is_refused(desk: Desk) -> None:
    desk.edit("max_context_tokens: 512", "max_context_tokens: 4096")
    _, problem, _ = desk.only_error()
    assert "was made for 512" in problem


@pytest.mark.parametrize("term", ["durability: strict", "min_replicas_acked: 0"])
def test_two_terms_for_one_store_are_refused(desk: Desk, term: str) -> None:
    desk.edit(term, term.replace("strict", "trusted").replace("0", "1"))
    where, problem, _ = desk.only_error()
    assert where == f"farebox > args > {term.partition(':')[0]}"
    assert "share one store" in problem


def test_a_local_archive_is_resolved_like_every_path(desk: Desk) -> None:
    desk.edit('archive_url: ""', "archive_url: records")
    assert resolve(desk.file)["applications"][1]["args"]["archive_url"] == str(desk.folder / "records")


def test_more_pinned_adapters_than_leave_a_slot_are_refused(desk: Desk) -> None:
    desk.edit("adapter_slots: 8", "adapter_slots: 1")
    desk.edit("              visibility: public", "              pinned: true")
    _, problem, _ = desk.only_error()
    assert "pinned" in problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden": 32}, "the base model"),
        ({"rank": 72}, "more than the engine's 64"),
        ({"fill": float("nan")}, "not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_its_reason(
    desk: Desk, changes: dict[str, float], problem: str
) -> None:
    make_adapter(desk.models / "adapters" / "misfit", **changes)  # type: ignore[arg-type]
    desk.edit("adapters/yaml", "adapters/misfit")
    where, found, _ = desk.only_error()
    assert where == "farebox > Gateway > adapters > yaml"
    assert problem in found
    assert [model.id for model in desk.check().models if not model.is_right] == ["yaml"]


def test_a_folder_that_is_not_there_or_lacks_its_weights_is_refused(desk: Desk) -> None:
    (desk.models / "adapters" / "pirate" / WEIGHTS_FILE).unlink()
    desk.edit("adapters/support", "adapters/nowhere")
    assert [finding.where.rpartition(" ")[2] for finding in desk.check().errors] == ["pirate", "support"]


def test_a_digest_that_is_not_the_bytes_is_refused(desk: Desk) -> None:
    desk.edit("              adapter_class: extract", f"              digest: {'ab' * 32}")
    _, problem, _ = desk.only_error()
    assert "`digest` is abababababab" in problem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  host: 127.0.0.1", "  root_path: ''", "0.0.0.0"),
        ("max_ongoing_requests: 300", "max_ongoing_requests: 5", "would keep requests from the engine"),
        ("default_plan: prepaid", "default_plan: payg", "until they subscribe"),
        ("          num_cpus: 0.5", "          memory: 1000000", "a whole core"),
        ("request_timeout_s: 600", "request_timeout_s: 570", "like a client that left"),
    ],
)
def test_what_works_but_surprises_is_a_warning(desk: Desk, old: str, new: str, problem: str) -> None:
    desk.edit(old, new)
    report = desk.check()
    assert report.is_right
    assert [problem in finding.problem for finding in report.findings] == [True]


def test_resolve_gives_absolute_paths_and_digests_that_ray_and_the_gateway_accept(desk: Desk) -> None:
    config = resolve(desk.file)
    ServeDeploySchema.model_validate(config)
    app = config["applications"][0]
    assert app["args"]["model"]["path"] == str(desk.models / "base")
    catalog = read_catalog(app["deployments"][0]["user_config"])
    assert catalog.rejected == ()
    for name in ADAPTERS:
        model = catalog.by_id()[name]
        assert model.path == str(desk.models / "adapters" / name)
        assert model.digest == digest_adapter(desk.models / "adapters" / name)


def test_resolve_leaves_everything_else_as_it_is_written(desk: Desk) -> None:
    written, config = yaml.safe_load(desk.text), resolve(desk.file)
    assert config["applications"][1] == written["applications"][1]
    assert config["applications"][0]["args"]["spool_dir"] == ".farebox/spool"
    for entry in config["applications"][0]["deployments"][0]["user_config"]["adapters"]:
        entry["path"] = f".farebox/models/adapters/{entry['id']}"
        del entry["digest"]
    config["applications"][0]["args"]["model"]["path"] = ".farebox/models/base"
    assert config == written


def test_printed_resolved_it_holds_all_and_nothing_relative(desk: Desk) -> None:
    done = CliRunner().invoke(app, ["check", "--resolved", str(desk.file)])
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.stdout)
    ServeDeploySchema.model_validate(printed)
    args = printed["applications"][0]["args"]
    assert args["spool_dir"] == str(desk.folder / ".farebox" / "spool")
    assert args["adapter_cache_dir"] == str(desk.folder / ".farebox" / "adapters")
    assert str(desk.folder) in done.stdout
    assert not [word for word in done.stdout.split() if word.startswith((".farebox", "./"))]
    expected = resolve(desk.file)
    expected["applications"][0]["args"] = args
    assert printed == expected
    assert read_catalog(printed["applications"][0]["deployments"][0]["user_config"]).rejected == ()


def test_what_is_wrong_is_not_printed_resolved(desk: Desk) -> None:
    desk.edit("proxy_location:", "proxy_locaton:")
    done = CliRunner().invoke(app, ["check", "--resolved", str(desk.file)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "proxy_locaton" in done.stderr


def test_resolve_refuses_what_check_refuses_and_carries_the_report(desk: Desk) -> None:
    desk.edit("proxy_location:", "proxy_locaton:")
    with pytest.raises(CheckFailed, match=r"line .*proxy_locaton") as refused:
        resolve(desk.file)
    assert not refused.value.report.is_right


def test_an_added_adapter_needs_three_lines(desk: Desk) -> None:
    make_adapter(desk.models / "adapters" / "haiku")
    lines = (
        "- id: haiku",
        "  path: .farebox/models/adapters/haiku",
        '  price: {output_per_1m: "2.00"}',
        "# ADD YOURS HERE",
    )
    desk.edit("# ADD YOURS HERE", ("\n" + 12 * " ").join(lines))
    report = desk.check()
    assert report.findings == ()
    assert report.models[-1].id == "haiku"


def test_the_table_shows_each_model_and_each_finding(desk: Desk) -> None:
    desk.edit('input_per_1m: "0.50"', "input_per_1m: 0.50")
    console = Console(width=200, record=True, file=(desk.folder / "out").open("w"))
    with console.file:  # type: ignore[attr-defined]
        console.print(desk.check().table())
    shown = console.export_text()
    assert digest_adapter(desk.models / "adapters" / "yaml")[:12] in shown
    assert "request $0.0005" in shown
    assert "error line" in shown
    assert "1 thing to put right" in shown


def test_the_report_is_json_for_programs(desk: Desk) -> None:
    content = json.loads(desk.check().to_json())
    assert content["is_right"] is True
    assert [model["is_right"] for model in content["models"]] == [True] * 4

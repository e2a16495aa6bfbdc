"""What `compose.yaml` starts is checked, as far as that goes without running a container."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "dashboard.json").read_text())


def found(program: str) -> str:
    """The program, or a skipped test: `.ci/run` installs both."""
    path = shutil.which(program, path=f"{ROOT / 'build' / 'tools' / 'usr' / 'bin'}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def run(*command: str, **variables: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for group in ALERTS["groups"] for rule in group["rules"])
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])


def test_compose_accepts_its_file() -> None:
    run(found("docker-compose"), "-f", "compose.yaml", "config", "--quiet", MODELS="/models", MODEL="m")


def test_prometheus_accepts_its_files() -> None:
    run(found("promtool"), "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yml"))
    run(found("promtool"), "check", "rules", str(DEPLOY / "alerts.yml"))


def test_every_file_that_a_container_is_given_is_there() -> None:
    volumes = [volume for service in COMPOSE["services"].values() for volume in service.get("volumes", ())]
    files = [volume.split(":")[0] for volume in volumes if volume.startswith("./")]
    assert len(files) == 5
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_services_name_only_secrets_and_services_that_there_are() -> None:
    for service in COMPOSE["services"].values():
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])


def test_only_loopback_reaches_a_container() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_alerts_and_panels_ask_for_metrics_that_there_are() -> None:
    from prometheus_client import REGISTRY

    import flexgate.server.http.metrics
    import flexgate.server.http.usage_metrics  # noqa: F401 - both register ours

    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None

    ours = {sample for metric in REGISTRY.collect() for sample in _samples(metric.name, metric.type)}
    source = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    theirs = {
        sample
        for name in re.findall(r'name="(vllm:\w+)"', source)
        for kind in ("gauge", "counter", "histogram")
        for sample in _samples(name, kind)
    }
    asked = {name for text in expressions() for name in re.findall(r"\b(?:flexgate_\w+|vllm:\w+)", text)}
    assert len(asked) >= 8
    assert asked <= ours | theirs


ALERTED = """
evaluation_interval: 1m
rule_files: [%s]
tests:
  - interval: 1m
    input_series:
      - {series: 'flexgate_ledger_failing{instance="a"}', values: '0 1x5'}
      - {series: 'flexgate_ledger_unwritten{instance="a"}', values: '0 3x5'}
      - {series: 'flexgate_ledger_clock_behind_seconds{instance="a"}', values: '0x3 40x10'}
      - {series: 'flexgate_ledger_uncopied{instance="a", copy="receipts"}', values: '10x60'}
      - {series: 'flexgate_ledger_uncopied{instance="a", copy="events"}', values: '600-10x60'}
      - {series: 'flexgate_ledger_uncopied{instance="a", copy="database"}', values: '0x60'}
    alert_rule_test:
      - {eval_time: 1m, alertname: FlexgateLedgerFailing}
      - {eval_time: 3m, alertname: FlexgateLedgerFailing, exp_alerts: [{exp_labels: {severity: critical, instance: a}}]}
      - {eval_time: 1m, alertname: FlexgateUsageNotOnDisk}
      - eval_time: 3m
        alertname: FlexgateUsageNotOnDisk
        exp_alerts: [{exp_labels: {severity: critical, instance: a}}]
      - {eval_time: 5m, alertname: FlexgateClockBehind}
      - {eval_time: 10m, alertname: FlexgateClockBehind, exp_alerts: [{exp_labels: {severity: warning, instance: a}}]}
      - {eval_time: 14m, alertname: FlexgateUsageNotCopied}
      - eval_time: 40m
        alertname: FlexgateUsageNotCopied
        exp_alerts: [{exp_labels: {severity: warning, instance: a, copy: receipts}}]
"""


def test_alerts_of_the_ledger_fire_when_it_falls_behind_and_not_before(tmp_path: Path) -> None:
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # promtool would compare the sentences
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yml").write_text(ALERTED % "rules.yml")
    run(found("promtool"), "test", "rules", str(tmp_path / "test.yml"))


def _samples(name: str, kind: str) -> set[str]:
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
    return {name.removesuffix("_total") + ending for ending in endings}


def test_every_panel_reads_the_shipped_data_source() -> None:
    (source,) = yaml.safe_load((DEPLOY / "datasource.yml").read_text())["datasources"]
    panels = DASHBOARD["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)

"""Metrics in the text format that Prometheus reads."""

from __future__ import annotations

import re

import pytest

from hkvprof.profile.domain import DomainCheck
from hkvprof.runtime.receipt import Receipt
from hkvprof.serve.metrics import Metrics
from hkvprof.serve.request import Ended


def receipt(domain: DomainCheck | None = None) -> Receipt:
    return Receipt(
        resident_bytes=10, budget_bytes=20, query_bytes=0, host_bytes=30, dense_bytes=100,
        peak_bytes=50, shared_bytes=0, same_memory=True, kernels="torch", layers=(), domain=domain,
    )  # fmt: skip


def values(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_every_metric_has_help_and_a_type_before_it() -> None:
    lines = Metrics().text().splitlines()
    told: set[str] = set()
    for line in lines:
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            assert f"# HELP {name} " in "\n".join(lines)
            told.add(name)
        elif not line.startswith("#"):
            name = re.match(r"[a-z_]+", line)[0]
            assert name in told
    assert Metrics().text().endswith("\n")


def test_requests_are_summed() -> None:
    metrics = Metrics()
    usual, odd = DomainCheck(), DomainCheck(out_of_domain=True)
    for domain in (None, usual, odd):
        metrics.account("answered", Ended("stop", 5, 2, receipt(domain)))
    metrics.account("cancelled", Ended("length", 5, 1, None))
    metrics.count("refused")
    found = values(metrics)
    assert found['hkvprof_requests_total{outcome="answered"}'] == 3
    assert found['hkvprof_requests_total{outcome="cancelled"}'] == 1
    assert found['hkvprof_requests_total{outcome="refused"}'] == 1
    assert found["hkvprof_resident_bytes_total"] == 30
    assert found["hkvprof_dense_bytes_total"] == 300
    assert found["hkvprof_latest_host_bytes"] == 30
    assert found["hkvprof_prompt_tokens_total"] == 20
    assert found["hkvprof_new_tokens_total"] == 7
    assert found["hkvprof_monitored_total"] == 2
    assert found["hkvprof_out_of_domain_total"] == 1
    assert found["hkvprof_hit_rate"] != pytest.approx(0)  # NaN: nothing was asked for

"""The doctor's round: every check, whatever the others found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.doctor import machine, servers, stores
from pipeline.doctor.finding import Finding, guarded, redact

__all__ = ["Examination", "examine"]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All findings, in the order in which a person would mend them."""

    findings: Sequence[Finding]

    @property
    def exit_code(self) -> int:
        """1 if a job would fail, else 0."""
        return int(any(finding.state == "fail" for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        found = [{name: redact(text) for name, text in finding.to_json().items()} for finding in self.findings]
        return {"findings": found, "exit_code": self.exit_code}

    def text(self) -> str:
        """One line a finding, for a person."""
        return "\n".join(redact(finding.line()) for finding in self.findings)


def examine() -> Examination:
    """Checks the machine, the servers and the cluster that the environment names."""
    mlflow = "start the server, or compare MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD with it"
    stored = "compare DDPM_HOME, AWS_ENDPOINT_URL and the keys with the store; jobs write, list and delete"
    rounds = (
        ("versions", "make install", machine.packages),
        ("memory", "", machine.shared_memory),
        ("disk", "", machine.disks),
        ("torch", "install torch again", machine.torch_devices),
        ("storage", stored, stores.storage_serves),
        ("mlflow", mlflow, servers.mlflow_answers),
        ("jobs", "is the dashboard forwarded to this machine?", servers.ray_dashboard),
        ("ray", "see docs/troubleshooting.md, Ray and the cluster", servers.ray_answers),
    )
    return Examination(findings=[finding for name, mend, look in rounds for finding in guarded(name, mend, look)])

"""Least privilege, proved by the whole run: these tests come last (see conftest), and judge what all others made the
operator ask for.
"""

from pathlib import Path

import pytest

from tests.cluster import kit
from tests.cluster.rights import RightsWatch, granted
from tests.cluster.workbench import Workbench

FOLDER = Path(__file__).parent


def what_is_left_out(session: pytest.Session) -> str:
    """Why this run may not have used every right."""
    if session.config.option.keyword or any("::" in argument for argument in session.config.args):
        return "only some of the tests ran"
    absent = sorted({path.name for path in FOLDER.glob("test_*.py")} - {item.path.name for item in session.items})
    if absent:
        return f"{', '.join(absent)} did not run"
    return f"{session.testsfailed} tests failed" if session.testsfailed else ""


def test_the_operator_asked_for_nothing_that_it_may_not(operator: str, rights: RightsWatch) -> None:
    rights.look()
    assert rights.used, "the operator's metrics were read"
    assert rights.missing == set(), "the chart's roles lack these"


def test_the_operator_may_nothing_that_it_does_not_need(
    operator: str, rights: RightsWatch, request: pytest.FixtureRequest
) -> None:
    if reason := what_is_left_out(request.session):
        pytest.skip(f"needs a whole run of the cluster tests: {reason}")
    unused = granted() - rights.used
    assert unused == set(), "take them out of the chart's roles, or add a test that needs them"


def test_no_pod_was_below_the_level_restricted(workbench: Workbench) -> None:
    """Which is enforced (`test_isolation` tries): the Job controller would have been refused, and told it."""
    labels = (kit.get("namespace", workbench.namespace, "default") or {})["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    said = [event.get("message") or "" for event in kit.events(workbench.namespace)]
    assert [message for message in said if "PodSecurity" in message] == []

"""The cluster tests install an operator: they keep their hands off a cluster that has somebody else's."""

from typing import Any

import pytest

from tests.cluster.install import TESTS_LABEL, foreign_object
from tests.cluster.kit import SYSTEM_NAMESPACE

CRD = "finetunejobs.finetune-operator.io"


def thing(name: str, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, **metadata}}


OURS = thing(SYSTEM_NAMESPACE, labels={TESTS_LABEL: "true", "pod-security.kubernetes.io/enforce": "restricted"})
HELM = thing(
    CRD,
    labels={"app.kubernetes.io/managed-by": "Helm"},
    annotations={"meta.helm.sh/release-namespace": "production"},
)


@pytest.mark.parametrize("crd", [None, thing(CRD), HELM])
def test_an_empty_cluster_and_what_earlier_tests_left_are_accepted(crd):
    assert foreign_object(None, None) is None
    assert foreign_object(OURS, crd) is None


@pytest.mark.parametrize(
    ("namespace", "crd", "found"),
    [
        (thing(SYSTEM_NAMESPACE), HELM, f"a namespace {SYSTEM_NAMESPACE} "),
        (thing(SYSTEM_NAMESPACE, labels={"team": "ml"}), None, f"a namespace {SYSTEM_NAMESPACE} "),
        (thing(SYSTEM_NAMESPACE, labels={TESTS_LABEL: "false"}), None, f"a namespace {SYSTEM_NAMESPACE} "),
        (None, HELM, f"a CRD {CRD}, installed from namespace production, "),
        (None, thing(CRD), f"a CRD {CRD} "),
    ],
)
def test_what_somebody_else_installed_is_named(namespace, crd, found):
    reason = foreign_object(namespace, crd)
    assert reason is not None
    assert found in reason
    assert "test cluster" in reason

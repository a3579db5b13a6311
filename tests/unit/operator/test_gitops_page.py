"""docs/gitops.md: what Flux makes of a job by the expressions that it shows."""

from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml

from tests.statuses import MOMENTS, Moment

PAGE = (Path(__file__).parents[3] / "docs" / "gitops.md").read_text()


def flux(job: dict[str, Any], expressions: dict[str, str]) -> str:
    """Flux's own order: https://github.com/fluxcd/flux2/tree/main/rfcs/0009-custom-health-checks"""
    if job["status"].get("observedGeneration") != job["metadata"]["generation"]:
        return "InProgress"
    environment = celpy.Environment()
    activation = {name: celpy.json_to_cel(value) for name, value in job.items()}
    for answer in ("inProgress", "failed", "current"):
        if answer in expressions:
            program = environment.program(environment.compile(expressions[answer]))
            if program.evaluate(activation):
                return answer[0].upper() + answer[1:]
    return "InProgress"


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_flux_waits_for_the_end_of_a_job(moment: Moment) -> None:
    (block,) = (text for text in PAGE.split("\n\n") if "healthCheckExprs:" in text)
    (check,) = yaml.safe_load(block)["healthCheckExprs"]
    job = {"metadata": {"generation": moment.generation}, "status": moment.status.to_dict()}
    assert flux(job, check) == moment.flux

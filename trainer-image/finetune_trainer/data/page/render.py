"""The page as a whole."""

from finetune_api.report import DataReport
from markupsafe import Markup

from finetune_trainer.data.page.elements import fill, join
from finetune_trainer.data.page.sections import SECTIONS, heading
from finetune_trainer.data.page.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Data report: {title}</title>
<style>{style}</style>
</head>
<body>
{heading}
<main>
{body}
</main>
<footer><p>Written by finetune-operator. The same for programs: data.json.</p></footer>
</body>
</html>
"""


def render_html(report: DataReport, job: str) -> str:
    """The report as one HTML page for people. `job`: the job's name, its title."""
    shown = [part for make in SECTIONS if (part := make(report)) is not None]
    head = heading(report, job)
    return str(fill(PAGE, title=job, policy=POLICY, style=Markup(STYLE), heading=head, body=join(shown)))

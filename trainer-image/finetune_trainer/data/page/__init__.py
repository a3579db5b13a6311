"""report/data.html: the data report as a page for people. Pure: the same report gives the same bytes.

The page is one file that loads nothing and runs nothing, which its own content security policy says too.
`sections` has a function per section, `elements` what they are made of. Whatever comes from the data goes through
markupsafe, which escapes it.
"""

from finetune_trainer.data.page.render import render_html

__all__ = ["render_html"]

"""The text templates (jinja2): HTML pages and the model card."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, /, **values: object) -> str:
    """Fills a template; values are escaped in HTML.

    Args:
        template: file in this folder, such as `report.html.j2`.
        **values: what the template uses; a missing one is an error.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("neuclip"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

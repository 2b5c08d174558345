"""`neuclip export`: trained towers as files that open_clip and transformers load.

Modules, lowest first: `transformers_clip` (the same towers in transformers' terms), `card` (the
model card); `files` (what is written for each form). No network, and no transformers.
"""

from neuclip.export.repository import Export, Form, export_model

__all__ = ["Export", "Form", "export_model"]

"""`neuclip export`: writes trained towers as files for open_clip, transformers and ONNX Runtime.

In reading order:

- `repository`: writes the files of each format.
- `card`: writes the model card.
- `transformers_clip`: the files of transformers' `CLIPModel` beside its weights.
- `onnx_towers`: a graph of each tower, compared with torch.

Uses neither the network nor the package transformers.
"""

from neuclip.export.repository import Export, Form, check_form, check_out, export_model

__all__ = ["Export", "Form", "check_form", "check_out", "export_model"]

"""`neuclip export` writes towers for open_clip, transformers and ONNX Runtime; `push` uploads them.

In reading order:

- `repository`: writes the files of each format.
- `card`: writes the model card.
- `transformers_clip`: the files of transformers' `CLIPModel` beside its weights.
- `onnx_towers`: a graph of each tower, compared with torch.
- `exported_files`: what an export wrote, as its card lists it.
- `push`: uploads it to the Hugging Face hub.

Only `push` uses the network; nothing uses the package transformers.
"""

from neuclip.export.repository import Export, Form, check_form, check_out, export_model

__all__ = ["Export", "Form", "check_form", "check_out", "export_model"]

"""Writes each tower as an ONNX file, and compares it with torch in ONNX Runtime.

The graphs end with the L2 norm, so a dot product of two outputs is a cosine. The names of files,
inputs and outputs are those of transformers.js and Optimum. Needs the packages of `neuclip[onnx]`,
imported on first use.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from neuclip.errors import UserError, printable
from neuclip.model.architecture import REPOSITORY_CONFIG
from neuclip.model.clip import Clip
from neuclip.model.export_info import preprocessing

OPSET = 18
"""Version of ONNX's operators; ONNX Runtime reads it since 1.14, in browsers too."""
TOLERANCE = 1e-4
"""Largest accepted difference of a component of a unit-norm embedding from torch's."""
IMAGE_FILE, TEXT_FILE = "vision_model.onnx", "text_model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED, _COMPARED = 2, (1, 5)  # pairs in a batch; one of another size proves that it is dynamic
_CAPTIONS = ("a cat", "two dogs, it's 42", "", "Ünïcode " * 99, "a photo of a bird")


@dataclass(frozen=True)
class _Graph:
    """A tower to write.

    Attributes:
        file: name of the file.
        tower: of it, for messages.
        encode: inputs to embeddings.
        inputs: name of the inputs.
        outputs: name of the embeddings.
        example: inputs of a batch of a given size.
    """

    file: str
    tower: str
    encode: Callable[[Tensor], Tensor]
    inputs: str
    outputs: str
    example: Callable[[int], Tensor]


class _Normalized(nn.Module):
    """A tower that returns unit-norm float32 embeddings."""

    def __init__(self, towers: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.towers = towers
        self._encode = encode

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings [batch, dim]."""
        return nn.functional.normalize(self._encode(inputs).float(), dim=-1)


def check_packages() -> None:
    """Checks that the packages are installed.

    Raises:
        UserError: names those that are missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: install them with "
            "pip install 'neuclip[onnx]'"
        )


def write_towers(clip: Clip, folder: Path) -> list[Path]:
    """Writes both towers and compares them with torch.

    Args:
        clip: the model, on the CPU in float32.
        folder: where the files are written; above 2 GB, weights are in files beside them.

    Returns:
        The two graphs.

    Raises:
        UserError: a package or an operator is missing, or an embedding differs by more than
            `TOLERANCE`.
    """
    check_packages()
    was_training = clip.towers.training
    clip.towers.eval()
    try:
        return [_write(clip.towers, graph, folder) for graph in _graphs(clip)]
    finally:
        clip.towers.train(was_training)


def _graphs(clip: Clip) -> list[_Graph]:
    size = preprocessing(clip)["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)

    def images(count: int) -> Tensor:
        random = torch.Generator().manual_seed(count)
        return torch.randn(count, 3, height, width, generator=random)

    def texts(count: int) -> Tensor:
        return clip.tokenize(list(_CAPTIONS[:count]))

    encode_image, encode_text = (
        cast(Callable[[Tensor], Tensor], each)
        for each in (clip.towers.encode_image, clip.towers.encode_text)
    )
    return [
        _Graph(IMAGE_FILE, "image", encode_image, "pixel_values", "image_embeds", images),
        _Graph(TEXT_FILE, "text", encode_text, "input_ids", "text_embeds", texts),
    ]


def _write(towers: nn.Module, graph: _Graph, folder: Path) -> Path:
    """Writes one tower and compares it."""
    path, module = folder / graph.file, _Normalized(towers, graph.encode).eval()
    with torch.no_grad(), _quiet(), _plain_attention():
        try:
            program = torch.onnx.export(
                module,
                (graph.example(_TRACED),),
                input_names=[graph.inputs],
                output_names=[graph.outputs],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"--format onnx: the {graph.tower} tower does not export ({_cause(error)}); "
                "nothing was written. --format hf and --format open_clip write any tower"
            ) from error
        assert program is not None, "the exporter of torch.export returns a program"
        program.save(str(path))
        for count in _COMPARED:
            _compare(module, graph, path, count)
    return path


def _compare(module: nn.Module, graph: _Graph, path: Path, count: int) -> None:
    """Compares a file with torch on a batch.

    Raises:
        UserError: ONNX Runtime cannot run it, or an embedding differs.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    inputs = graph.example(count)
    expected = module(inputs).numpy()
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run([graph.outputs], {graph.inputs: inputs.numpy()})[0]
    except Exception as error:  # its classes are not public
        raise UserError(
            f"--format onnx: ONNX Runtime cannot run the {graph.tower} tower ({_cause(error)}); "
            "nothing was written"
        ) from error
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format onnx: embeddings of the {graph.tower} tower differ by {difference:.2g} from "
            f"torch's, more than {TOLERANCE:g}; nothing was written"
        )


def _cause(error: BaseException) -> str:
    """The innermost cause of an error, in a line: the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return printable(lines[0].strip(), 200) if lines else type(error).__name__


@contextmanager
def _plain_attention() -> Generator[None]:
    """Attention by its formula: the fused kernel of `nn.MultiheadAttention` has no operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporter's advice to its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def usage(folder: str, *, transformers: bool) -> str:
    """Code that runs both towers.

    Args:
        folder: name of the export.
        transformers: whether transformers reads its preprocessing and its tokenizer.
    """
    if transformers:
        first = [
            "from transformers import CLIPProcessor",
            "",
            f'processor = CLIPProcessor.from_pretrained("{folder}")',
            'images = processor(images=[Image.open("photo.jpg")], return_tensors="np")',
            'texts = processor(text=["a photo of a cat"], padding="max_length", truncation=True, '
            'return_tensors="np")',
            'pixel_values, input_ids = images["pixel_values"], texts["input_ids"]',
        ]
    else:
        first = [
            "import open_clip",
            "",
            "import json",
            "from open_clip.transform import PreprocessCfg, image_transform_v2",
            "",
            f'config = json.load(open("{folder}/{REPOSITORY_CONFIG}"))["preprocess_cfg"]',
            "preprocess = image_transform_v2(PreprocessCfg(**config), is_train=False)",
            f'tokenize = open_clip.get_tokenizer("local-dir:{folder}")',
            'pixel_values = preprocess(Image.open("photo.jpg")).unsqueeze(0).numpy()',
            'input_ids = tokenize(["a photo of a cat"]).numpy()',
        ]
    return "\n".join(
        [
            "import onnxruntime",
            "from PIL import Image",
            *first,
            f'vision = onnxruntime.InferenceSession("{folder}/{IMAGE_FILE}")',
            f'text = onnxruntime.InferenceSession("{folder}/{TEXT_FILE}")',
            'image_embeds = vision.run(None, {"pixel_values": pixel_values})[0]',
            'text_embeds = text.run(None, {"input_ids": input_ids})[0]',
            "cosines = image_embeds @ text_embeds.T  # both have unit norm",
        ]
    )


def facts() -> str:
    """What the card says of the files."""
    return (
        f"ONNX opset {OPSET}; `pixel_values` [batch, 3, height, width] in float32 give "
        "`image_embeds` [batch, dim], `input_ids` [batch, length] in int64 give `text_embeds`; the "
        "batch is dynamic; the L2 norm is inside, so embeddings have unit norm; both files agree "
        f"with torch within {TOLERANCE:g} in ONNX Runtime"
    )

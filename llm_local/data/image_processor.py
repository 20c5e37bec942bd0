"""What a model takes of an image: transformers' image processor, and cuts and mirror images for training.

The processor is by Pillow, as transformers has it beside that of torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, PretrainedConfig, ViTImageProcessorPil

from llm_local.adapters.hf_internals import file_of
from llm_local.config import Config, ConfigError
from llm_local.data.mixture import DIGITS
from llm_local.flags import DataArguments
from llm_local.model.remote_code import UNTRUSTED, is_untrusted

FILES = ("preprocessor_config.json", "processor_config.json")
CROP_SCALE, RATIOS = 0.08, (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop, which run_image_classification.py takes
_TRIES = 10  # as many as that has
_PROBES = ((64, 48), (48, 64))


def load_processor(config: Config, model_config: PretrainedConfig) -> BaseImageProcessor:
    """That of image_processor_name, else the model's own, else, of a new model, one by its image size and channels.

    Raises ConfigError where it cannot be loaded, or does not make tensors of one shape.
    """
    model = config.model
    named = "image_processor_name" if model.image_processor_name else "model_name_or_path"
    if not model.image_processor_name and model.config_name:
        named = "config_name"
    source = getattr(model, named)
    folder = source if source is None or named != "config_name" or Path(source).is_dir() else None
    if folder is None or not any(file_of(folder, name) for name in FILES):
        if source is not None and named != "config_name":
            raise ConfigError([f"{named}={source} has no {FILES[0]}; set image_processor_name to a folder that has it"])
        return new_processor(model_config)
    processor = _read(folder, f"{named}={source}", model.trust_remote_code)
    pixel_shape(processor, f"{named}={source}")
    return processor


def _read(folder: str, named: str, trusted: bool) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trusted)
    except Exception as error:  # of whatever library reads a file
        if is_untrusted(error):
            raise ConfigError([f"the image processor of {named} {UNTRUSTED}"]) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        repair = "set image_processor_name to a folder that AutoImageProcessor loads"
        raise ConfigError([f"the image processor of {named} cannot be loaded ({reason}); {repair}"]) from error


def new_processor(model_config: PretrainedConfig) -> BaseImageProcessor:
    """One that resizes to the model's image size, without a cut, and brings values to [-1, 1]."""
    vision = getattr(model_config, "vision_config", model_config)
    size, channels = getattr(vision, "image_size", None) or 224, getattr(vision, "num_channels", None) or 3
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def pixel_shape(processor: BaseImageProcessor, named: str = "the image processor") -> tuple[int, int, int]:
    """(channels, height, width) of what it makes of any image. Raises ConfigError where images differ in that."""
    for channels in (3, 1):
        mode = "RGB" if channels == 3 else "L"
        try:
            shapes = {_shape(_pixels(processor, [Image.new(mode, size)])) for size in _PROBES}
        except (ValueError, TypeError):  # means of another number of channels
            continue
        if len(shapes) > 1:
            found = " and ".join("x".join(map(str, shape[1:])) for shape in sorted(shapes))
            repair = "give size a height and a width, or set do_center_crop, in preprocessor_config.json"
            raise ConfigError([f"{named}: its image processor makes images of several sizes ({found}); {repair}"])
        return shapes.pop()
    raise ConfigError([f"{named}: its image processor takes neither colour nor grey images; use one with 3 or 1 means"])


def _shape(pixels: torch.Tensor) -> tuple[int, int, int]:
    _, channels, height, width = pixels.shape
    return channels, height, width


def _pixels(processor: Any, images: Sequence[Image.Image], **options: Any) -> torch.Tensor:
    """(B, C, H, W) float32."""
    return torch.as_tensor(processor(images=list(images), return_tensors="pt", **options)["pixel_values"]).float()


class Pixels:
    """Images as tensors. crop_scale, flips: as the flags have them for this run."""

    def __init__(self, processor: BaseImageProcessor, crop_scale: float, flips: bool):
        self._processor = processor
        self.shape = pixel_shape(processor)
        self._crop_scale = crop_scale
        self._flips = flips

    @staticmethod
    def of(processor: BaseImageProcessor, data: DataArguments) -> Pixels:
        """With what the flags say, or what suits the data."""
        digits = data.dataset_name == DIGITS
        scale, flips = data.random_crop_scale, data.horizontal_flip
        scale = (1.0 if digits else CROP_SCALE) if scale is None else scale
        return Pixels(processor, scale, (not digits) if flips is None else flips)

    def as_they_are(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(B, C, H, W), as an evaluation and those who use the model see them."""
        return _pixels(self._processor, images)

    def altered(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> torch.Tensor:
        """(B, C, H, W), cut out and mirrored, for each image by its seed."""
        changed = [self._alter(image, np.random.default_rng(s)) for image, s in zip(images, seeds, strict=True)]
        if self._crop_scale == 1:
            return self.as_they_are(changed)
        return _pixels(self._processor, changed, do_resize=False, do_center_crop=False)

    def _alter(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        if self._crop_scale < 1:
            _, height, width = self.shape
            box = crop_box(image.width, image.height, self._crop_scale, random)
            resample = getattr(self._processor, "resample", None)
            how = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
            image = image.resize((width, height), how, box=box)
        if self._flips and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def crop_box(width: int, height: int, scale: float, random: np.random.Generator) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a part of that share of the area at least, drawn as RandomResizedCrop does it but
    for whole pixels."""
    low, high = map(math.log, RATIOS)
    for _ in range(_TRIES):
        area, ratio = width * height * random.uniform(scale, 1), math.exp(random.uniform(low, high))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and tall <= height:
            left, top = random.uniform(0, width - wide), random.uniform(0, height - tall)
            return left, top, left + wide, top + tall
    wide, tall = min(width, height * RATIOS[1]), min(height, width / RATIOS[0])
    left, top = (width - wide) / 2, (height - tall) / 2
    return left, top, left + wide, top + tall

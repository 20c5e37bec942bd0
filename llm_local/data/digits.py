"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 in ten classes, that come with the package.

The test part of UCI's "Optical Recognition of Handwritten Digits"; a data set that is real and on every machine.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from llm_local.config import ConfigError

INSTALL = "dataset_name=digits needs scikit-learn; pip install 'llm_local[digits]'"


def digits() -> Dataset:
    """Columns image and label. Raises ConfigError without scikit-learn."""
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise ConfigError([INSTALL]) from error
    return _digits()


@cache
def _digits() -> Dataset:
    """A start asks for them several times."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    grey = np.minimum(np.asarray(values).reshape(-1, 8, 8) * 16, 255).astype(np.uint8)  # of 0 to 16
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    rows = {"image": [{"bytes": _png(each), "path": None} for each in grey], "label": np.asarray(labels).tolist()}
    return Dataset.from_dict(rows, features=features)


def _png(values: np.ndarray) -> bytes:
    written = BytesIO()
    Image.fromarray(values).save(written, "PNG")
    return written.getvalue()

"""What the tuned model is compared with: the majority class, or the untuned model."""

from collections.abc import Sequence

import numpy as np
from finetune_api.report import Evaluation

from finetune_trainer.evaluate.metrics import Integers, classification

MAJORITY = "majority class"
UNTUNED = "untuned model"
START = "start adapter"


def majority_class(train: Integers, true: Integers, labels: Sequence[str]) -> Evaluation:
    """Predicts the most frequent class of the training rows for every row (the first of equals).

    `train` and `true` are class ids [rows]. Its loss is the cross-entropy of the training rows' class
    frequencies; a class that they do not have counts as one row, for its loss would be infinite.
    """
    counts = np.bincount(train, minlength=len(labels))
    floored = np.maximum(counts, 1)
    loss = -np.log(floored / floored.sum())[true].mean()
    return classification(MAJORITY, true, np.full_like(true, counts.argmax()), float(loss), labels)

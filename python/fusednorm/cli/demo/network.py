"""Networks small enough to read: dense layers, activations, batch normalization, and the loop that trains them.

NumPy's functions on CuPy's arrays are CuPy's, so the same lines compute on a GPU: only what makes arrays asks where.

Every layer is called with x of shape (N, inputs), and its backward with dL/d(its output); that leaves the gradients of
its parameters in ``weight_grad`` and ``bias_grad``, the names that :class:`fusednorm.BatchNorm` uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

import fusednorm
from fusednorm import arrays
from fusednorm.cli.demo.optimizers import SGD

Array: TypeAlias = np.ndarray[Any, Any]

PIXELS, CLASSES = 64, 10
WIDTH = 100
BATCH = 64


class Layer(Protocol):
    @property
    def weight(self) -> Array | None: ...
    @property
    def bias(self) -> Array | None: ...

    weight_grad: Array | None
    bias_grad: Array | None

    def __call__(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Array: ...


class Dense:
    """z = x·weight + bias."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, device: str, *, bias: bool = True) -> None:
        # Glorot & Bengio (2010): signals and gradients keep their variance through a layer.
        limit = np.sqrt(6 / (inputs + outputs))
        self.weight = arrays.moved(rng.uniform(-limit, limit, (inputs, outputs)).astype(np.float32), device)
        self.bias = arrays.moved(np.zeros(outputs, np.float32), device) if bias else None
        self.weight_grad: Array | None = None
        self.bias_grad: Array | None = None

    def __call__(self, x: Array, /) -> Array:
        self.x = x
        z: Array = x @ self.weight
        return z if self.bias is None else z + self.bias

    def backward(self, dy: Array, /) -> Array:
        self.weight_grad = self.x.T @ dy
        if self.bias is not None:
            self.bias_grad = dy.sum(axis=0)
        dx: Array = dy @ self.weight.T
        return dx


class Sigmoid:
    weight = bias = None
    weight_grad: Array | None = None
    bias_grad: Array | None = None

    def __call__(self, x: Array, /) -> Array:
        self.y: Array = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dy: Array, /) -> Array:
        # y·(1 − y) is at most 1/4: six such layers shrink a gradient 4,096-fold at least. That is what keeps the
        # network without normalization from learning.
        dx: Array = dy * self.y * (1 - self.y)
        return dx


class ReLU:
    weight = bias = None
    weight_grad: Array | None = None
    bias_grad: Array | None = None

    def __call__(self, x: Array, /) -> Array:
        self.y: Array = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array, /) -> Array:
        dx: Array = dy * (self.y > 0)
        return dx


class Network:
    """Layers in a row. Their last output is z, of shape (N, 10); softmax makes probabilities of it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dz: Array) -> None:
        for layer in reversed(self.layers):
            dz = layer.backward(dz)

    def parameters(self) -> list[Array]:
        return [p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None]

    def gradients(self) -> list[Array]:
        return [g for layer in self.layers for g in (layer.weight_grad, layer.bias_grad) if g is not None]

    def train(self, mode: bool) -> None:
        """Whether batch normalization uses the batch's statistics or the running ones."""
        for layer in self.layers:
            if isinstance(layer, fusednorm.BatchNorm):
                layer.train(mode)


def hidden(inputs: int, activation: str, normalized: bool, rng: np.random.Generator, device: str) -> list[Layer]:
    """One hidden layer. Normalization takes the mean out again, so the dense layer before it needs no bias."""
    if normalized:
        dense = Dense(inputs, WIDTH, rng, device, bias=False)
        return [dense, fusednorm.BatchNorm(WIDTH, activation=activation, device=device)]
    return [Dense(inputs, WIDTH, rng, device), Sigmoid() if activation == "sigmoid" else ReLU()]


def network(depth: int, activation: str, normalized: bool, seed: int, device: str = "cpu") -> Network:
    """`depth` hidden layers and one that gives the ten scores. The same seed gives both kinds the same weights."""
    rng = np.random.default_rng(seed)
    sizes = (PIXELS, *[WIDTH] * (depth - 1))
    layers = [layer for inputs in sizes for layer in hidden(inputs, activation, normalized, rng, device)]
    return Network([*layers, Dense(WIDTH, CLASSES, rng, device)])


def softmax(z: Array) -> Array:
    """Probabilities, (N, 10). The largest z is taken off first, so that exp cannot overflow."""
    e = np.exp(z - z.max(axis=1, keepdims=True))
    probabilities: Array = e / e.sum(axis=1, keepdims=True)
    return probabilities


def log_likelihood(z: Array, labels: Array) -> tuple[float, Array]:
    """The loss −mean(log ŷ[label]) and its gradient dz = (ŷ − y)/N, where y is 1 at the label and 0 elsewhere."""
    dz = softmax(z)
    each = arrays.namespace(z).arange(len(labels))
    loss = -float(np.log(dz[each, labels] + 1e-12).mean())
    dz[each, labels] -= 1
    return loss, dz / len(labels)


def predict(network: Network, images: Array) -> Array:
    """The likeliest digit for each image, by the running statistics."""
    network.train(False)
    digits: Array = network(images).argmax(axis=1)
    network.train(True)
    return digits


class Digits(NamedTuple):
    """Images are (N, 64) float32 from 0 to 1, labels (N,)."""

    images: Array
    labels: Array
    held_out_images: Array
    held_out_labels: Array

    def to(self, device: str) -> Digits:
        return Digits(*(arrays.moved(array, device) for array in self))


class Epoch(NamedTuple):
    loss: float  # mean over the batches seen in training
    accuracy: float  # on the held-out digits, 0 to 1


def train(network: Network, optimizer: SGD, digits: Digits, epochs: int, seed: int) -> Iterator[Epoch]:
    """Train for `epochs` passes over the digits; yields how it stands after each."""
    rng = np.random.default_rng(seed)
    # Whole batches only. The rest would be 1347 mod 64 = 3 digits: their mean and variance say little about digits, but
    # would move the running statistics as far as those of 64 do, at the end of each epoch, just before they are used.
    whole = len(digits.images) // BATCH * BATCH
    for _ in range(epochs):
        losses = []
        batches = rng.permutation(len(digits.images))[:whole].reshape(-1, BATCH)
        for batch in arrays.moved(batches, arrays.device(digits.images)):
            loss, dz = log_likelihood(network(digits.images[batch]), digits.labels[batch])
            network.backward(dz)
            optimizer.step(network.gradients())
            losses.append(loss)
        right = predict(network, digits.held_out_images) == digits.held_out_labels
        yield Epoch(float(np.mean(losses)), float(right.mean()))

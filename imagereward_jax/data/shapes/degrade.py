"""Ways to spoil an image of the shapes world, each with a severity in (0, 1].

A reward model that has seen only clean drawings is easily fooled: textures and washes of colour that no person
would like raise its score. Ranked groups therefore hold images spoilt in the ways that generators go wrong.
Every function takes (image, severity, rng, caption) and returns an image that may leave [0, 1].
"""

import numpy as np
from scipy import ndimage

from imagereward_jax.data.shapes.drawing import RADIUS, RGB, SHAPES, SIZES, Caption, all_captions, coverage, draw_float


def degrade(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Spoils the image in one or two random ways: float32 [S, S, 3] in [0, 1].

    Args:
        image: float32 [S, S, 3] in [0, 1].
        severity: in (0, 1]; 0.1 is just visible, at 1 the caption can hardly be made out.
        caption: what the image was asked to show; some ways abuse its words (more of its colour, of its shape).
    """
    for kind in rng.choice(list(DEGRADATIONS), size=1 + (rng.random() < 0.3), replace=False):
        image = DEGRADATIONS[kind](image, severity, rng, caption)
    return np.clip(image, 0, 1).astype(np.float32)


def _side(image):
    return image.shape[0]


def _random_colour(rng, caption):
    """The caption's colour half of the time, else any saturated one."""
    if rng.random() < 0.5:
        return np.array(RGB[caption.colour], np.float32)
    colour = rng.random(3)
    return ((colour - colour.min()) / (np.ptp(colour) + 1e-6)).astype(np.float32)


def blur(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Gaussian blur."""
    sigma = (0.01 + 0.1 * severity) * _side(image)
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def noise(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Gaussian noise on every pixel."""
    return image + (0.03 + 0.4 * severity) * rng.standard_normal(image.shape, np.float32)


def checkerboard(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """A fine checkerboard of a random tint, as transposed convolutions leave."""
    period = int(rng.choice([1, 2, 4, 8]))
    rows, columns = np.indices(image.shape[:2]) // period
    pattern = ((rows + columns) % 2 * 2 - 1)[..., None] * rng.uniform(-1, 1, 3)
    return image + (0.08 + 0.5 * severity) * pattern


def stripes(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Coloured waves of a random direction and frequency."""
    rows, columns = np.indices(image.shape[:2]) / _side(image)
    angle, cycles = rng.uniform(0, np.pi), rng.uniform(4, 28)
    phase = 2 * np.pi * cycles * (rows * np.sin(angle) + columns * np.cos(angle))
    waves = np.sin(phase[..., None] + rng.uniform(0, 2 * np.pi, 3))
    return image + (0.06 + 0.4 * severity) * waves


def cast(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """A wash of one colour over everything, the background too."""
    weight = 0.08 + 0.72 * severity
    return image * (1 - weight) + weight * _random_colour(rng, caption)


def patches(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Rectangles of saturated colour."""
    image, side = image.copy(), _side(image)
    for _ in range(1 + round(7 * severity)):
        height, width = rng.integers(side // 16, max(side // 16 + 1, round(side * (0.1 + 0.3 * severity))), 2)
        top, left = rng.integers(0, side - height), rng.integers(0, side - width)
        image[top : top + height, left : left + width] = _random_colour(rng, caption)
    return image


def doubled(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """More shapes than were asked for: often more of the same."""
    side = _side(image)
    for _ in range(1 + round(4 * severity)):
        shape = caption.shape if rng.random() < 0.5 else rng.choice(SHAPES)
        radius = RADIUS[SIZES[rng.integers(2)]] * side * (0.5 + 0.5 * severity)
        alpha = coverage(shape, rng.uniform(0.1, 0.9, 2) * side, radius, side)[..., None]
        image = image + alpha * (_random_colour(rng, caption) - image)
    return image


def faded(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Little contrast left, towards a random grey."""
    keep = 0.9 - 0.85 * severity
    return keep * image + (1 - keep) * rng.uniform(0.2, 0.95)


def dark(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Too little light."""
    return image * (0.9 - 0.8 * severity)


def speckle(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Plus or minus a constant in blocks of pixels: what adversarial perturbations look like."""
    block, side = int(rng.choice([1, 2, 4])), _side(image)
    blocks = -(-side // block)
    signs = rng.integers(0, 2, (blocks, blocks, 3)).astype(np.float32) * 2 - 1
    return image + (0.04 + 0.35 * severity) * np.kron(signs, np.ones((block, block, 1), np.float32))[:side, :side]


def mottle(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Smooth blotches of colour: latents that left the decoder's manifold."""
    side, cells = _side(image), int(rng.choice([4, 8, 16]))
    blotches = ndimage.zoom(
        rng.standard_normal((cells, cells, 3), np.float32), (side / cells, side / cells, 1), order=1
    )
    return image + (0.05 + 0.4 * severity) * blotches[:side, :side]


def mixture(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """Two images at once."""
    captions = all_captions()
    other = draw_float(captions[rng.integers(len(captions))], rng, _side(image))
    weight = 0.1 + 0.45 * severity
    return (1 - weight) * image + weight * other


def warp(image: np.ndarray, severity: float, rng: np.random.Generator, caption: Caption) -> np.ndarray:
    """The outline bent by a smooth random displacement."""
    side = _side(image)
    grid = np.indices((side, side)).astype(np.float32)
    bend = ndimage.gaussian_filter(rng.standard_normal((2, side, side), np.float32), (0, side / 12, side / 12))
    grid += bend / (bend.std() + 1e-6) * (0.015 + 0.1 * severity) * side
    channels = [ndimage.map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, axis=-1)


DEGRADATIONS = {
    f.__name__: f
    for f in (
        blur,
        noise,
        checkerboard,
        stripes,
        cast,
        patches,
        doubled,
        faded,
        dark,
        speckle,
        mottle,
        mixture,
        warp,
    )
}
